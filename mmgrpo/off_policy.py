"""REINFORCE on stale data: the family of "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm" (arXiv 2509.24203).

A rule about which decisions are kept, a weight of the advantage, a pull to the policy that sampled: each without an
importance ratio in the gradient. RED-Drop and the baselines of OPMD and AsymRE are advantages. The family is published with
`token_mean`, over a whole sample's ratio with `seq_mean`. log_ratio stands for log pi. Axes: B samples, S decisions.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mmgrpo.facts import Component, Facts
from mmgrpo.objectives import log_widths
from mmgrpo.ratios import Level, decision, sample_mean
from mmgrpo.types import Evaluation, same_shape
from mmgrpo.weighting import Weight

Pull = Callable[[Evaluation], Tensor]  # -> (B, S)
STEEPEST = 20.0  # exponent of an advantage's weight


# Which decisions are kept: (B, S) of 0 and 1


def everything(evaluation: Evaluation, advantages: Tensor) -> Tensor:
    """All: plain REINFORCE."""
    return torch.ones_like(advantages)


def one_side(
    evaluation: Evaluation, advantages: Tensor, *, level: Level = decision, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """Those that PPO's clip would pull on; A = 0 counts as both signs."""
    log_ratio, (floor, roof) = level(evaluation), log_widths(low, high)
    good, bad = (advantages >= 0) & (log_ratio <= roof), (advantages <= 0) & (log_ratio >= floor)
    return (good | bad).to(advantages.dtype)


def two_side(
    evaluation: Evaluation, advantages: Tensor, *, level: Level = decision, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """Those whose ratio is within [1 - low, 1 + high], whatever the advantage."""
    log_ratio, (floor, roof) = level(evaluation), log_widths(low, high)
    return ((log_ratio >= floor) & (log_ratio <= roof)).to(advantages.dtype)


def ring(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    level: Level = decision,
    low: float = 0.2,
    high: float = 0.2,
    outer_low: float = 0.6,
    outer_high: float = 2.0,
) -> Tensor:
    """`two_side`, and those far on the wrong side: A >= 0 with a ratio up to 1 - outer_low, A <= 0 with one from 1 + outer_high."""
    log_ratio, (floor, roof) = level(evaluation), log_widths(outer_low, outer_high)
    wrong = ((advantages >= 0) & (log_ratio <= floor)) | ((advantages <= 0) & (log_ratio >= roof))
    return torch.where(wrong, 1, two_side(evaluation, advantages, level=level, low=low, high=high))


# Weights of the advantage, (B, S)


def importance(
    evaluation: Evaluation, advantages: Tensor, *, level: Level = decision, floor: float = 0.0, cap: float | None = None
) -> Tensor:
    """The ratio, of a decision or of a sample, limited to [floor, cap]."""
    return level(evaluation).exp().clamp(floor, cap)


def exponential(evaluation: Evaluation, advantages: Tensor, *, temperature: float = 1.0) -> Tensor:
    """exp(A / temperature), its exponent at most 20 (RED-Weight)."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number, in units of the advantage")
    return (advantages / temperature).clamp(max=STEEPEST).exp()


def damped(evaluation: Evaluation, advantages: Tensor, *, temperature: float = 1.0) -> Tensor:
    """1 / (1 + temperature) everywhere (OPMD)."""
    return torch.full_like(advantages, 1 / (1 + temperature))


# Pulls to the policy that sampled, on every decision


def squared(evaluation: Evaluation, *, strength: float = 0.1) -> Tensor:
    """strength * log_ratio^2; twice the estimate k2, as the authors write it."""
    return strength * evaluation.log_ratio.square()


def likelihood(evaluation: Evaluation, *, strength: float = 0.1) -> Tensor:
    """-strength * log pi: the forward KL. The same as an advantage larger by `strength` where nothing else is weighed."""
    return -strength * evaluation.log_ratio


def rec(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    keep: Weight = one_side,
    weight: Weight | None = None,
    pull: Pull | None = None,
) -> Tensor:
    """-A * weight * log pi of the decisions that are kept, + pull; keep and weight carry no gradient; -> (B, S)."""
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    factor = keep(evaluation, advantages)
    if weight is not None:
        factor = factor * torch.where(
            factor > 0, weight(evaluation, advantages), 0
        )  # a ratio that overflows is not kept
    loss = -advantages * factor.detach() * evaluation.log_ratio
    return loss if pull is None else loss + pull(evaluation)


rec_one_side = partial(rec, keep=one_side)
rec_one_side_is = partial(rec, keep=one_side, weight=importance)  # the gradient of `clipped`
rec_two_side = partial(rec, keep=two_side)
rec_two_side_is = partial(rec, keep=two_side, weight=importance)
rec_ring = partial(rec, keep=ring)
rec_sample = partial(rec, keep=partial(one_side, level=sample_mean))  # one-side over GSPO's ratio; `seq_mean`
opmd = partial(rec, keep=everything, weight=damped)
opmd_kimi = partial(rec, keep=everything, pull=squared)
asymre = partial(rec, keep=everything, pull=likelihood)  # its shifted baseline as a loss; advantage: centered
red_weight = partial(rec, keep=everything, weight=exponential)


FACTS: Mapping[Component, Facts] = {squared: Facts(every=True), likelihood: Facts(every=True)}
