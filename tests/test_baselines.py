"""Other baselines and scales: the worked examples of their papers, their symmetries, and the group that has nothing to say."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages import close, feedback, ids, numbers
from torch import Tensor

from mmgrpo.advantages import against_others, standardize
from mmgrpo.baselines import (
    against_log_mean_exp,
    against_value,
    balanced,
    balanced_scores,
    batch_whitened,
    gaussian_rank,
    log_mean_exp,
    median,
    median_centred,
    normal_ranks,
    optimal_value,
    pivots,
    shifted,
    virtual_best,
    whitened,
    with_virtual,
)
from mmgrpo.comparing import teaching
from mmgrpo.groups import group_centred, group_sum
from mmgrpo.types import Feedback, Prompt

ONE = torch.zeros(5, dtype=torch.int64)
Estimate = Callable[[Tensor, Tensor], Tensor]


def of(estimate: Estimate, *scores: float) -> Tensor:
    """The values of one group."""
    return estimate(numbers(*scores), torch.zeros(len(scores), dtype=torch.int64))


# ---- worked examples


def test_the_median_and_its_distance_equal_the_worked_example():
    close(of(median_centred, 0.1, 0.2, 0.9, 0.3, 0.25), -2.941176, -0.980392, 12.745098, 0.980392, 0, tolerance=1e-5)
    assert pivots(numbers(0.1, 0.2, 0.9, 0.3, 0.25), ONE).tolist() == [False] * 4 + [True]
    close(
        of(standardize, 0.1, 0.2, 0.9, 0.3, 0.25), -0.790567, -0.474340, 1.739247, -0.158113, -0.316227, tolerance=1e-3
    )
    close(of(median_centred, 1, 0, 0), 1000, 0, 0)
    close(of(partial(median_centred, least_scale=0.1), 1, 0, 0), 1 / 0.101, 0, 0)
    close(of(median_centred, 3, 1, 2, 0), 2 / 1.001, 0, 1 / 1.001, -1 / 1.001)  # the lower median of four


def test_the_pivot_leaves_the_loss_and_one_sample_alone_teaches_nothing():
    found = median(feedback(ids(1, 1, 1), numbers(1, 0, 0)))
    assert found.keep.tolist() == [True, False, True]
    assert median(feedback(ids(1, 1, 1), numbers(1, 0, 0)), drop=False).keep.all()
    close(median(feedback(ids(1, 1, 1), numbers(1, 0, 0)), clamp=5).values, 5, 0, 0)
    alone = median(feedback(ids(1), numbers(1)))
    assert alone.values.tolist() == [0] and not alone.keep.any()


RANKS = [
    ([0, 0, 0, 0, 1], [-0.320388] * 4 + [1.281552]),
    ([0, 0, 1, 1, 1], [-0.902976] * 2 + [0.601984] * 3),
    ([0.1, 0.1, 0.1, 0.2, 1.0], [-0.601984] * 3 + [0.524401, 1.281552]),
    ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.902976, -0.902976, 0.262200, 0.262200, 1.281552]),
    ([0.3, 0.3, 0.3], [0.0, 0.0, 0.0]),
    ([0.7], [0.0]),
]


@pytest.mark.parametrize(("scores", "expected"), RANKS, ids=str)
def test_ranks_become_normal_quantiles_as_in_the_papers_figure(scores, expected):
    close(of(normal_ranks, *scores), *expected)


def test_noise_beyond_the_decimals_is_a_tie():
    close(of(normal_ranks, 0.1, 0.1 + 1e-9, 0.5), *of(normal_ranks, 0.1, 0.1, 0.5).tolist())


VIRTUAL = [
    ([0, 0, 0, 0], [-0.447213] * 4),
    ([1, 0, 0, 0], [1.095443] + [-0.730295] * 3),
    ([1, 1, 0, 0], [0.730295] * 2 + [-1.095443] * 2),
    ([1, 1, 1, 1], [0.0] * 4),
]


@pytest.mark.parametrize(("scores", "expected"), VIRTUAL, ids=str)
def test_a_virtual_perfect_sample_pushes_the_all_wrong_group(scores, expected):
    close(of(partial(with_virtual, best=1.0), *scores), *expected, tolerance=2e-6)


def test_without_virtual_samples_it_is_grpo_and_more_than_the_best_is_refused():
    scores, group = torch.rand(6, dtype=torch.float64), ids(0, 0, 0, 1, 1, 1)
    torch.testing.assert_close(with_virtual(scores, group, 1.0, 0), standardize(scores, group, eps=1e-6))
    with pytest.raises(ValueError, match=r"a score is 1\.5; expected at most best = 1"):
        with_virtual(numbers(1.5, 0), ids(0, 0), 1.0)


def test_which_groups_teach_is_declared():
    wrong, right, mixed = numbers(0, 0), numbers(1, 1), numbers(0, 1)
    every = feedback(ids(0, 0, 1, 1, 2, 2), torch.cat([wrong, right, mixed]))
    assert teaching(virtual_best(), every).tolist() == [True, True, False, False, True, True]
    assert teaching(virtual_best(count=0), every).tolist() == [False] * 4 + [True] * 2
    assert teaching(shifted(), every).all() and teaching(shifted(shift=0.0), every).tolist() == [False] * 4 + [True] * 2
    assert teaching(gaussian_rank, every).tolist() == [False] * 4 + [True] * 2


def test_baselines_of_reinforce_equal_the_worked_examples():
    close(shifted()(feedback(ids(0, 0, 0, 0), numbers(1, 0, 0, 0))).values, 0.85, -0.15, -0.15, -0.15)
    for temperature, baseline in ((1.0, 0.357374), (0.1, 0.861384), (10.0, 0.259530)):
        values = of(partial(against_log_mean_exp, temperature=temperature), 1, 0, 0, 0)
        close(values, 1 - baseline, -baseline, -baseline, -baseline)
    values = balanced_scores(numbers(1, 0, 0, 0), ids(0, 0, 0, 0))
    assert sorted(values.tolist()) == [-0.5, 0, 0, 0.5] and values[0] == 0.5
    assert torch.equal(values, balanced_scores(numbers(1, 0, 0, 0), ids(0, 0, 0, 0)))  # drawn from the group's id
    close(balanced(feedback(ids(0, 0, 0), numbers(1, 1, 0))).values, 1 / 3, 1 / 3, -2 / 3)  # nothing is dropped


def test_the_value_of_a_prompt_equals_the_worked_example_and_is_taken_from_a_column():
    scores, group = numbers(1, 0, 0, 1), ids(0, 0, 0, 0)
    close(optimal_value(scores, group, 0.5), *[0.716890] * 4)
    close(optimal_value(scores, group, 1e6), *[0.5] * 4, tolerance=1e-5)
    close(optimal_value(scores, ids(0, 0, 1, 1), 0.5), *[float(optimal_value(numbers(1, 0), ids(0, 0), 0.5)[0])] * 4)
    prompts = tuple(Prompt(number, "a", columns={"value": 0.25}) for number in range(4))
    judged = Feedback({"r": scores}, {"r": 1.0}, group, prompts=prompts)
    close(against_value()(judged).values, 0.75, -0.25, -0.25, 0.75)
    assert teaching(against_value(), judged).all()
    with pytest.raises(ValueError, match="a number in the column 'v' of every prompt; got \\[None\\]"):
        against_value(column="v")(judged)


def test_whitening_over_the_batch_equals_the_worked_example():
    scores, group = numbers(1, 0, 0, 0.5, 10, 0, 0, 10), ids(0, 0, 0, 0, 1, 1, 1, 1)
    plain = batch_whitened()(feedback(group, scores)).values
    close(plain, -0.372747, -0.593634, -0.593634, -0.483191, 1.615237, -0.593634, -0.593634, 1.615237)
    centred = batch_whitened(baseline=True)(feedback(group, scores)).values
    close(centred, 0.164794, -0.098876, -0.098876, 0.032959, 1.318352, -1.318352, -1.318352, 1.318352)


def test_whitening_counts_decisions():
    scores, lengths = numbers(1, 0, 4), ids(1, 3, 2)
    every = numbers(1, 0, 0, 0, 4, 4)
    expected = (every - every.mean()) / (every.var() + 1e-8).sqrt()
    torch.testing.assert_close(whitened(scores, lengths), expected[[0, 1, 4]])
    masked = Feedback({"r": scores}, {"r": 1.0}, ids(0, 1, 2), mask=torch.arange(3) < lengths[:, None])
    torch.testing.assert_close(batch_whitened()(masked).values, expected[[0, 1, 4]])


# ---- properties

ESTIMATES: dict[str, Estimate] = {
    "median": median_centred,
    "gaussian rank": normal_ranks,
    "virtual best": partial(with_virtual, best=100.0),
    "log mean exp": against_log_mean_exp,
    "balanced": balanced_scores,
}
ZERO_SUM = {"gaussian rank", "balanced"}
SHIFTS = {"median", "gaussian rank", "log mean exp", "balanced"}  # a constant added to all scores changes nothing
scores_of_groups = st.lists(st.lists(st.integers(-40, 40), min_size=1, max_size=6), min_size=1, max_size=4)
each = pytest.mark.parametrize("name", ESTIMATES)


def made(groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    scores = torch.tensor([value / 8 for group in groups for value in group], dtype=torch.float64)
    return scores, torch.tensor([number for number, group in enumerate(groups) for _ in group])


@each
@given(groups=scores_of_groups, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_values_follow_their_samples_and_groups_do_not_meet(name, groups, seed):
    scores, group = made(groups)
    values = ESTIMATES[name](scores, group)
    assert values.isfinite().all() and values.shape == scores.shape
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    if name != "balanced":  # which drops by position
        torch.testing.assert_close(ESTIMATES[name](scores[order], group[order]), values[order])
    for number in group.unique():
        alone = group == number
        torch.testing.assert_close(ESTIMATES[name](scores[alone], group[alone]), values[alone])
    if name in ZERO_SUM:
        assert group_sum(values, group).abs().max() < 1e-6
    if name in SHIFTS:
        torch.testing.assert_close(ESTIMATES[name](scores + 2, group), values, rtol=1e-6, atol=1e-6)


@each
@given(groups=scores_of_groups)
@settings(max_examples=15, deadline=None)
def test_a_missing_opinion_enters_no_statistic(name, groups):
    scores, group = made(groups)
    values = ESTIMATES[name](scores, group)
    more = torch.cat([scores, numbers(math.nan)]), torch.cat([group, group[:1]])
    found = ESTIMATES[name](*more)
    assert found[-1].isnan()
    torch.testing.assert_close(found[:-1], values)


@each
def test_a_group_of_equal_scores_has_values_of_exactly_zero(name):
    values = ESTIMATES[name](numbers(*[0.3] * 4), ids(0, 0, 0, 0))
    expected = name == "virtual best"
    assert (values != 0).all() == expected and (values == values[0]).all()


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=8, unique=True))
@settings(max_examples=25, deadline=None)
def test_ranks_know_the_order_alone(values):
    scores, group = numbers(*(value / 100 for value in values)), torch.zeros(len(values), dtype=torch.int64)
    ranks = normal_ranks(scores, group)
    torch.testing.assert_close(normal_ranks((scores / 10).exp(), group, 12), ranks)
    torch.testing.assert_close(normal_ranks(-scores, group), -ranks)
    assert ranks.abs().max() <= torch.special.ndtri(torch.tensor(1 - 0.5 / len(values), dtype=torch.float64)) + 1e-9


def test_at_most_half_the_samples_are_above_the_median_and_half_below():
    scores = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = median_centred(scores, torch.zeros(7, dtype=torch.int64))
    assert (values > 0).sum() == 3 == (values < 0).sum()


def test_log_mean_exp_lies_between_the_mean_and_the_largest():
    scores, group = numbers(1, 0, 0.2, 0.7), ids(0, 0, 0, 0)
    torch.testing.assert_close(
        against_log_mean_exp(scores, group, 1e6), group_centred(scores, group), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(against_log_mean_exp(scores, group, 1e-3), scores - 1, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="temperature is 0; expected a positive number"):
        log_mean_exp(feedback(group, scores), temperature=0)


def test_virtual_sums_are_not_positive_and_two_samples_prefer_as_dpo():
    values = of(partial(with_virtual, best=1.0), 1, 0.4, 0)
    assert values.sum() < 0
    close(of(partial(standardize, eps=0.0), 0.9, 0.2), 1 / math.sqrt(2), -1 / math.sqrt(2))  # 2-GRPO, arXiv 2510.00977
    close(of(partial(standardize, eps=0.0, ddof=0), 0.9, 0.2), 1, -1)
    torch.testing.assert_close(of(against_others, 1, 0), numbers(1, -1))
