"""Gates, weights and elastic clips against the catalogue's worked numbers; shared data rho = [[1.5, 1.0, 0.7], [0.5]], A = [1, -1]."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mmgrpo.aggregations import Aggregation, constant, seq_mean, token_mean, weighted_sum
from mmgrpo.objectives import (
    Objective,
    by_entropy,
    clipped,
    dhpo,
    dhpo_guided,
    elastic,
    even,
    gmpo,
    gspo,
    hybrid,
    luspo,
    ngrpo,
    reinforce,
    rloo,
    sapo,
    vespo,
)
from mmgrpo.ratios import masked, sample_mean, sample_sum_from_sampler
from mmgrpo.types import Evaluation
from mmgrpo.weighting import in_top_share, sampler_corrected, without_stale

F64 = torch.float64
MASK = torch.tensor([[True, True, True], [True, False, False]])
ADVANTAGES = torch.tensor([[1.0], [-1.0]], dtype=F64).expand(2, 3)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(got: Tensor, *expected: float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got, numbers(*expected).reshape(got.shape), rtol=0, atol=tolerance)


def shared(**further: Tensor) -> Evaluation:
    ratio = torch.tensor([[1.5, 1.0, 0.7], [0.5, 7.0, 7.0]], dtype=F64)
    return masked(Evaluation(ratio.log(), **further), MASK)


def single(log_ratio: Tensor, **further: Tensor) -> Evaluation:
    """One sample."""
    return Evaluation(log_ratio[None], **{name: value[None] for name, value in further.items()})


def total(objective: Objective, aggregation: Aggregation, here: Evaluation | None = None) -> tuple[Tensor, Tensor]:
    """The loss of the shared data and its slope by the log-ratio of each decision."""
    here = shared() if here is None else here
    leaf = here.log_ratio.detach().requires_grad_()
    loss = weighted_sum(objective(replace(here, log_ratio=leaf), ADVANTAGES), aggregation(MASK).double())
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_sapo_equals_the_worked_example() -> None:
    losses = sapo(shared(), ADVANTAGES)
    close(losses[MASK], -2.489837, -2.0, -1.702230, 1.415938)
    loss, slope = total(sapo, seq_mean)
    close(loss, -0.324042)
    close(slope[MASK], *(-w / 6 for w in (1.410022, 1.0, 0.684483)), 0.467070 / 2)


def test_the_gate_of_sapo_weighs_one_on_policy_and_nothing_far_away() -> None:
    for tau in (0.3, 1.0, 5.0):
        leaf = torch.tensor([[0.0, -50.0, 5.0, 1e4]], dtype=F64, requires_grad=True)
        sapo(Evaluation(leaf), torch.ones(1, 4, dtype=F64), positive=tau).sum().backward()
        assert leaf.grad is not None
        close(leaf.grad, -1, 0, 0, 0, tolerance=1e-9)
    near = torch.linspace(-1, 1, 21, dtype=F64)[None].requires_grad_()
    weak, strong = (
        torch.autograd.grad(sapo(Evaluation(near), torch.ones(1, 21, dtype=F64), positive=tau).sum(), near)[0]
        for tau in (1.0, 2.0)
    )
    assert (strong.abs() <= weak.abs() + 1e-12).all() and (strong.abs() < weak.abs()).sum() == 20


def test_gmpo_equals_the_worked_example() -> None:
    losses = gmpo(shared(), ADVANTAGES)
    close(losses[MASK], -1.014546, -1.014546, -1.014546, 0.670320)
    loss, slope = total(gmpo, seq_mean)
    close(loss, -0.172113)
    assert slope[0, 0] == 0 and slope[1, 0] == 0 and slope[0, 1] != 0  # clipped decisions count and are not pulled on


def test_gmpo_is_gspo_without_a_clip_where_no_decision_leaves_the_band() -> None:
    here = replace(shared(), log_ratio=0.5 * shared().log_ratio)
    wide = partial(gspo, low=9.0, high=9.0)
    for ours, theirs in zip(total(gmpo, seq_mean, here), total(wide, seq_mean, here), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_choice_by_entropy_enters_the_geometric_mean_and_its_count() -> None:
    here = shared(entropy=torch.tensor([[0.1, 0.9, 0.5], [2.0, 9.0, 9.0]], dtype=F64))
    chosen = gmpo(here, ADVANTAGES, choose=partial(in_top_share, share=0.5))  # the second of three, and the only one
    close(chosen[MASK], -1.0, -1.0, -1.0, 0.670320)


def test_luspo_is_gspo_times_the_length_by_its_aggregation() -> None:
    close(total(luspo, partial(constant, length=1))[0], -1.00475)
    here, mask = replace(shared(), log_ratio=shared().log_ratio / 1e4), torch.ones(2, 3, dtype=torch.bool)
    long = weighted_sum(luspo(replace(here, mask=mask), ADVANTAGES), constant(mask, length=1))
    plain = weighted_sum(luspo(replace(here, mask=mask), ADVANTAGES), seq_mean(mask))
    torch.testing.assert_close(long, 3 * plain)


def test_the_ratio_of_rloo_is_that_of_the_sample_as_a_whole() -> None:
    close(rloo(shared(), ADVANTAGES, low=0.9, high=0.9)[MASK], -1.05, -1.05, -1.05, 0.5)
    _, slope = total(partial(rloo, low=0.9, high=0.9), seq_mean)
    close(slope[MASK], -0.525, -0.525, -0.525, 0.25)  # of -ratio * A, half of each sample, whatever its length


def test_the_clip_of_ngrpo_is_tighter_below() -> None:
    close(ngrpo(single(numbers(0.5, -0.5)), numbers(1, -1)[None]), -1.24, 0.84)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(0.5, 1, 1.120422), (1, 1, 1), (2, 1, 0.199148), (0.5, -1, 0.339785), (1, -1, 1), (2, -1, 1.082682)],
)
def test_the_weight_of_vespo_equals_the_worked_example(ratio: float, advantage: float, weight: float) -> None:
    leaf = numbers(math.log(ratio)).requires_grad_()
    vespo(single(leaf), numbers(advantage)[None]).sum().backward()
    assert leaf.grad is not None
    close(leaf.grad, -advantage * weight)


def test_vespo_weighs_samples_and_takes_the_sampler_into_their_ratio() -> None:
    _, slope = total(vespo, partial(constant, length=1))
    close(slope[MASK], *([-0.948931 / 2] * 3), 0.339785 / 2)
    gap = torch.full((2, 3), 0.1, dtype=F64)
    here = shared(sampler_gap=gap)
    moved = replace(here, log_ratio=torch.where(MASK, here.log_ratio + gap, 0))
    _, told = total(partial(vespo, level=sample_sum_from_sampler), seq_mean, here)
    torch.testing.assert_close(told, total(vespo, seq_mean, moved)[1])
    far = single(numbers(1e4, -1e4, 3.0))
    assert torch.isfinite(vespo(far, -torch.ones(1, 3, dtype=F64))).all()


def test_the_weight_of_vespo_is_largest_at_power_over_rate() -> None:
    leaf = torch.linspace(-2, 2, 4001, dtype=F64)[:, None].requires_grad_()
    for advantage, best in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        (slope,) = torch.autograd.grad(vespo(Evaluation(leaf), torch.full_like(leaf, advantage)).sum(), leaf)
        assert float(leaf.detach()[slope.abs().argmax()]) == pytest.approx(math.log(best), abs=1e-3)


LOG_RATIO = numbers(0.5, -0.02, 0.0)
TEST_WIDTHS = {"low": 0.2, "high": 0.2, "sample_low": 0.1, "sample_high": 0.1}


def test_dhpo_equals_the_worked_example() -> None:
    entropy = numbers(1.2, 0.3, 0.0)
    here, good = single(LOG_RATIO, entropy=entropy), torch.ones(1, 3, dtype=F64)
    close(-dhpo(here, good, **TEST_WIDTHS), 1.15, 1.040099, 1.05)
    close(-dhpo(here, good, **TEST_WIDTHS).mean(), 1.080033)
    close(dhpo(here, -good, **TEST_WIDTHS), 1.411116, 1.076855, 1.086755)
    close(-dhpo(here, -good, **TEST_WIDTHS).mean(), -1.191575)
    close(by_entropy(here), 1, 0.25, 0)
    close(by_entropy(here, invert=True), 0, 0.75, 1)
    close(-dhpo_guided(here, good, **TEST_WIDTHS).mean(), 1.123350)
    close(-dhpo_guided(here, -good, **TEST_WIDTHS).mean(), -1.315805)
    assert (by_entropy(replace(here, entropy=0 * here.log_ratio)) == 0).all()


@pytest.mark.parametrize(("share", "same"), [(1.0, partial(clipped)), (0.0, gspo)])
def test_dhpo_at_its_ends_is_grpo_and_gspo(share: float, same: Objective) -> None:
    ours = total(partial(hybrid, mixing=partial(even, share=share)), seq_mean)
    for one, other in zip(ours, total(same, seq_mean), strict=True):
        torch.testing.assert_close(one, other)


def test_the_entropy_that_mixes_carries_no_gradient() -> None:
    entropy = torch.rand(1, 3, dtype=F64).requires_grad_()
    leaf = LOG_RATIO[None].clone().requires_grad_()
    dhpo_guided(Evaluation(leaf, entropy=entropy), torch.ones(1, 3, dtype=F64)).sum().backward()
    assert entropy.grad is None and leaf.grad is not None


# ETR


def group_of(rewards: Tensor, advantages: Tensor) -> tuple[Evaluation, Tensor]:
    """One group of samples of two decisions each, with ratios that every clip cuts."""
    sign = torch.where(advantages > 0, 1.0, -1.0).unsqueeze(1).expand(-1, 2)
    wide = rewards.unsqueeze(1).expand(-1, 2)
    return Evaluation(3 * sign, reward=wide, group=torch.zeros_like(wide, dtype=torch.int64)), advantages[
        :, None
    ].expand(-1, 2)


@pytest.mark.parametrize(
    ("rewards", "widths"),
    [
        ([1, 0, 0, 0], [0.275, 0.208333, 0.208333, 0.208333]),
        ([1, 1, 0, 0], [0.289230] * 4),
        ([1, 0, 0, 0, 0, 0, 0, 0], [0.227291] + [0.142726] * 7),
    ],
)
def test_the_elastic_clip_equals_the_worked_example(rewards: list[int], widths: list[float]) -> None:
    scores = numbers(*rewards)
    advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
    here, wide = group_of(scores, advantages)
    ratio = elastic(here, wide)[:, 0] / -advantages
    close((ratio - 1).abs(), *widths, tolerance=1e-5)


def test_the_elastic_clip_is_plain_without_its_factors_and_keeps_its_bounds() -> None:
    scores = numbers(0.9, 0.1, 0.4, 0.4, 0.0, 1.0)
    here, wide = group_of(scores, scores - 0.47)
    torch.testing.assert_close(elastic(here, wide, by_advantage=0.0, by_spread=0.0), clipped(here, wide))
    for least, most in ((0.2, 0.21), (0.05, 0.9)):
        width = (elastic(here, wide, by_advantage=3.0, by_spread=3.0, least=least, most=most) / -wide - 1).abs()
        assert (width >= least - 1e-9).all() and (width <= most + 1e-9).all()
    wider = elastic(here, wide, reward_range=0.5)  # the same spread is more of a smaller range
    assert ((wider / -wide - 1).abs() >= (elastic(here, wide) / -wide - 1).abs() - 1e-12).all()
    with pytest.raises(ValueError, match="least and most are 0.3 and 1.0"):
        elastic(here, wide, least=0.3, most=1.0)


def test_the_elastic_clip_is_wider_for_larger_advantages_and_groups_of_more_spread() -> None:
    scores = numbers(1, 1, 0, 0)
    here, _ = group_of(scores, numbers(1, 1, -1, -1))
    sizes = numbers(0.1, 0.5, -0.5, -2.0)[:, None].expand(-1, 2)
    width = (elastic(here, sizes) / -sizes - 1).abs()[:, 0]
    assert width[0] < width[1] and width[2] < width[3]
    even_group = (elastic(here, sizes) / -sizes - 1).abs()
    rare = replace(here, reward=numbers(1, 0, 0, 0)[:, None].expand(-1, 2))
    assert ((elastic(rare, sizes) / -sizes - 1).abs() < even_group).all()


# Weights around an objective


def test_bad_samples_that_the_policy_has_left_are_dropped_and_good_ones_kept() -> None:
    left = torch.full((2, 3), -0.6, dtype=F64)  # mean of log pi_old - log pi is 0.6
    here = masked(Evaluation(left), MASK)
    good, bad = torch.ones(2, 3, dtype=F64), -torch.ones(2, 3, dtype=F64)
    objective = without_stale(objective=reinforce, limit=0.5)
    assert (objective(here, bad) == 0).all()
    torch.testing.assert_close(objective(here, good), reinforce(here, good))
    torch.testing.assert_close(without_stale(objective=reinforce, limit=0.7)(here, bad), reinforce(here, bad))
    still = masked(Evaluation(0 * left), MASK)
    assert (without_stale(objective=clipped, limit=0.0)(still, bad)[MASK] == 1).all()
    with pytest.raises(ValueError, match="limit is -1"):
        without_stale(limit=-1.0)


def test_the_samplers_deviation_counts_where_it_is_asked_for() -> None:
    from mmgrpo.ratios import sample_mean_from_sampler

    here = Evaluation(torch.full((1, 2), -0.3, dtype=F64), sampler_gap=torch.full((1, 2), -0.3, dtype=F64))
    bad = -torch.ones(1, 2, dtype=F64)
    assert (without_stale(objective=clipped)(here, bad) != 0).all()
    assert (without_stale(objective=clipped, level=sample_mean_from_sampler)(here, bad) == 0).all()


def test_every_weight_around_an_objective_multiplies_its_slopes_and_leaves_the_denominators() -> None:
    gap = torch.full((2, 3), 0.5, dtype=F64)
    here = shared(sampler_gap=gap)
    objective = sampler_corrected(objective=without_stale(objective=clipped, limit=0.5), cap=3.0)
    plain, weighed = total(clipped, token_mean, here), total(objective, token_mean, here)
    expected = math.exp(0.5) * plain[1]
    expected[1] = 0  # log 0.5 is below -0.5, and A < 0
    torch.testing.assert_close(weighed[1], expected)


def test_a_sequence_level_is_that_of_the_objective_alone() -> None:
    torch.testing.assert_close(
        partial(clipped, level=sample_mean, low=3e-4, high=4e-4)(shared(), ADVANTAGES), gspo(shared(), ADVANTAGES)
    )
