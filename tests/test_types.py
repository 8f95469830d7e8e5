"""Parts of the records that cross the borders."""

import torch

from mmgrpo.types import Batch, Prompt, Trajectory


def trajectory() -> Trajectory:
    prompts = tuple(Prompt(number, str(number)) for number in range(5))
    batch = Batch(prompts, torch.arange(5), torch.arange(5) + 10, seed=0, iteration=0)
    mask = torch.ones(5, 2, dtype=torch.bool)
    return Trajectory(batch, mask, torch.zeros(5, 2, dtype=torch.int64), {"state": torch.arange(15.0).view(5, 3)})


def test_consecutive_rows_are_a_view_and_others_a_copy_of_the_same_values() -> None:
    whole = trajectory()
    for rows, shares in (
        ([1, 2, 3], True),
        ([4], True),
        ([3, 2], False),
        ([0, 2], False),
        ([1, 1], False),
        ([], False),
    ):
        part = whole.take(torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(part.record["state"], whole.record["state"][rows])
        assert torch.equal(part.batch.sample, whole.batch.sample[rows])
        assert [prompt.id for prompt in part.batch.prompts] == rows
        stored = part.record["state"].untyped_storage().data_ptr()
        assert (stored == whole.record["state"].untyped_storage().data_ptr()) is shares
