"""DGPO and GDRO: the worked examples, the pairwise losses that they become for two samples, and what must hold."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_gates import close, numbers
from torch import Tensor

from mmgrpo.aggregations import seq_mean, weighted_sum
from mmgrpo.facts import facts
from mmgrpo.group_matching import dgpo, gdro, listwise, of_old, preference, settled
from mmgrpo.objectives import Objective
from mmgrpo.ratios import masked
from mmgrpo.types import Evaluation

F64 = torch.float64


def column(values: Tensor) -> Tensor:
    return values.unsqueeze(1)


def errors(
    error: Tensor,
    reference: Tensor,
    rewards: Tensor | None = None,
    old: Tensor | None = None,
    group: Tensor | None = None,
) -> Evaluation:
    """One draw of each of B samples, of one group unless it is said; (B,) each."""
    old = reference if old is None else old
    return Evaluation(
        column(old - error),
        error=column(error),
        old_error=column(old),
        reference_error=column(reference),
        reward=column(torch.zeros_like(error) if rewards is None else rewards),
        group=column(torch.zeros(len(error), dtype=torch.int64) if group is None else group),
    )


def mean(losses: Tensor) -> Tensor:
    return weighted_sum(losses, seq_mean(torch.ones_like(losses, dtype=torch.bool)).to(losses))


def slope(objective: Objective, error: Tensor, *further: Tensor, advantages: Tensor) -> Tensor:
    """d mean loss / d error; (B,)."""
    leaf = error.clone().requires_grad_()
    (found,) = torch.autograd.grad(mean(objective(errors(leaf, *further), column(advantages))), leaf)
    return found


# DGPO

AWAY, REFERENCE, SIGNS = numbers(0.30, 0.50), numbers(0.32, 0.45), numbers(1, -1)
SIGMOID = 1 / (1 + math.exp(3.5))


def test_dgpo_equals_the_worked_example() -> None:
    there, group = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    found = preference(column(AWAY - REFERENCE), column(SIGNS), group, there, 100.0)
    close(found, -3.5, -3.5)
    close(found.sigmoid(), 0.029312, 0.029312)
    close(mean(dgpo(errors(AWAY, REFERENCE), column(SIGNS), clip=None)), -0.002931)
    close(dgpo(errors(AWAY, REFERENCE), column(SIGNS), exact=True), 0.029750, 0.029750)


def test_the_clip_equals_the_worked_example() -> None:
    here = errors(AWAY, REFERENCE, old=numbers(0.301, 0.49))
    close(here.log_ratio.exp(), 1.001001, 0.990050)
    assert settled(here.log_ratio, column(SIGNS), 1e-3).all()  # the first only just
    assert settled(here.log_ratio, column(SIGNS), 1.001e-3).flatten().tolist() == [False, True]
    assert not settled(here.log_ratio, column(-SIGNS), 1e-3).any()
    assert not settled(here.log_ratio, column(0 * SIGNS), 1e-3).any()


@pytest.mark.parametrize("exact", [False, True])
def test_clipped_samples_count_for_the_others_and_have_no_gradient(exact: bool) -> None:
    leaf = AWAY.clone().requires_grad_()
    here = errors(leaf, REFERENCE, old=numbers(0.301, 0.50))  # the second has not moved
    losses = dgpo(here, column(SIGNS), exact=exact)
    (found,) = torch.autograd.grad(mean(losses), leaf)
    close(found, 0, -SIGMOID / 2 * (100 if exact else 1))
    torch.testing.assert_close(losses, dgpo(here, column(SIGNS), exact=exact, clip=None))


def test_the_gradient_is_that_of_the_loss_which_the_code_leaves_without_its_strength() -> None:
    generator = torch.Generator().manual_seed(0)
    error, reference = torch.rand(2, 5, generator=generator, dtype=F64)
    advantages = torch.randn(5, generator=generator, dtype=F64)
    plain = partial(dgpo, clip=None, strength=7.0)
    exact = slope(partial(plain, exact=True), error, reference, advantages=advantages)
    torch.testing.assert_close(7 * slope(plain, error, reference, advantages=advantages), exact)
    leaf = error.clone().requires_grad_()
    loss = torch.nn.functional.softplus(7 / 5 * (advantages * (leaf - reference)).sum())
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], exact)


def test_two_samples_make_it_diffusion_dpo_of_half_the_strength() -> None:
    win, lose = (AWAY - REFERENCE).tolist()
    dpo = -math.log(1 / (1 + math.exp(50 * (win - lose))))
    close(dgpo(errors(AWAY, REFERENCE), column(SIGNS), exact=True, clip=None), dpo, dpo)


def test_a_shift_of_all_errors_changes_nothing_if_the_advantages_sum_to_0() -> None:
    generator = torch.Generator().manual_seed(1)
    error, reference, advantages = torch.rand(3, 4, generator=generator, dtype=F64)
    centred, plain = advantages - advantages.mean(), partial(dgpo, clip=None)
    for objective in (plain, partial(plain, exact=True)):
        found = slope(objective, error + 0.3, reference, advantages=centred)
        torch.testing.assert_close(found, slope(objective, error, reference, advantages=centred))
        assert not torch.allclose(
            slope(objective, error + 0.3, reference, advantages=advantages),
            slope(objective, error, reference, advantages=advantages),
        )


def test_a_group_without_advantages_has_no_gradient_and_the_code_s_loss_is_0() -> None:
    nothing = numbers(0, 0)
    assert (dgpo(errors(AWAY, REFERENCE), column(nothing)) == 0).all()
    close(dgpo(errors(AWAY, REFERENCE), column(nothing), exact=True), math.log(2), math.log(2))
    assert (slope(partial(dgpo, exact=True), AWAY, REFERENCE, advantages=nothing) == 0).all()


def test_samples_of_advantage_0_count_in_the_size_of_their_group() -> None:
    three = errors(numbers(0.30, 0.50, 0.4), numbers(0.32, 0.45, 0.1))
    close(dgpo(three, column(numbers(1, -1, 0)), exact=True)[0], math.log1p(math.exp(-7 / 3)))
    assert facts(dgpo).every


def test_averaged_weights_can_stand_in_for_the_reference() -> None:
    here = replace(errors(AWAY, AWAY, old=REFERENCE), reference_error=None)
    against = partial(dgpo, against=of_old)
    close(against(here, column(SIGNS), exact=True), 0.029750, 0.029750)
    assert not facts(against).refers and facts(dgpo).refers and facts(gdro).refers


def test_groups_and_draws_do_not_meet_and_untrained_ones_do_not_count() -> None:
    generator = torch.Generator().manual_seed(2)
    error, reference = torch.rand(2, 6, 3, generator=generator, dtype=F64)
    advantages = torch.randn(6, 1, generator=generator, dtype=F64).expand(6, 3)
    group, mask = torch.tensor([4, 9, 4, 9, 4, 9]), torch.rand(6, 3, generator=generator) > 0.3
    rewards = torch.rand(6, generator=generator, dtype=F64)
    whole = Evaluation(
        reference - error,
        error=error,
        reference_error=reference,
        group=column(group).expand(6, 3),
        reward=column(rewards).expand(6, 3),
    )
    for objective in (dgpo, partial(dgpo, exact=True), gdro, partial(gdro, top=True)):
        found = objective(masked(whole, mask), advantages)
        for number in (4, 9):
            for draw in range(3):
                rows = ((group == number) & mask[:, draw]).nonzero().flatten()
                alone = errors(error[rows, draw], reference[rows, draw], rewards[rows])
                torch.testing.assert_close(found[rows, draw], objective(alone, advantages[rows, :1])[:, 0])


# GDRO

SCORES, REWARDS = numbers(0.4, 0.1, -0.2), numbers(0.9, 0.5, 0.1)


def ranked(scores: Tensor, rewards: Tensor, temperature: float, top: bool = False) -> Tensor:
    return listwise(column(scores), rewards, torch.ones(len(scores), 1, dtype=torch.bool), temperature, top)


@pytest.mark.parametrize(
    ("temperature", "top", "loss"),
    [(0.05, False, 1.382947), (0.5, False, 1.630751), (0.0, False, 1.382745), (0.5, True, 0.983388)],
)
def test_the_listwise_loss_equals_the_worked_example(temperature: float, top: bool, loss: float) -> None:
    close(ranked(SCORES, REWARDS, temperature, top), loss)


@pytest.mark.parametrize(
    ("temperature", "top", "loss"),
    [(0.05, False, 1.382947), (0.5, False, 1.630751), (0.0, False, 1.382745), (0.5, True, 0.983388)],
)
def test_gdro_equals_the_worked_example_in_any_order(temperature: float, top: bool, loss: float) -> None:
    order = [2, 0, 1]
    here = errors(0.3 - SCORES[order] / 12, torch.full((3,), 0.3, dtype=F64), REWARDS[order])
    objective = partial(gdro, temperature=temperature, top=top)
    close(objective(here, torch.zeros(3, 1, dtype=F64), stabilizer=0.0), loss, loss, loss)
    best = loss + 0.5 * (0.3 - 0.4 / 12)
    close(objective(here, torch.zeros(3, 1, dtype=F64)), best, best, best)


def test_the_implicit_reward_is_the_worked_one() -> None:
    here = errors(numbers(0.25, 0.30), numbers(0.30, 0.30), numbers(1, 0))  # s = 0.6 and 0
    close(gdro(here, torch.zeros(2, 1, dtype=F64), temperature=0.0, stabilizer=0.0)[0], math.log1p(math.exp(-0.6)))


def test_two_samples_without_temperature_make_it_dpo() -> None:
    close(ranked(SCORES[:2], REWARDS[:2], 0.0), 0.554355)
    close(ranked(SCORES[:2], REWARDS[:2], 1e-3), -math.log(1 / (1 + math.exp(-0.3))))


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.05, 0.5])
def test_a_shift_of_all_scores_or_rewards_changes_nothing(temperature: float, top: bool) -> None:
    expected = ranked(SCORES, REWARDS, temperature, top)
    torch.testing.assert_close(ranked(SCORES + 300, REWARDS, temperature, top), expected)
    torch.testing.assert_close(ranked(SCORES, REWARDS + 300, temperature, top), expected)


def test_a_high_temperature_ignores_the_rewards() -> None:
    found = ranked(SCORES, REWARDS, 1e9, top=True)
    close(found, float(SCORES.logsumexp(0) - SCORES.mean()))
    torch.testing.assert_close(ranked(SCORES.flip(0), REWARDS, 1e9, top=True), found)


def test_large_exponents_stay_finite() -> None:
    for values in (ranked(1e4 * SCORES, 1e4 * REWARDS, 1e-3), ranked(SCORES.float(), 1e6 * REWARDS.float(), 0.05)):
        assert values.isfinite().all()


def test_a_group_of_equal_rewards_has_neither_loss_nor_gradient() -> None:
    leaf = numbers(0.3, 0.2, 0.4, 0.1).requires_grad_()
    here = errors(leaf, numbers(0.3, 0.3, 0.3, 0.3), numbers(1, 1, 1, 0), group=torch.tensor([0, 0, 7, 7]))
    losses = gdro(here, torch.zeros(4, 1, dtype=F64))
    (found,) = torch.autograd.grad(losses.sum(), leaf)
    assert (losses[:2] == 0).all() and (losses[2:] > 0).all()
    assert (found[:2] == 0).all() and (found[2:] != 0).all()


def test_the_gradient_raises_the_score_of_a_better_sample_and_the_stabilizer_lowers_its_error() -> None:
    flat = torch.full((3,), 0.3, dtype=F64)
    bare = slope(partial(gdro, stabilizer=0.0), flat, flat, REWARDS, advantages=flat)
    assert bare[0] > 0 > bare[2]
    held = slope(partial(gdro, stabilizer=0.9), flat, flat, REWARDS, advantages=flat)
    close(held - bare, 0.9, 0, 0)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (partial(dgpo, strength=0.0), r"strength is 0\.0; expected a positive"),
        (partial(dgpo, clip=0.0), r"clip is 0\.0; expected a number between 0 and 1, or none"),
        (partial(gdro, temperature=-0.1), r"temperature is -0\.1; expected a number from 0"),
    ],
)
def test_options_that_make_no_loss_are_refused(objective: Objective, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(errors(AWAY, REFERENCE, numbers(1, 0)), column(SIGNS))
