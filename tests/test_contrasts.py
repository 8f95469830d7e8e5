"""Objectives that compare the samples of a prompt themselves, against the worked numbers of the catalogue."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mmgrpo.aggregations import seq_mean, weighted_sum
from mmgrpo.contrasts import (
    disco,
    disco_b,
    disco_ratio,
    discriminative,
    dno,
    dno_hard,
    every_pair,
    log_likelihood,
    pair_loss,
    paired,
    preferred,
    regressed,
    separation,
)
from mmgrpo.ratios import masked
from mmgrpo.types import Evaluation

F64 = torch.float64


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def wide(values: Tensor, steps: int) -> Tensor:
    return values.unsqueeze(1).expand(-1, steps)


SCORES = numbers(-0.5, -0.7, -0.4, -1.4)
RIGHT = torch.tensor([True, True, False, False])
ONE = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("temperature", "gain", "weights"),
    [
        (None, 0.3, (0.5, 0.5)),
        (1.0, 0.179885, (0.731059, 0.268941)),
        (10.0, 0.287505, (0.524979, 0.475021)),
        (0.1, -0.130690, (0.999955, 0.000045)),
    ],
)
def test_the_separation_equals_the_worked_example(temperature, gain: float, weights: tuple[float, float]) -> None:
    leaf = SCORES.clone().requires_grad_()
    found = separation(leaf, RIGHT, ~RIGHT, ONE, temperature)
    torch.testing.assert_close(found, torch.full((4,), gain, dtype=F64), rtol=0, atol=1e-6)
    found[0].backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, numbers(0.5, 0.5, *(-weight for weight in weights)), rtol=0, atol=1e-6)


def test_the_separation_has_the_limits_of_its_temperature_and_ignores_a_shift() -> None:
    basic = separation(SCORES, RIGHT, ~RIGHT, ONE)
    torch.testing.assert_close(separation(SCORES, RIGHT, ~RIGHT, ONE, 1e6), basic, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        separation(SCORES, RIGHT, ~RIGHT, ONE, 1e-3), torch.full((4,), -0.2, dtype=F64), rtol=0, atol=1e-3
    )
    for temperature in (None, 1.0):
        shifted = separation(SCORES + 100, RIGHT, ~RIGHT, ONE, temperature)
        torch.testing.assert_close(shifted, separation(SCORES, RIGHT, ~RIGHT, ONE, temperature))


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_a_group_of_one_kind_adds_nothing_and_has_no_gradient(temperature) -> None:
    leaf = numbers(0.3, 0.1, 0.2, -0.4).requires_grad_()
    group, right = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False])
    found = separation(leaf, right, ~right, group, temperature)
    found.sum().backward()
    assert (found[:2] == 0).all() and (found[2:] != 0).all()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[:2] == 0).all()


def two_groups(log_ratio: Tensor) -> Evaluation:
    """Four samples of two decisions, the first two and the last two of a prompt; the second prompt is all right."""
    reward = wide(numbers(1, 0, 1, 1), 2)
    group = torch.tensor([[5], [5], [2], [2]]).expand(4, 2)
    return Evaluation(log_ratio, reward=reward, group=group, log_prob=log_ratio - 1.0)


def test_disco_is_the_mean_over_all_prompts_under_seq_mean() -> None:
    log_ratio = torch.tensor([[0.2, 0.1], [0.3, -0.1], [0.4, 0.4], [0.1, 0.0]], dtype=F64)
    here, mask = two_groups(log_ratio), torch.ones(4, 2, dtype=torch.bool)
    loss = weighted_sum(disco_b(here, torch.zeros(4, 2, dtype=F64)), seq_mean(mask).double())
    assert float(loss) == pytest.approx(-(0.15 - 0.1) / 2, abs=1e-6)  # the policy's moves raise every log-prob: no KL
    ratio = weighted_sum(disco_ratio(here, torch.zeros(4, 2, dtype=F64)), seq_mean(mask).double())
    score = log_ratio.exp().mean(1)
    assert float(ratio) == pytest.approx(-float(score[0] - score[1]) / 2, abs=1e-6)


@pytest.mark.parametrize(("moved", "term"), [(3e-4, 6e-5), (1e-4, 0.0), (5e-5, 0.0)])
def test_the_bound_on_the_kl_equals_the_worked_example(moved: float, term: float) -> None:
    leaf = torch.full((4, 2), -moved, dtype=F64, requires_grad=True)
    alike = replace(two_groups(leaf), reward=torch.ones(4, 2, dtype=F64))  # no prompt separates
    losses = disco_b(alike, torch.zeros(4, 2, dtype=F64))
    torch.testing.assert_close(losses, torch.full_like(losses, term), rtol=0, atol=1e-9)
    weighted_sum(losses, seq_mean(torch.ones(4, 2, dtype=torch.bool)).double()).backward()
    assert leaf.grad is not None
    slope = -1e3 * max(moved - 1e-4, 0) / 8  # that of half the squared excess
    torch.testing.assert_close(leaf.grad, torch.full((4, 2), slope, dtype=F64), rtol=0, atol=1e-9)


def test_on_policy_the_ratio_form_has_value_zero_and_a_gradient() -> None:
    leaf = torch.zeros(4, 2, dtype=F64, requires_grad=True)
    losses = disco_ratio(two_groups(leaf), torch.zeros(4, 2, dtype=F64))
    losses[0, 0].backward()
    assert (losses.abs() < 1e-12).all() and leaf.grad is not None
    torch.testing.assert_close(leaf.grad, wide(numbers(-0.5, 0.5, 0, 0), 2).contiguous())


def test_the_named_forms_are_the_catalogues() -> None:
    log_ratio = 0.1 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    here, zero = two_groups(log_ratio), torch.zeros(4, 2, dtype=F64)
    torch.testing.assert_close(disco(here, zero), discriminative(here, zero, score=log_likelihood, temperature=10.0))
    graded = replace(here, reward=here.reward * 0.4)  # type: ignore[operator]
    assert (disco(graded, zero)[:2] - disco(graded, zero)[2:] == 0).all()  # all wrong at the threshold of 0.5
    torch.testing.assert_close(disco(graded, zero, threshold=0.3), disco(here, zero))


# DNO


def pair_of(log_ratios: tuple[float, float], rewards: tuple[float, float]) -> Evaluation:
    values = wide(numbers(*log_ratios) / 2, 2).clone().requires_grad_()  # sums over two decisions
    return Evaluation(values, reward=wide(numbers(*rewards), 2), group=torch.zeros(2, 2, dtype=torch.int64))


def test_dno_equals_the_worked_example() -> None:
    here, nothing = pair_of((0.5, -0.5), (2 / 3, 1 / 3)), torch.zeros(2, 2, dtype=F64)
    torch.testing.assert_close(dno(here, nothing), torch.full((2, 2), 0.686140, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(dno_hard(here, nothing), torch.full((2, 2), 0.644397, dtype=F64), rtol=0, atol=1e-6)
    assert float(numbers(1 / 3).sigmoid()) == pytest.approx(0.582570, abs=1e-6)


def test_the_exact_loss_is_least_where_the_gap_is_that_of_the_rewards() -> None:
    here = pair_of((10 / 6, -10 / 6), (2 / 3, 1 / 3))  # a gap of 3.333333
    (slope,) = torch.autograd.grad(dno(here, torch.zeros(2, 2, dtype=F64)).sum(), here.log_ratio)
    assert slope.abs().max() < 1e-12
    at_start = pair_of((0.0, 0.0), (0.5, 0.5))
    losses = dno(at_start, torch.zeros(2, 2, dtype=F64))
    torch.testing.assert_close(losses, torch.full((2, 2), math.log(2), dtype=F64))
    assert torch.autograd.grad(losses.sum(), at_start.log_ratio)[0].abs().max() < 1e-12


def test_the_loss_of_a_pair_does_not_depend_on_its_order_and_hardens() -> None:
    gap, target = numbers(0.3, -1.0), numbers(0.7, 0.2)
    torch.testing.assert_close(pair_loss(gap, target), pair_loss(-gap, 1 - target))
    torch.testing.assert_close(pair_loss(gap, torch.ones(2, dtype=F64)), -gap.sigmoid().log())
    assert torch.isfinite(pair_loss(numbers(1e4, -1e4), numbers(1, 1))).all()


def test_preferred_pairs_equal_the_worked_example() -> None:
    rewards = numbers(5, 6, 3, 5, 4, 2)  # gold, s1 to s5
    teacher = torch.tensor([True, False, False, False, False, False])
    pairs = preferred(
        rewards, torch.zeros(6, dtype=torch.int64), least=5.0, margin=1.0, teacher=teacher, teacher_margin=2.0
    )
    found = {(int(first), int(second)) for first, second in pairs.nonzero()}
    assert found == {(0, 2), (0, 5), (1, 0), (1, 2), (1, 3), (1, 4), (1, 5), (3, 2), (3, 4), (3, 5)}


def test_pairs_are_of_one_group_and_ties_are_none() -> None:
    rewards, group = numbers(1, 0, 1, 1), torch.tensor([3, 3, 8, 8])
    assert preferred(rewards, group).nonzero().tolist() == [[0, 1]]
    assert every_pair(rewards, group).nonzero().tolist() == [[0, 1], [2, 3]]
    assert not preferred(rewards, group, least=2.0).any() and not preferred(rewards, group, margin=1.5).any()


def test_dno_is_the_mean_over_the_pairs_of_a_group_and_leaves_out_what_is_not_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(5, 3, generator=generator, dtype=F64)
    reward, group = numbers(0.9, 0.1, 0.5, 0.3, 0.3), torch.tensor([0, 0, 0, 1, 1])
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[2] = False  # a sample that is not trained, or has no opinion, forms no pair
    mask[1, 2] = False
    here = masked(Evaluation(log_ratio, reward=wide(reward, 3), group=wide(group, 3)), mask)
    gap = 0.1 * (log_ratio[0].sum() - log_ratio[1, :2].sum())
    z = numbers(0.8).sigmoid()
    expected = -(z * gap.sigmoid().log() + (1 - z) * (-gap).sigmoid().log())
    losses = dno(here, torch.zeros(5, 3, dtype=F64))
    torch.testing.assert_close(losses[0], expected.expand(3))
    assert torch.equal(losses[0], losses[1]) and float(losses[3, 0]) > 0
    assert (dno_hard(here, torch.zeros(5, 3, dtype=F64))[3:] == 0).all()  # a tie has no better one


def test_the_hard_loss_is_the_exact_one_of_certain_preferences() -> None:
    here = pair_of((0.5, -0.5), (400.0, 0.0))
    nothing = torch.zeros(2, 2, dtype=F64)
    torch.testing.assert_close(dno(here, nothing), dno_hard(here, nothing))
    torch.testing.assert_close(
        paired(here, nothing, pairing=partial(preferred, margin=1.0), hard=True), dno_hard(here, nothing)
    )


def test_only_gaps_of_rewards_count_for_pairs() -> None:
    here = pair_of((0.5, -0.5), (0.7, 0.2))
    shifted, nothing = replace(here, reward=here.reward + 5), torch.zeros(2, 2, dtype=F64)  # type: ignore[operator]
    for objective in (dno, dno_hard):
        torch.testing.assert_close(objective(here, nothing), objective(shifted, nothing))


# A*-PO


def test_the_regression_is_the_squared_distance_of_the_samples_log_ratio_to_the_advantage() -> None:
    away = torch.tensor([[0.4, 0.2, 9.0], [1.0, -1.0, 0.5]], dtype=F64).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    here = masked(Evaluation(torch.zeros(2, 3, dtype=F64), to_reference=away), mask)
    advantages = wide(numbers(0.283110, -0.7), 3)
    loss = weighted_sum(regressed(here, advantages, strength=0.5), seq_mean(mask).double())
    expected = ((0.5 * 0.6 - 0.283110) ** 2 + (0.5 * 0.5 + 0.7) ** 2) / 2
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert away.grad is not None
    torch.testing.assert_close(away.grad[0], numbers(0.016890 * 0.5, 0.016890 * 0.5, 0), rtol=0, atol=1e-6)
