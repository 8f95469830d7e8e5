"""What holds of every objective: one table of properties, on decisions of samples of unequal length."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from every_objective import (
    AGGREGATIONS,
    BY_REWARD,
    COUNTED,
    F64,
    NOT_LINEAR,
    OBJECTIVES,
    PULLED,
    drawn,
    evaluation,
    moving,
    outputs,
)
from torch import Tensor

from mmgrpo.aggregations import Aggregation, denominator, seq_mean, weighted_sum
from mmgrpo.facts import facts
from mmgrpo.objectives import Objective, by_entropy
from mmgrpo.ratios import masked
from mmgrpo.types import Evaluation

each_name = pytest.mark.parametrize("name", OBJECTIVES)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS.values(), ids=AGGREGATIONS.keys())


def mixed(share: Tensor) -> Tensor:
    """What a decision's own ratio and its sample's mean add to its pull, (B, S)."""
    return share + (1 - share).mean(1, keepdim=True)


def towards_target(here: Evaluation, by_distance: bool) -> Tensor:
    """d mean_d (output - target)^2 / d log_ratio, also in the space of clean samples over the mean distance there; (B, S)."""
    assert here.prediction is not None and here.target is not None and here.clean_scale is not None
    away = here.prediction - here.target
    slope = (2 * away * outputs(torch.ones_like(here.log_ratio), 0.5, -1)).mean(2)
    return (here.clean_scale * slope / away.abs().mean(2) if by_distance else slope).detach()


def preferred(here: Evaluation, advantages: Tensor, name: str = "reference_error") -> Tensor:
    """sigmoid of 100 / 3 times the sum of A * (error - other error) over the three samples of a group; (B, S)."""
    assert here.error is not None
    gained = advantages * (here.error - here.tensors()[name]).detach()
    return (100 / 3 * gained.unflatten(0, (-1, 3)).sum(1)).sigmoid().repeat_interleave(3, 0)


ON_POLICY: dict[str, Callable[[Evaluation, Tensor], Tensor]] = {  # d loss / d log_ratio where it is another than -A
    "guarded": lambda here, advantages: -advantages * here.step_std / here.dt,
    "guarded, not by dt": lambda here, advantages: -advantages * here.step_std,
    "noise weighted": lambda here, advantages: -advantages * here.step_std / here.step_std.mean(1, keepdim=True),
    "noise scaled": lambda here, advantages: -2.25 * advantages * here.step_std,
    "dhpo guided": lambda here, advantages: -advantages * mixed(by_entropy(here)),
    "rloo": lambda here, advantages: -advantages * advantages.shape[1],  # times decisions, for `seq_mean` to divide by
    "opmd": lambda here, advantages: -advantages / 2,
    "asymre": lambda here, advantages: -advantages - 0.1,
    "nft": lambda here, advantages: advantages * towards_target(here, by_distance=True),
    "nft, weak": lambda here, advantages: advantages * towards_target(here, by_distance=True),
    "nft, plain": lambda here, advantages: advantages / 5 * towards_target(here, by_distance=False),
    "advantage weighted by time": lambda here, advantages: -advantages * here.clean_scale,
    "dgpo": lambda here, advantages: -advantages * preferred(here, advantages),
    "dgpo, exact": lambda here, advantages: -advantages * 100 * preferred(here, advantages),
    "dgpo against the old": lambda here, advantages: -advantages * preferred(here, advantages, "old_error"),
    "awm tuned": lambda here, advantages: -advantages * here.clean_scale * (here.old_error + 1e-10) ** -0.75,
    "red weight": lambda here, advantages: -advantages * advantages.exp(),
}


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in {*BY_REWARD, "regressed"}])
def test_on_policy_the_gradient_is_minus_the_advantage(name: str) -> None:
    log_ratio, advantages, _ = drawn(6, 5)
    here = evaluation(torch.zeros_like(log_ratio).requires_grad_())
    here = replace(here, drift=torch.zeros_like(log_ratio))
    OBJECTIVES[name](here, advantages).sum().backward()
    expected = ON_POLICY.get(name, lambda _, advantages: -advantages)(here, advantages)
    torch.testing.assert_close(here.log_ratio.grad, expected)


def pulls(name: str, log_ratio: Tensor, advantages: Tensor, mask: Tensor, steps: int = 0) -> tuple[Tensor, Tensor]:
    """The losses of trained decisions and the gradient of their mean over samples; `steps` untrained ones are added."""
    more = torch.nn.functional.pad
    leaf = more(log_ratio, (0, steps), value=0.4).requires_grad_()
    wide = more(advantages, (0, steps), value=3.0)
    there = more(mask, (0, steps))
    full = evaluation(log_ratio).tensors()
    kept = {field: more(value, (*(0, 0) * (value.dim() - 2), 0, steps)) for field, value in full.items()}
    kept |= moving(leaf, kept["entropy"])
    losses = OBJECTIVES[name](masked(Evaluation(**kept), there), wide)
    weighted_sum(losses, seq_mean(there).double()).backward()
    assert leaf.grad is not None
    return losses[there], leaf.grad[:, : mask.shape[1]]


@each_name
def test_untrained_decisions_behind_the_end_of_a_sample_change_nothing(name: str) -> None:
    log_ratio, advantages, mask = drawn(6, 5)
    for found, expected in zip(
        pulls(name, log_ratio, advantages, mask, 3), pulls(name, log_ratio, advantages, mask), strict=True
    ):
        torch.testing.assert_close(found, expected)


@each_name
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    log_ratio, advantages, mask = drawn(6, 5)
    order, full = torch.tensor([4, 0, 5, 2, 1, 3]), evaluation(log_ratio)
    losses = OBJECTIVES[name](masked(full, mask), advantages)
    shuffled = OBJECTIVES[name](masked(full, mask).take(order), advantages[order])
    torch.testing.assert_close(shuffled[mask[order]], losses[order][mask[order]])


@each_name
def test_losses_grow_with_the_advantages_and_only_what_says_so_pulls_without(name: str) -> None:
    log_ratio, advantages, mask = drawn(6, 5)
    still = pulls(name, log_ratio, torch.zeros_like(advantages), mask)[1]
    assert bool(still.ne(0).any()) == (name in PULLED)
    assert facts(OBJECTIVES[name]).every == (name in PULLED | COUNTED)
    once, twice = (pulls(name, log_ratio, scale * advantages, mask)[1] for scale in (1, 2))
    same = torch.allclose(twice, 2 * once)
    assert same == (name not in NOT_LINEAR)
    assert torch.allclose(twice, once) == (name in BY_REWARD)


@each_name
def test_what_an_objective_needs_it_says_and_nothing_else(name: str) -> None:
    log_ratio, advantages, _ = drawn(6, 5)
    full, wanted = evaluation(log_ratio), facts(OBJECTIVES[name]).needs
    bare = Evaluation(log_ratio, **{need: full.tensors()[need] for need in wanted})
    torch.testing.assert_close(OBJECTIVES[name](bare, advantages), OBJECTIVES[name](full, advantages))
    for need in wanted:
        with pytest.raises(ValueError, match=f"the objective needs '{need}' of every decision"):
            OBJECTIVES[name](replace(bare, **{need: None}), advantages)


@each_name
def test_what_an_objective_couples_it_says(name: str) -> None:
    """Changing one decision changes the pulls on others of its sample, or of other samples, only if it is said."""
    generator = torch.Generator().manual_seed(1)
    log_ratio = 1e-4 * torch.rand(6, 4, generator=generator, dtype=F64)  # no gate is closed
    advantages = torch.randn(6, 1, generator=generator, dtype=F64).expand(6, 4)
    mask, changed = torch.ones(6, 4, dtype=torch.bool), log_ratio.clone()
    changed[1, 1] += 0.1
    before, after = (pulls(name, value, advantages, mask)[1] for value in (log_ratio, changed))
    moved = ~torch.isclose(before, after, rtol=1e-9, atol=1e-12)
    couples = facts(OBJECTIVES[name]).couples
    assert couples != "decision" or moved.sum() <= 1
    assert couples != "sample" or not moved[[0, 2, 3, 4, 5]].any()


@each_objective
def test_objectives_refuse_advantages_of_another_shape(objective: Objective) -> None:
    with pytest.raises(ValueError, match="advantages has shape"):
        objective(evaluation(torch.zeros(3, 2, dtype=F64)), torch.ones(3, 1))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if facts(OBJECTIVES[name]).couples != "batch"])
@each_aggregation
@pytest.mark.parametrize("parts", [[3, 3], [1, 2, 3], [1] * 6])
def test_parts_with_the_shared_denominator_add_up_to_the_whole(
    name: str, aggregation: Aggregation, parts: list[int]
) -> None:
    objective = OBJECTIVES[name]
    log_ratio, advantages, mask = drawn(6, 6)
    keep = torch.tensor([True, True, False, True, True, True])
    whole, split = log_ratio.clone().requires_grad_(), log_ratio.clone().requires_grad_()
    loss = weighted_sum(objective(evaluation(whole), advantages), aggregation(mask, keep=keep))
    loss.backward()
    rows = [slice(sum(parts[:i]), sum(parts[: i + 1])) for i in range(len(parts))]
    total = torch.stack([denominator(aggregation, mask[row], keep[row]) for row in rows]).sum()
    full, losses = evaluation(split), []
    for row in rows:
        part = Evaluation(**{name: value[row] for name, value in full.tensors().items()})
        losses.append(
            weighted_sum(objective(part, advantages[row]), aggregation(mask[row], keep=keep[row], total=total))
        )
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(torch.stack(losses).sum(), loss)
    torch.testing.assert_close(split.grad, whole.grad)


@each_objective
@each_aggregation
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_in_untrained_decisions_reaches_neither_value_nor_gradient(
    objective: Objective, aggregation: Aggregation, garbage: float
) -> None:
    log_ratio, advantages, mask = drawn(6, 6)

    def run(fill: float) -> tuple[Tensor, Tensor]:
        leaf = torch.where(mask, log_ratio, fill).requires_grad_()
        full = evaluation(leaf).tensors()
        spoilt = {
            name: torch.where(mask.unsqueeze(2) if value.dim() == 3 else mask, value, fill)
            for name, value in full.items()
            if value.is_floating_point()
        }
        here = masked(Evaluation(**{**full, **spoilt}), mask)
        assert all((value[~mask] == 0).all() for value in here.tensors().values())
        loss = weighted_sum(objective(here, advantages), aggregation(mask))
        loss.backward()
        assert leaf.grad is not None
        return loss, leaf.grad

    (loss, gradient), (expected, expected_gradient) = run(garbage), run(0.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any() and torch.isfinite(loss)
