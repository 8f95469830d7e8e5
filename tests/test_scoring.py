"""Rewards of whole samples and of parts of them become one feedback."""

import pytest
import torch

from mmgrpo.advantages import process, standardized
from mmgrpo.data import requests
from mmgrpo.scoring import score
from mmgrpo.types import Feedback, Prompt, Samples

NAN = torch.nan
ENDS = torch.tensor([[2, 5], [1, -1], [-1, -1]])  # two parts, one, none


def samples(ends: torch.Tensor | None = ENDS) -> Samples:
    batch = requests([Prompt(0, "a")], [0], group_size=3, seed=0, iteration=0)
    return Samples(batch, text=("x", "y", "z"), part_end=ends)


def parts(samples: Samples) -> torch.Tensor:
    return torch.tensor([[0.25, 0.5], [1.0, NAN], [NAN, NAN]])


def whole(samples: Samples) -> torch.Tensor:
    return torch.tensor([3.0, 4.0, 5.0])


def test_rewards_of_parts_stand_at_their_ends_and_add_up_to_the_total():
    found = score({"parts": parts, "whole": whole}, {"parts": 2.0, "whole": 0.5}, samples(), 6)
    torch.testing.assert_close(found.rewards["parts"], torch.tensor([0.75, 1.0, NAN]), equal_nan=True)
    expected = torch.full((3, 6), NAN)
    expected[0, 2], expected[0, 5], expected[1, 1] = 0.5, 1.0 + 1.5, 2.0 + 2.0  # the whole sample's at its last part
    torch.testing.assert_close(found.step_rewards, expected, equal_nan=True)
    torch.testing.assert_close(found.total(), torch.tensor([3.0, 4.0, 2.5]))
    torch.testing.assert_close(expected.nansum(1)[:2], found.total()[:2])


def test_components_may_be_of_parts_or_of_the_whole():
    found = score({"both": lambda s: {"a": parts(s), "b": whole(s)}}, {"both": 1.0}, samples(), 6)
    assert set(found.rewards) == {"both.a", "both.b"}
    assert found.step_rewards is not None and found.step_rewards[0, 5] == 3.5


def test_without_parts_there_are_no_rewards_of_steps():
    assert score({"whole": whole}, {"whole": 1.0}, samples(), 6).step_rewards is None
    assert score({"parts": parts}, {"parts": 1.0}, samples()).step_rewards is None  # evaluation counts no decisions


def test_a_reward_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"reward 'parts' has shape \(3, 2\); expected \(3\)"):
        score({"parts": parts}, {"parts": 1.0}, samples(None), 6)
    with pytest.raises(ValueError, match=r"reward 'parts' has shape \(3, 2\); expected \(3, 1\)"):
        score({"parts": parts}, {"parts": 1.0}, samples(ENDS[:, :1]), 6)


# ---- what the process advantage makes of them


def feedback(rewards: list[list[float]]) -> Feedback:
    """One group; the steps hold NaN where no part ends."""
    steps = torch.tensor(rewards, dtype=torch.float64)
    return Feedback({"r": steps.nansum(1)}, {"r": 1.0}, torch.zeros(len(steps), dtype=torch.int64), steps)


def test_the_sum_of_what_is_still_to_come_is_that_of_unified_grpo():
    first = process(feedback([[NAN, 0.2, NAN, 0.8], [0.6, NAN, 0.4, NAN]]), eps=0).values
    expected = [[0, 0, 1.341641, 1.341641], [0, -0.447214, -0.447214, 0]]
    torch.testing.assert_close(first, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    second = process(feedback([[1, 2, 3], [0, 2, 1]]), eps=0).values
    expected = [[1.566699, 2.088932, 1.566699], [-1.566699, 0, -0.522233]]
    torch.testing.assert_close(second, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_with_one_part_it_is_the_outcome_advantage_and_a_constant_changes_nothing():
    one = feedback([[NAN, 0.2], [NAN, 0.9], [NAN, 0.4]])
    values = process(one).values
    torch.testing.assert_close(values[:, 0], standardized(one, ddof=0).values)
    torch.testing.assert_close(values[:, 0], values[:, 1])
    moved = process(feedback([[NAN, 5.2], [NAN, 5.9], [NAN, 5.4]])).values
    torch.testing.assert_close(moved, values)
    assert not process(feedback([[1.0, 1.0], [1.0, 1.0]])).values.any()


def test_outcome_rewards_alone_are_refused_by_name():
    plain = Feedback({"r": torch.rand(2)}, {"r": 1.0}, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="'process' needs a reward of parts"):
        process(plain)
