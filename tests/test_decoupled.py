"""LightningRL's advantage: the worked example of the method, its filter, and its properties."""

import pytest
import torch
from torch import Tensor

from mmgrpo.advantages import standardized
from mmgrpo.decoupled import lightning, z_score
from mmgrpo.types import Feedback

CORRECT, SPEED = [1.0, 1.0, 0.0, 0.0], [4.0, 2.0, 6.0, 2.0]
NAN = float("nan")


def feedback(correct: list[float], speed: list[float], group: list[int] | None = None, weights=(1.0, 1.0)) -> Feedback:
    rewards = {"accuracy": torch.tensor(correct), "speed": torch.tensor(speed)}
    named = dict(zip(rewards, weights, strict=True))
    return Feedback(rewards, named, torch.tensor([0] * len(correct) if group is None else group))


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


def test_the_worked_example():
    group = torch.zeros(4, dtype=torch.int64)
    close(z_score(torch.tensor(CORRECT), group), [1, 1, -1, -1])
    close(z_score(torch.tensor(SPEED), group), [0.301511, -0.904534, 1.507557, -0.904534])
    found = lightning(feedback(CORRECT, SPEED))
    close(found.values, [0.953639, 0.069949, 0.371895, -1.395483])
    assert found.keep.all() and found.imitate is not None and found.imitate.tolist() == [True, True, False, False]
    close(lightning(feedback(CORRECT, SPEED), compared="group").values, [0.953639, 0.069949, 0.371895, -1.395483])
    close(
        lightning(feedback(CORRECT, SPEED), compared="group_centred").values, [1.301511, 0.095466, 0.507557, -1.904534]
    )


def test_added_first_the_fast_wrong_answer_would_be_the_best():
    plain = standardized(feedback(CORRECT, SPEED), eps=0).values
    close(plain, [0.547723, -0.547723, 1.095445, -1.095445])
    assert plain.argmax() == 2 and lightning(feedback(CORRECT, SPEED)).values.argmax() == 0


def test_samples_are_compared_over_the_batch_and_only_those_that_are_kept():
    both = lightning(
        feedback(CORRECT + [0, 0, 0, 0], SPEED + [1, 2, 3, 4], [5] * 4 + [3] * 4)
    )  # the second has none correct
    close(both.values, [0.953639, 0.069949, 0.371895, -1.395483, 0, 0, 0, 0])
    assert both.keep.tolist() == [True] * 4 + [False] * 4 and both.metrics["unsolved"] == 0.5
    score = torch.tensor(
        [1.301511, 0.095466, 0.507557, -1.904534, 1.0, -1.0], dtype=torch.float64
    )  # all right, not equally fast
    found = lightning(feedback(CORRECT + [1, 1], SPEED + [3, 1], [0] * 4 + [1] * 2))
    close(found.values, ((score - score.mean()) / score.std()).tolist())


@pytest.mark.parametrize(
    ("correct", "speed", "kept"),
    [
        ([1, 1], [2.0, 2.0], False),  # equally fast
        ([1, 1], [2.0, 2.009], False),
        ([1, 1], [2.0, 2.011], True),
        ([1, 0], [2.0, 2.0], False),
        ([0, 0], [1.0, 2.0], False),  # none is correct
        ([1, 0], [2.0, 1.0], True),
    ],
)
def test_prompts_that_teach_nothing_are_left_out(correct, speed, kept):
    found = lightning(feedback(correct, speed))
    assert bool(found.keep.all()) is kept and bool(found.keep.any()) is kept
    assert (found.values != 0).any().item() is kept


def test_either_reward_may_be_scaled_and_weighed():
    once = lightning(feedback(CORRECT, SPEED)).values
    torch.testing.assert_close(
        lightning(feedback([7 * value for value in CORRECT], [3 * value for value in SPEED])).values, once
    )
    found = lightning(feedback(CORRECT, SPEED, weights=(1.0, 0.5)), compared="group_centred").values
    close(found, [1.150756, 0.547733, -0.246222, -1.452267])


def test_without_speed_it_is_the_z_score_of_accuracy():
    found = lightning(feedback([1, 0, 0, 0], [2.0] * 4), least_range=0.0)
    close(
        found.values, z_score(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)).mul(0.75**0.5).tolist()
    )
    assert found.keep.all()


def test_the_other_forms_of_the_release():
    signs = lightning(feedback(CORRECT, SPEED), accuracy_form="signs", speed_form="minmax", compared="group_centred")
    score = torch.tensor([1.5, 1.0, 0.0, -1.0])
    close(signs.values, (score - score.mean()).tolist())
    plain = lightning(feedback(CORRECT, SPEED), speed_form="none", compared="group_centred")
    score = torch.tensor([5.0, 3.0, 5.0, 1.0])
    close(plain.values, (score - score.mean()).tolist())
    even = lightning(feedback([1, 0], [2.0, 2.0]), speed_form="minmax", least_range=0.0, compared="group_centred")
    close(even.values, [1, -1])


def test_the_release_imitates_what_is_not_below_zero():
    found = lightning(feedback(CORRECT, SPEED), imitated="positive")
    assert found.imitate is not None and found.imitate.tolist() == [True, True, True, False]


def test_no_opinion_enters_no_statistic():
    found = lightning(feedback([*CORRECT, NAN, 1.0], [*SPEED, 9.0, NAN]))
    close(found.values, [0.953639, 0.069949, 0.371895, -1.395483, 0, 0])
    assert found.keep.tolist() == [True] * 4 + [False] * 2
    assert found.imitate is not None and not found.imitate[4:].any()


def test_order_does_not_matter():
    drawn = torch.Generator().manual_seed(0)
    given = feedback(
        (torch.rand(12, generator=drawn) > 0.5).float().tolist(),
        torch.rand(12, generator=drawn).tolist(),
        [0, 1, 2] * 4,
    )
    order = torch.randperm(12, generator=drawn)
    moved = Feedback({name: values[order] for name, values in given.rewards.items()}, given.weights, given.group[order])
    torch.testing.assert_close(lightning(moved).values, lightning(given).values[order])


def test_names_and_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="the advantage needs a reward named 'right'; there are"):
        lightning(feedback(CORRECT, SPEED), accuracy="right")
    with pytest.raises(ValueError, match="reward 'speed' is infinite for 1 of 2 samples"):
        lightning(feedback([1, 0], [1.0, float("inf")]))
    for option in ("accuracy_form", "speed_form", "compared", "imitated"):
        with pytest.raises(ValueError, match=f"{option} is 'other'; expected"):
            lightning(feedback(CORRECT, SPEED), **{option: "other"})
