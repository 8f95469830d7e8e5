"""Losses of single decisions, the weights that add them up, and estimates of the KL to a reference.

An objective is (evaluation, advantages (B, S), *, options) -> (B, S) losses. An aggregation is (mask (B, S), *, options) ->
(B, S) weights. The loss of an update is

    weighted_sum(objective(masked(evaluation, mask), advantages), aggregation(mask, keep=keep, total=total))

where `total` is the denominator of the whole update, the sum of `denominator(aggregation, mask, keep)` over its micro-batches
and ranks, so that parts add up to one large batch. Untrained decisions may hold anything: `masked` empties them before a loss
sees them and `weighted_sum` selects, so neither the value nor the gradient can meet them.
The ratio is exp(log_ratio); on the first update after a rollout it is 1 and the gradient -advantage * grad log pi.
Clip widths are for the reduction of the log-ratio at hand: about 0.2 for tokens, 1e-6 to 1e-3 for means over latents.
Axes: B samples, S decisions.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mmgrpo.types import Evaluation, require_shape, same_shape

Objective = Callable[[Evaluation, Tensor], Tensor]
Aggregation = Callable[..., Tensor]


def masked(evaluation: Evaluation, mask: Tensor) -> Evaluation:
    """The evaluation with 0 in the decisions that are not trained, without gradient to them; mask (B, S) bool."""
    same_shape(mask=mask, **evaluation.tensors())
    return Evaluation(**{name: torch.where(mask, value, 0) for name, value in evaluation.tensors().items()})


# Objectives


def clipped(
    evaluation: Evaluation, advantages: Tensor, *, low: float = 0.2, high: float = 0.2, ceiling: float | None = None
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), PPO's clip as in GRPO (arXiv 2402.03300, eq. 3); -> (B, S).

    high > low is DAPO's clip-higher (arXiv 2503.14476). `ceiling` > 1 + high also bounds the ratio where A < 0 (two-sided
    clip, INTELLECT-2, arXiv 2505.07291).
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    return _clipped(evaluation.log_ratio, advantages, low, high, ceiling)


def reinforce(evaluation: Evaluation, advantages: Tensor) -> Tensor:
    """-A * log_ratio, whose gradient is -A grad log pi at any ratio; -> (B, S)."""
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    return -advantages * evaluation.log_ratio


def guarded(
    evaluation: Evaluation, advantages: Tensor, *, low: float = 2e-6, high: float = 2e-6, scale_by_dt: bool = True
) -> Tensor:
    """GRPO-Guard (arXiv 2510.22319): clip the ratio without its bias and step-dependent scale; needs Gaussian steps; -> (B, S).

    log ratio' = step_std * (log_ratio + drift), linear in the move of the mean. `scale_by_dt` divides the loss by the length
    of the step, as the paper and the authors' code do. All reductions over event dimensions are means.
    """
    drift, std, dt = (_required(evaluation, name) for name in NEEDS[guarded])
    same_shape(log_ratio=evaluation.log_ratio, drift=drift, step_std=std, dt=dt, advantages=advantages)
    loss = _clipped(std * (evaluation.log_ratio + drift), advantages, low, high, None)
    return loss / torch.where(dt > 0, dt, 1) if scale_by_dt else loss


NEEDS: Mapping[Callable[..., Tensor], tuple[str, ...]] = {guarded: ("drift", "step_std", "dt")}


def needs(objective: Objective) -> tuple[str, ...]:
    """The fields of `Evaluation` beyond log_ratio without which the objective cannot be computed."""
    return NEEDS.get(_unbound(objective), ())


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float, ceiling: float | None) -> Tensor:
    """PPO's clip in log space, where a width of 1e-6 keeps its digits in float32 and no exponential overflows when A >= 0."""
    if low <= 0 or high <= 0:
        raise ValueError(f"low and high are {low} and {high}; expected positive clip widths")
    if ceiling is not None and ceiling <= 1 + high:
        raise ValueError(f"ceiling is {ceiling}; expected more than 1 + high = {1 + high}")
    floor = math.log1p(-low) if low < 1 else -math.inf
    raised = log_ratio.clamp(max=math.log1p(high))  # A >= 0 gains nothing above
    lowered = log_ratio.clamp(min=floor, max=None if ceiling is None else math.log(ceiling))  # nor A < 0 below
    return -advantages * torch.where(advantages >= 0, raised, lowered).exp()


