"""The entropy's bonus, its adaptive weight and its band against worked numbers; the order in which masks meet the other terms."""

import pytest
import torch
from torch import Tensor

from mmgrpo.aggregations import seq_mean, token_mean
from mmgrpo.entropy import Adaptation, Band, Bonus, adapted, applied, mean_entropy, outside
from mmgrpo.improve import Given, Loss, slopes
from mmgrpo.kl import estimated_k3
from mmgrpo.objectives import clipped, reinforce
from mmgrpo.types import Evaluation
from mmgrpo.weighting import selection, top_entropy, without_stale

F64 = torch.float64
MASK = torch.ones(1, 2, dtype=torch.bool)


def here(**further: Tensor) -> Evaluation:
    return Evaluation(torch.zeros(1, 2, dtype=F64), mask=MASK, **further)


def given(advantage: float = 0.0) -> Given:
    weights = token_mean(MASK).double()
    return Given(torch.full((1, 2), advantage, dtype=F64), weights, evenly=weights)


def test_the_bonus_is_a_mean_over_decisions_whatever_the_aggregation_of_the_losses() -> None:
    entropy = torch.tensor([[1.0, 3.0, 7.0], [5.0, 7.0, 7.0]], dtype=F64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    evaluation = Evaluation(torch.zeros(2, 3, dtype=F64), entropy=entropy)
    told = Given(torch.zeros(2, 3, dtype=F64), seq_mean(mask).double(), evenly=token_mean(mask).double())
    total, found = slopes(evaluation, told, Loss(clipped, entropy_weight=0.1))
    assert float(total) == pytest.approx(-0.3, abs=1e-6)
    torch.testing.assert_close(found["entropy"], torch.where(mask, -0.1 / 3, 0).double(), rtol=0, atol=1e-8)


def test_with_a_choice_by_entropy_the_bonus_is_the_mean_of_the_chosen() -> None:
    entropy = torch.tensor([[1.0, 3.0]], dtype=F64)
    chosen = Loss(top_entropy(objective=clipped, share=0.5), entropy_weight=0.1)
    total, found = slopes(here(entropy=entropy), given(), chosen)
    assert float(total) == pytest.approx(-0.3, abs=1e-6)
    torch.testing.assert_close(found["entropy"], torch.tensor([[0, -0.1]], dtype=F64), rtol=0, atol=1e-8)
    plain, _ = slopes(here(entropy=entropy), given(), Loss(clipped, entropy_weight=0.1))
    assert float(plain) == pytest.approx(-0.2, abs=1e-6)


def test_the_choice_is_found_inside_other_weights() -> None:
    assert selection(clipped) is None and selection(without_stale(objective=reinforce)) is None
    found = selection(without_stale(objective=top_entropy(objective=clipped, share=0.5)))
    assert found is not None
    entropy = torch.tensor([[1.0, 3.0]], dtype=F64)
    evenly = token_mean(MASK).double()
    assert float(mean_entropy(here(entropy=entropy), torch.zeros(1, 2), evenly, found)) == 3


def test_the_adaptive_weight_equals_the_worked_example() -> None:
    how, bonus, weights = Adaptation(target=0.2), Bonus(0.01), []
    assert applied(bonus, how) == 0  # nothing is known before the first update
    used = []
    for entropy in (0.15, 0.25, 0.10):
        used.append(applied(bonus, how))
        bonus = adapted(bonus, entropy, how)
        weights.append(bonus.weight)
    assert weights == pytest.approx([0.015, 0.010, 0.015])
    assert used == pytest.approx(
        [0.0, 0.015, 0.0]
    )  # only while the entropy of the update before is not above its target


def test_the_adaptive_weight_stays_in_its_bounds_and_a_fixed_one_always_counts() -> None:
    how, bonus = Adaptation(0.2, delta=0.5, least=0.1, most=0.7), Bonus(0.6)
    assert adapted(bonus, 0.1, how).weight == 0.7 and adapted(adapted(bonus, 9.0, how), 9.0, how).weight == 0.1
    assert applied(bonus, None) == 0.6


@pytest.mark.parametrize(("mean", "excess"), [(0.2, 0.3), (0.5, 0.0), (1.0, 0.0), (2.5, 1.5)])
def test_the_band_counts_what_lies_outside(mean: float, excess: float) -> None:
    log_prob = torch.tensor([[-mean - 0.1, -mean + 0.1]], dtype=F64)
    band = Band(0.5, 1.0, 0.25)
    assert float(outside(here(log_prob=log_prob), token_mean(MASK).double(), band)) == pytest.approx(excess)
    total, found = slopes(here(log_prob=log_prob), given(), Loss(clipped, band=band))
    assert float(total) == pytest.approx(0.25 * excess)
    sign = 0 if not excess else (-1 if mean > 1 else 1)  # a higher mean of -log pi is wanted below the band
    torch.testing.assert_close(found["log_prob"], torch.full((1, 2), sign * 0.25 / 2, dtype=F64))


def test_masks_around_the_objective_leave_the_kl_and_the_denominators_alone() -> None:
    """core.md Part 0: off-policy and entropy masks multiply the objective's losses, the KL is added after them."""
    log_ratio = torch.full((2, 2), -1.0, dtype=F64)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=F64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    evaluation = Evaluation(log_ratio, to_reference=torch.full((2, 2), 0.3, dtype=F64))
    told = Given(advantages, token_mean(mask).double())
    loss = Loss(without_stale(objective=reinforce, limit=0.5), estimated_k3, 0.1)
    total, found = slopes(evaluation, told, loss)
    k3 = 0.040818  # of 0.3
    assert float(total) == pytest.approx((1.0 + 1.0) / 4 + 0.1 * k3, abs=1e-6)  # two of four decisions, still over four
    assert (found["log_ratio"][1] == 0).all() and (found["to_reference"] != 0).all()


def test_what_a_loss_needs_and_whether_samples_without_advantage_matter() -> None:
    assert Loss(clipped).needs == () and not Loss(clipped).every and not Loss(clipped).refers
    bonus, band = Loss(clipped, entropy_weight=0.0), Loss(clipped, band=Band(0, 1, 1))
    assert bonus.needs == ("entropy",) and bonus.every and band.needs == ("log_prob",) and band.every
    assert Loss(clipped, estimated_k3, 0.1).refers and Loss(clipped, estimated_k3, 0.1).every
