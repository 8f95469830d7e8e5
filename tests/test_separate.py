"""Losses of several advantages, clipped one by one and then added: the worked examples, and what the trainer makes of them."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages import NAN, close, feedback, ids, numbers
from torch import Tensor

from mmgrpo.advantages import gdpo, standardized
from mmgrpo.aggregations import seq_mean
from mmgrpo.comparing import teaching
from mmgrpo.improve import Given, Loss, slopes
from mmgrpo.objectives import clipped
from mmgrpo.selection import extremes, of_decisions, separated
from mmgrpo.separate import dance, dual
from mmgrpo.types import Advantage, Evaluation, Feedback

F64 = torch.float64
ONE = ids(0, 0, 0)


def alone(advantages: Tensor, ratio: float, separate: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one sample with one decision, and its slope."""
    weights = seq_mean(torch.ones(1, 1, dtype=torch.bool)).double()
    told = Given(advantages.view(1, 1), weights, separate=None if separate is None else separate.view(1, 1, -1))
    return slopes(Evaluation(numbers(ratio).log().view(1, 1)), told, Loss(partial(clipped, low=0.1, high=0.1)))


# ---- DanceGRPO


def test_clipped_losses_that_are_added_equal_the_worked_example() -> None:
    loss, slope = alone(numbers(0), 1.2, numbers(1, -1))
    assert float(loss) == pytest.approx(0.1, abs=1e-12)
    close(slope["log_ratio"][0], 1.2)  # the first is clipped, the second pushes the ratio back
    of_sum, flat = alone(numbers(0), 1.2)
    assert of_sum == 0
    close(flat["log_ratio"][0], 0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(parts=st.lists(st.floats(-3, 3), min_size=1, max_size=4), ratio=st.floats(0.91, 1.09))
def test_where_nothing_is_clipped_both_orders_agree(parts: list[float], ratio: float) -> None:
    several = numbers(*parts)
    one, slope = alone(several.sum(), ratio)
    other, found = alone(several.sum(), ratio, several)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(slope["log_ratio"], found["log_ratio"])


def test_advantages_and_the_best_and_worst_four_equal_the_worked_example() -> None:
    found = dance(feedback(torch.zeros(6, dtype=torch.int64), numbers(0.1, 0.5, 0.9, 0.3, 0.7, 0.2)))
    close(found.values, -1.13555, 0.162221, 1.459993, -0.486664, 0.811107, -0.811107)
    kept = extremes(found.values, torch.zeros(6), found.keep, 4 / 6)
    assert kept.nonzero().flatten().tolist() == [0, 2, 4, 5]


def test_each_reward_is_standardized_and_clamped_before_it_is_weighed() -> None:
    group = ids(0, 0, 0, 0, 1, 1)
    said = feedback(group, numbers(0, 1, 1, 0, 5, 7), numbers(10, 10, 30, 30, 1, 1), weights=(1.0, -2.0))
    found = dance(said, clamp=0.7)
    first = standardized(feedback(group, numbers(0, 1, 1, 0, 5, 7)), eps=1e-8).values.clamp(-0.7, 0.7)
    second = -2 * standardized(feedback(group, numbers(10, 10, 30, 30, 1, 1)), eps=1e-8).values.clamp(-0.7, 0.7)
    assert found.separate is not None
    torch.testing.assert_close(found.separate, torch.stack([first, second]))
    torch.testing.assert_close(found.values, first + second)
    with pytest.raises(ValueError, match=r"clamp is 0; expected a positive number"):
        dance(said, clamp=0)


def test_of_the_sum_it_is_the_aggregation_of_mixgrpo_and_with_one_reward_plain_grpo() -> None:
    two = feedback(ids(0, 0, 0, 0), numbers(0, 1, 1, 0), numbers(10, 10, 30, 30))
    summed = dance(two, separate=False)
    assert summed.separate is None
    torch.testing.assert_close(summed.values, gdpo(two, eps=1e-8, batch_scale=False).values)
    close(summed.values, -(3**0.5), 0, 3**0.5, 0)
    one = feedback(ids(0, 0, 1, 1, 1), numbers(1, 4, 2, 2, 9))
    torch.testing.assert_close(dance(one).values, standardized(one, eps=1e-8).values)


def test_a_reward_without_an_opinion_adds_nothing_and_a_sample_without_any_leaves() -> None:
    found = dance(feedback(ids(0, 0, 0, 0), numbers(0, 2, 1, NAN), numbers(NAN, 0, 4, NAN)))
    assert found.separate is not None and found.separate.isfinite().all()
    assert found.keep.tolist() == [True, True, True, False]
    assert found.separate[1, 0] == 0 and not found.separate[:, 3].any()
    close(found.values[:3], -1, 1 - 0.5**0.5, 0.5**0.5)


# ---- Euphonium


def scored(process: Tensor, *rewards: Tensor, group: Tensor = ONE) -> Feedback:
    plain = feedback(group, *rewards)
    return Feedback(plain.rewards, plain.weights, group, facts={"process_scores": process})


def test_process_advantages_equal_the_worked_example() -> None:
    process = torch.tensor([[0, 1], [0, 2], [0, 3]], dtype=F64)
    found = dual()(scored(process, numbers(1, 1, 4)))
    assert found.separate is not None
    close(found.separate[-1], *[[0, -1], [0, 0], [0, 1]])
    assert (found.separate[-1][:, 0] == 0).all()  # exactly
    outcome = dance(feedback(ONE, numbers(1, 1, 4))).values
    torch.testing.assert_close(found.separate[0], outcome.unsqueeze(1).expand(3, 2))
    torch.testing.assert_close(found.values, found.separate.sum(0))


def test_scores_that_are_equal_but_for_nothing_are_no_preference_and_unguided_steps_have_none() -> None:
    process = torch.tensor([[0.1, NAN, 1], [0.1, NAN, NAN], [0.1, NAN, 3]]).float()
    found = dual(outcome=0.0)(scored(process, numbers(1, 2, 3)))
    assert found.values.isfinite().all() and not found.values[:, :2].any() and found.values[1, 2] == 0
    close(found.values[:, 2], -(0.5**0.5), 0, 0.5**0.5)


def test_without_its_process_term_it_is_dance_at_every_step() -> None:
    process = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    group = ids(0, 0, 1, 1, 1)
    said = scored(process, numbers(1, 4, 2, 2, 9), numbers(0, 1, 0, 1, 1), group=group)
    plain = dance(said)
    found = dual(process=0.0)(said)
    torch.testing.assert_close(found.values, plain.values.unsqueeze(1).expand(5, 4))
    inside = dual(outcome=0.0)(said).values  # groups are compared apart
    torch.testing.assert_close(
        inside[:2], dual(outcome=0.0)(scored(process[:2], numbers(1, 4), group=ids(0, 0))).values
    )


def test_a_group_without_spread_teaches_by_its_process_and_a_sample_without_an_opinion_does_not() -> None:
    said = scored(torch.tensor([[1.0], [2.0], [3.0]]), numbers(5, 5, NAN))
    assert teaching(dual(), said).tolist() == [True, True, False]
    found = dual()(said)
    assert found.values[:2].any() and found.values[2] == 0 and not found.keep[2]
    with pytest.raises(ValueError, match="needs the fact 'process_scores'"):
        dual()(feedback(ONE, numbers(1, 2, 3)))


# ---- the trainer's part


def test_separate_advantages_of_samples_stand_at_every_decision() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    several = torch.arange(4.0).view(2, 2)
    found = separated(Advantage(several.sum(0), mask.any(1), separate=several), mask)
    assert found is not None and found.shape == (2, 3, 2)
    assert torch.equal(found.sum(-1), of_decisions(several.sum(0), mask))
    assert separated(Advantage(several.sum(0), mask.any(1)), mask) is None
    with pytest.raises(ValueError, match=r"separate has shape \(2, 2\); expected \(any, 2, 3\)"):
        separated(Advantage(torch.zeros(2, 3), mask.any(1), separate=several), mask)
    with pytest.raises(ValueError, match="advantages has shape"):
        of_decisions(torch.zeros(2, 1), mask)


def test_of_an_odd_count_the_top_has_one_more() -> None:
    values, every = torch.arange(6.0), torch.ones(6, dtype=torch.bool)
    assert extremes(values, torch.zeros(6), every, 0.5).nonzero().flatten().tolist() == [0, 4, 5]
    assert extremes(values[:1], torch.zeros(1), every[:1], 0.5).tolist() == [True]
