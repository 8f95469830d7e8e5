"""Losses, their gradients and their sums against numbers worked by hand, direct formulas and exact expectations."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from every_objective import AGGREGATIONS, drawn
from torch import Tensor

from mmgrpo.aggregations import Aggregation, constant, denominator, seq_mean, token_mean, weighted_sum
from mmgrpo.facts import facts
from mmgrpo.kl import DISTANCES, flow_grpo_kl, k1, k2, k3
from mmgrpo.objectives import Objective, cispo, clipped, dhpo, gspo, gspo_token, guarded, reinforce, rloo
from mmgrpo.off_policy import opmd, rec_ring
from mmgrpo.ratios import decision, masked, sample_mean, sample_sum
from mmgrpo.types import Evaluation
from mmgrpo.weighting import narrowest, sampler_corrected, top_entropy

F64 = torch.float64


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(got: Tensor, *expected: float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got, numbers(*expected).reshape(got.shape).to(got.dtype), rtol=0, atol=tolerance)


each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS.values(), ids=AGGREGATIONS.keys())


# Objectives


def test_the_clipped_loss_equals_the_direct_formula() -> None:
    log_ratio, advantages, _ = drawn(50, 20, scale=0.5)
    ratio = log_ratio.exp()
    for low, high in ((0.2, 0.2), (0.2, 0.28), (1e-3, 2e-3), (10, 1.0)):
        direct = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        torch.testing.assert_close(clipped(Evaluation(log_ratio), advantages, low=low, high=high), direct)
    bounded = ratio.clamp(max=1.5)
    direct = -torch.min(bounded * advantages, ratio.clamp(0.8, 1.2) * advantages)
    torch.testing.assert_close(clipped(Evaluation(log_ratio), advantages, ceiling=1.5), direct)


def test_the_gradient_of_the_clipped_loss_equals_the_direct_one() -> None:
    log_ratio, advantages, _ = drawn(50, 20, scale=0.5)
    ours, theirs = log_ratio.clone().requires_grad_(), log_ratio.clone().requires_grad_()
    clipped(Evaluation(ours), advantages, low=0.2, high=0.28).sum().backward()
    ratio = theirs.exp()
    (-torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad is not None and (ours.grad == 0).any()


def test_flow_grpo_losses_equal_the_worked_example() -> None:
    here = Evaluation(numbers(-0.00320138, -0.00320138)[None])
    loss = clipped(here, numbers(0.528243, -0.528243)[None], low=1e-4, high=1e-4)
    close(loss, -0.526554, 0.528190)


def test_the_two_sided_clip_bounds_the_loss_of_a_runaway_ratio() -> None:
    log_ratio = numbers(math.log(10))[None].requires_grad_()
    loss = clipped(Evaluation(log_ratio), numbers(-1)[None])
    close(loss, 10)
    bounded = clipped(Evaluation(log_ratio), numbers(-1)[None], ceiling=4.0)
    close(bounded, 4)
    bounded.sum().backward()
    assert log_ratio.grad is not None
    close(log_ratio.grad, 0)


def test_the_two_sided_clip_changes_nothing_below_its_ceiling_or_for_good_samples() -> None:
    log_ratio, advantages, _ = drawn(30, 10)
    here = Evaluation(log_ratio)
    assert log_ratio.max() < math.log(4)
    torch.testing.assert_close(clipped(here, advantages, ceiling=4.0), clipped(here, advantages))
    far = Evaluation(log_ratio + 5)
    torch.testing.assert_close(clipped(far, advantages.abs(), ceiling=4.0), clipped(far, advantages.abs()))


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_ratio_that_overflows_is_clipped_without_nan(advantage: float) -> None:
    log_ratio = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = clipped(Evaluation(log_ratio), torch.full((1, 2), advantage))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and log_ratio.grad is not None and (log_ratio.grad == 0).all()


def test_a_narrow_clip_keeps_its_width_in_float32() -> None:
    width = 1e-6
    inside, outside = torch.tensor([[0.9e-6]], requires_grad=True), torch.tensor([[1.1e-6]], requires_grad=True)
    for log_ratio in (inside, outside):
        clipped(Evaluation(log_ratio), torch.ones(1, 1), low=width, high=width).sum().backward()
    assert inside.grad is not None and outside.grad is not None
    assert inside.grad.item() == pytest.approx(-1, abs=1e-5) and outside.grad.item() == 0


def test_reinforce_is_linear_in_the_log_ratio() -> None:
    log_ratio, advantages, _ = drawn(3, 4)
    log_ratio.requires_grad_()
    loss = reinforce(Evaluation(log_ratio), advantages)
    torch.testing.assert_close(loss, -advantages * log_ratio)
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, -advantages)


def test_guard_equals_the_worked_example() -> None:
    def row(value: float) -> Tensor:
        return torch.full((1, 2), value, dtype=F64)

    here = Evaluation(row(-0.00320138), drift=row(1.977073e-05), step_std=row(0.626099), dt=row(0.2))
    close((0.626099 * (here.log_ratio + 1.977073e-05)).exp(), 0.99800998, 0.99800998, tolerance=1e-7)
    advantages = numbers(0.528243, -0.528243)[None]
    close(guarded(here, advantages, scale_by_dt=False), -0.527191, 0.528242, tolerance=1.1e-6)
    close(guarded(here, advantages), -2.635957, 2.641208, tolerance=3e-6)


def test_the_guard_ratio_does_not_depend_on_the_std_of_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    moved, noise = (torch.randn(1, 1000, generator=generator, dtype=F64) for _ in range(2))
    moved = 1e-3 * moved
    losses = []
    for std in (0.1, 0.5, 3.0):
        drift = (moved.square().mean() / (2 * std**2)).reshape(1, 1)
        log_ratio = -drift - (moved * noise).mean() / std
        here = Evaluation(log_ratio, drift=drift, step_std=torch.full((1, 1), std, dtype=F64), dt=torch.ones(1, 1))
        losses.append(guarded(here, torch.ones(1, 1, dtype=F64), low=1.0, high=1.0))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2])
    close(losses[0], -math.exp(-(moved * noise).mean().item()))


def test_the_gradient_through_the_drift_cancels_the_quadratic_part() -> None:
    mean, std, noise = torch.zeros(1, dtype=F64, requires_grad=True), 0.5, 0.7
    moved = -(mean - 0.0)  # mu_old - mu
    drift = (moved**2 / (2 * std**2))[None]
    log_ratio = -drift - (moved * noise / std)[None]
    here = Evaluation(
        log_ratio, drift=drift, step_std=torch.full((1, 1), std, dtype=F64), dt=torch.ones(1, 1, dtype=F64)
    )
    guarded(here, torch.ones(1, 1, dtype=F64)).sum().backward()
    assert mean.grad is not None
    close(mean.grad, -noise)


def test_what_an_objective_needs_is_known_before_training() -> None:
    assert facts(clipped).needs == facts(partial(reinforce)).needs == ()
    guarded_needs = facts(partial(partial(guarded, low=1e-5), high=1e-5)).needs
    assert facts(guarded).needs == guarded_needs == ("drift", "step_std", "dt")
    both = sampler_corrected(objective=top_entropy(objective=guarded))
    assert facts(both) == (("drift", "step_std", "dt", "entropy", "sampler_gap"), "batch", True)
    assert facts(partial(gspo, low=0.1)).couples == facts(sampler_corrected(objective=gspo_token)).couples == "sample"
    assert facts(sampler_corrected(level="sample")).couples == "sample" and facts(clipped).couples == "decision"
    with pytest.raises(
        ValueError,
        match=r"'drift' of every decision; the policy evaluates \['log_ratio'\]; expected a policy of denoising",
    ):
        guarded(Evaluation(torch.zeros(1, 1)), torch.ones(1, 1))


# Ratios of samples, weights without gradient: shared data rho = [[1.5, 1.0, 0.7], [0.5]], A = [1, -1]

SHARED_MASK = torch.tensor([[True, True, True], [True, False, False]])


def shared(**further: Tensor) -> tuple[Evaluation, Tensor]:
    ratio = torch.tensor([[1.5, 1.0, 0.7], [0.5, 7.0, 7.0]], dtype=F64)
    advantages = numbers(1, -1)[:, None].expand(2, 3)
    return masked(Evaluation(ratio.log().requires_grad_(), **further), SHARED_MASK), advantages


def slope(objective: Objective, aggregation: Aggregation = seq_mean, **further: Tensor) -> Tensor:
    here, advantages = shared(**further)
    leaf = here.log_ratio.detach().requires_grad_()
    weighted_sum(objective(replace(here, log_ratio=leaf), advantages), aggregation(SHARED_MASK).double()).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_gspo_equals_the_worked_example() -> None:
    here, advantages = shared()
    loss = gspo(here, advantages)
    close(loss[0], -1.0004, -1.0004, -1.0004)
    close(loss[1, :1], 0.9997)
    close(weighted_sum(loss, seq_mean(SHARED_MASK).double()), -0.00035)
    close(slope(gspo), 0, 0, 0, 0, 0, 0)  # both samples are clipped; the token ratio keeps two tokens
    assert slope(partial(clipped, low=0.2, high=0.2)).ne(0).sum() == 2
    unclipped = gspo(here, advantages, low=9.0, high=9.0)
    close(unclipped[0], -1.016396, -1.016396, -1.016396)
    close(unclipped[1, :1], 0.5)


def test_gspo_token_has_the_value_and_the_gradient_of_gspo() -> None:
    for low, high in ((3e-4, 4e-4), (0.6, 0.6), (0.3, 0.6)):
        here, advantages = shared()
        one, other = (objective(here, advantages, low=low, high=high) for objective in (gspo, gspo_token))
        torch.testing.assert_close(one, other)
        wide = dict(low=low, high=high)
        torch.testing.assert_close(slope(partial(gspo, **wide)), slope(partial(gspo_token, **wide)))


def test_the_ratio_of_a_sample_is_that_of_the_sample_repeated() -> None:
    log_ratio = numbers(0.1, -0.3, 0.05)[None]
    twice = torch.cat([log_ratio, log_ratio], 1)
    once, again = (gspo(Evaluation(value), torch.ones_like(value), low=1.0, high=1.0) for value in (log_ratio, twice))
    torch.testing.assert_close(once[0, 0], again[0, 0])


def test_cispo_keeps_the_gradient_of_a_runaway_ratio_at_its_cap() -> None:
    log_ratio = numbers(math.log(7), math.log(0.5))[None].requires_grad_()
    cispo(Evaluation(log_ratio), numbers(1, 1)[None], cap=5.0).sum().backward()
    assert log_ratio.grad is not None
    close(log_ratio.grad, -5, -0.5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cap": 2.0}, (1.105171, 2, 0.818731)),
        ({"cap": 2.0, "mode": "mask"}, (1.105171, 0, 0.818731)),
        ({"cap": 2.0, "floor": 0.9, "mode": "mask"}, (1.105171, 0, 0)),
        ({"cap": 2.0, "level": "sample", "mode": "mask"}, (0, 0, 0)),
        ({"cap": 3.0, "level": "sample", "mode": "mask"}, (2.013753, 2.013753, 2.013753)),
        ({"cap": 2.0, "level": "sample"}, (2, 2, 2)),
    ],
)
def test_the_weight_of_a_sampler_with_other_kernels_equals_the_worked_example(options, expected) -> None:
    gap = torch.tensor([[0.1, 0.8, -0.2]], dtype=F64)
    here = Evaluation(torch.zeros(1, 3, dtype=F64), sampler_gap=gap)
    loss = sampler_corrected(objective=clipped, **options)(here, -torch.ones(1, 3, dtype=F64))
    close(loss, *expected)


@pytest.mark.parametrize(("share", "kept"), [(0.5, [[0, 1, 0], [1, 0, 0]]), (0.2, [[0, 0, 0], [1, 0, 0]])])
def test_the_decisions_of_highest_entropy_equal_the_worked_example(share, kept) -> None:
    entropy = torch.tensor([[0.1, 0.9, 0.5], [2.0, 9.0, 9.0]], dtype=F64)  # the 9s are padding
    here, advantages = shared(entropy=entropy)
    plain, chosen = clipped(here, advantages), top_entropy(objective=clipped, share=share)(here, advantages)
    torch.testing.assert_close(chosen, plain * torch.tensor(kept))
    assert slope(top_entropy(objective=clipped, share=0.0), entropy=entropy).count_nonzero() <= 1


def test_the_clip_width_is_read_from_the_objective_as_a_recipe_builds_it() -> None:
    assert narrowest(partial(clipped, low=0.1)) == (0.1, decision) and narrowest(gspo) == (3e-4, sample_mean)
    assert narrowest(sampler_corrected(objective=partial(clipped, low=0.3, high=0.28))) == (0.28, decision)
    assert narrowest(dhpo) == (3e-4, sample_mean) and narrowest(rec_ring) == (0.2, decision)
    assert narrowest(top_entropy(objective=rloo)) == (0.2, sample_sum)
    assert narrowest(reinforce) is narrowest(cispo) is narrowest(opmd) is None


def test_mistaken_options_of_weights_are_refused() -> None:
    for options in ({"cap": 0.5}, {"floor": 1.5}, {"floor": 0.0}):
        with pytest.raises(ValueError, match="cap and floor are"):
            sampler_corrected(objective=clipped, **options)
    with pytest.raises(ValueError, match="share is 1.5"):
        top_entropy(objective=clipped, share=1.5)
    with pytest.raises(ValueError, match="cap is 0"):
        cispo(Evaluation(torch.zeros(1, 1)), torch.ones(1, 1), cap=0.0)


def test_mistaken_options_are_refused() -> None:
    here, advantages = Evaluation(torch.zeros(1, 1)), torch.ones(1, 1)
    with pytest.raises(ValueError, match="ceiling is 1.1; expected more than 1 \\+ high = 1.2"):
        clipped(here, advantages, ceiling=1.1)
    with pytest.raises(ValueError, match="low and high are 0 and 0.2"):
        clipped(here, advantages, low=0)
    with pytest.raises(ValueError, match="length is 0"):
        constant(torch.ones(1, 1, dtype=torch.bool), length=0)


# Aggregation

RATIOS = numbers(1.5, 1.0, 0.7, 0.5, 1.0, 1.0).reshape(2, 3)
MASK = torch.tensor([[True, True, True], [True, False, False]])
SIGNS = numbers(1, 1, 1, -1, -1, -1).reshape(2, 3)


@pytest.mark.parametrize(
    ("aggregation", "high", "expected"),
    [
        (seq_mean, 0.2, -0.083333),
        (token_mean, 0.2, -0.525),
        (partial(constant, length=3), 0.2, -0.35),
        (partial(constant, length=8), 0.2, -0.13125),
        (seq_mean, 0.28, -0.096667),
        (token_mean, 0.28, -0.545),
        (partial(constant, length=8), 0.28, -0.13625),
    ],
)
def test_aggregations_equal_the_worked_example(aggregation: Aggregation, high: float, expected: float) -> None:
    loss = clipped(Evaluation(RATIOS.log()), SIGNS, high=high)
    close(loss[MASK], *([-1 - high, -1.0, -0.7, 0.8]))
    close(weighted_sum(loss, aggregation(MASK)), expected)


def test_means_agree_when_all_lengths_are_equal() -> None:
    loss, mask = drawn(4, 6)[0], torch.ones(4, 6, dtype=torch.bool)
    sums = [weighted_sum(loss, aggregation(mask)) for aggregation in AGGREGATIONS.values()]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sums[1], sums[2], rtol=1e-6, atol=1e-9)


@each_aggregation
def test_a_half_masked_batch_has_the_loss_of_the_kept_half(aggregation: Aggregation) -> None:
    loss, _, mask = drawn(6, 6)
    keep = torch.tensor([True, False, True, False, True, False])
    torch.testing.assert_close(
        weighted_sum(loss, aggregation(mask, keep=keep)), weighted_sum(loss[keep], aggregation(mask[keep]))
    )


def test_a_kept_sample_without_a_trained_decision_stays_in_the_denominator() -> None:
    loss = torch.ones(2, 3, dtype=F64)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    keep = torch.tensor([True, False])
    assert weighted_sum(loss, seq_mean(mask)) == 0.5
    assert weighted_sum(loss, seq_mean(mask, keep=keep)) == 1
    assert denominator(seq_mean, mask) == 2 and denominator(seq_mean, mask, keep) == 1
    assert denominator(token_mean, mask) == denominator(partial(token_mean), mask, keep) == 2


@each_aggregation
def test_nothing_trained_gives_a_loss_of_zero(aggregation: Aggregation) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for keep in (None, torch.zeros(2, dtype=torch.bool)):
        assert weighted_sum(torch.ones(2, 3), aggregation(mask, keep=keep)) == 0


def test_the_sum_alone_keeps_garbage_losses_out() -> None:
    per_decision = torch.tensor([[1.0, math.nan], [math.inf, 2.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    loss = weighted_sum(per_decision, weights)
    loss.backward()
    assert loss == 1 and per_decision.grad is not None and torch.equal(per_decision.grad, weights)


def test_a_trained_decision_that_is_nan_is_not_hidden() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    here = masked(Evaluation(torch.tensor([[0.0, math.nan]])), mask)
    for objective in (clipped, reinforce):
        assert weighted_sum(objective(here, torch.ones(1, 2)), token_mean(mask)).isnan()


# KL estimates

P, Q, BEHAVIOUR = numbers(0.5, 0.3, 0.2), numbers(0.4, 0.4, 0.2), numbers(0.2, 0.5, 0.3)


def test_kl_estimates_equal_the_worked_example() -> None:
    d = (P / Q).log()
    close((P * d).sum(), 0.025267)
    for estimate, expected in ((k1, 0.025267), (k2, 0.024862), (k3, 0.025267)):
        close((P * estimate(d)).sum(), expected)
    close((BEHAVIOUR * k3(d)).sum(), 0.027454)
    close((BEHAVIOUR * (P / BEHAVIOUR) * k3(d)).sum(), 0.025267)
    for estimate, expected in ((k1, 0.3), (k2, 0.045), (k3, 0.040818)):
        close(estimate(numbers(0.3)), expected)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (k1, (0, 0, 0)),
        (k2, (-0.017085, -0.135407, 0.152491)),
        (k3, (0.012327, -0.149911, 0.137585)),
    ],
)
def test_on_policy_gradients_of_kl_estimates(estimate: Callable[[Tensor], Tensor], expected: tuple[float, ...]) -> None:
    logits = numbers(0.3, -0.2, 0.1).requires_grad_()
    log_p = logits.log_softmax(0)
    (log_p.exp().detach() * estimate(log_p - Q.log())).sum().backward()
    assert logits.grad is not None
    close(logits.grad, *expected)


def test_the_gradients_are_those_of_the_two_directions_of_the_kl() -> None:
    for estimate, forward in ((k2, True), (k3, False)):
        sampled, exact = (numbers(0.3, -0.2, 0.1).requires_grad_() for _ in range(2))
        log_p = sampled.log_softmax(0)
        (log_p.exp().detach() * estimate(log_p - Q.log())).sum().backward()
        log_p = exact.log_softmax(0)
        ((log_p.exp() * (log_p - Q.log())) if forward else (Q * (Q.log() - log_p))).sum().backward()
        torch.testing.assert_close(sampled.grad, exact.grad)


def test_kl_estimates_are_zero_and_flat_at_equality_and_bounded_far_away() -> None:
    d = torch.linspace(-30, 30, 601, dtype=F64)
    assert (k2(d) >= 0).all() and (k3(d) >= 0).all()
    here = torch.zeros(1, dtype=F64, requires_grad=True)
    (k2(here) + k3(here)).sum().backward()
    assert k2(here) == k3(here) == 0 and here.grad is not None and here.grad == 0
    assert k3(numbers(-1e6)) == k3(numbers(-10)) and torch.isfinite(k3(torch.tensor([-1e6, 1e6]))).all()
    small = numbers(1e-3)
    torch.testing.assert_close(k2(small), k3(small), rtol=1e-3, atol=0)


def test_the_unbiased_k3_has_value_and_gradient_of_the_kl_off_policy() -> None:
    logits, exact = (numbers(0.3, -0.2, 0.1).requires_grad_() for _ in range(2))
    log_p = logits.log_softmax(0)
    here = Evaluation((log_p - BEHAVIOUR.log())[None], to_reference=(log_p - Q.log())[None])
    value = (BEHAVIOUR * DISTANCES["k3_unbiased"](here)).sum()
    value.backward()
    log_p = exact.log_softmax(0)
    expected = (log_p.exp() * (log_p - Q.log())).sum()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(logits.grad, exact.grad)


def test_every_kind_of_kl_says_what_it_lacks() -> None:
    full = Evaluation(*(numbers(0.3)[None] for _ in range(3)), dt=numbers(0.2)[None])
    assert full.kl is not None
    close(DISTANCES["exact"](full), 0.3)
    close(DISTANCES["flow_grpo"](full), 0.06)
    bare = Evaluation(numbers(0.3)[None])
    for name, kind in DISTANCES.items():
        with pytest.raises(ValueError, match="loss.kl"):
            kind(bare)
        assert torch.isfinite(kind(replace(full, to_reference=numbers(0.3)[None]))).all(), name


def test_float32_k3_keeps_its_digits_at_small_differences() -> None:
    d = torch.tensor([1e-3, 1e-4, -1e-3])
    torch.testing.assert_close(k3(d).double(), k3(d.double()), rtol=2e-3, atol=0)


def test_flow_grpo_kl_equals_the_worked_example() -> None:
    close(flow_grpo_kl(numbers(1.977073e-05), numbers(0.2)), 3.954145e-06, tolerance=1e-11)
    with pytest.raises(ValueError, match="dt has shape"):
        flow_grpo_kl(torch.zeros(2, 1), torch.zeros(2))