def _required(evaluation: Evaluation, name: str) -> Tensor:
    fields = evaluation.tensors()
    if name not in fields:
        raise ValueError(f"the objective needs {name!r} of every decision; the policy evaluates {sorted(fields)}")
    return fields[name]


# Aggregations: weights such that the loss is the sum of weight * loss of a decision


def seq_mean(mask: Tensor, *, keep: Tensor | None = None, total: Tensor | float | None = None) -> Tensor:
    """Mean over a sample's trained decisions, then over samples (GRPO); `total` counts samples.

    A sample that is not kept leaves the denominator; a kept one without a trained decision adds 0 and stays in it.
    """
    counted = _counted(mask, keep)
    return counted / counted.sum(1, keepdim=True).clamp(min=1) / _at_least_one(seq_mean, mask, keep, total)


def token_mean(mask: Tensor, *, keep: Tensor | None = None, total: Tensor | float | None = None) -> Tensor:
    """Mean over all trained decisions of kept samples (DAPO, arXiv 2503.14476); `total` counts decisions."""
    return _counted(mask, keep) / _at_least_one(token_mean, mask, keep, total)


def constant(mask: Tensor, *, length: int, keep: Tensor | None = None, total: Tensor | float | None = None) -> Tensor:
    """Sum over decisions / (length * samples), length the longest allowed (Dr. GRPO, arXiv 2503.20783); `total` counts samples."""
    if length < 1:
        raise ValueError(f"length is {length}; expected the largest number of decisions of a sample, from 1")
    return _counted(mask, keep) / (length * _at_least_one(constant, mask, keep, total))


def denominator(aggregation: Aggregation, mask: Tensor, keep: Tensor | None = None) -> Tensor:
    """What a part of an update adds to `total`: its trained decisions for token_mean, else its kept samples; -> () int64."""
    if _unbound(aggregation) is token_mean:
        return _counted(mask, keep).sum().long()
    return torch.tensor(len(mask), device=mask.device) if keep is None else keep.sum()


def weighted_sum(per_decision: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight * loss over the decisions whose weight is not 0; (B, S), (B, S) -> ()."""
    same_shape(per_decision=per_decision, weights=weights)
    return (torch.where(weights != 0, per_decision, 0) * weights).sum()


def _counted(mask: Tensor, keep: Tensor | None) -> Tensor:
    """1 where a decision counts, (B, S) float32."""
    require_shape("mask", mask, None, None)
    if keep is None:
        return mask.float()
    require_shape("keep", keep, len(mask))
    return (mask & keep[:, None]).float()


def _at_least_one(aggregation: Aggregation, mask: Tensor, keep: Tensor | None, total: Tensor | float | None) -> Tensor:
    count = denominator(aggregation, mask, keep) if total is None else total
    return torch.as_tensor(count, dtype=torch.float32, device=mask.device).clamp(min=1)


def _unbound(component: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function under the options bound with functools.partial."""
    return _unbound(component.func) if isinstance(component, partial) else component


# KL to a reference, per decision; in closed form for Gaussian steps (transitions.kl), estimated where only samples exist


def k1(log_ratio: Tensor) -> Tensor:
    """log pi - log pi_ref of a sample of pi: unbiased, any sign; its gradient as a loss is 0 on average: for rewards only."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the square of log pi - log pi_ref: biased, but on samples of pi its gradient is that of KL(pi || ref)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-d) - 1 + d with d = log pi - log pi_ref: unbiased, never negative; its gradient is that of KL(ref || pi).

    d is limited to [-10, 10], beyond which the estimate is constant. Schulman, "Approximating KL Divergence" (2020).
    """
    d = log_ratio.clamp(-10, 10)
    return torch.expm1(-d) + d


def flow_grpo_kl(kl: Tensor, dt: Tensor) -> Tensor:
    """KL of a Gaussian step times its length: the scale in which Flow-GRPO's beta of 0.04 and 0.01 are published; (B, S).

    The paper (arXiv 2505.05470) has the closed form; the authors' code divides by 2 g^2 instead of 2 g^2 dt.
    """
    same_shape(kl=kl, dt=dt)
    return kl * dt
