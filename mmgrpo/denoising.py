"""Losses and weights of denoising steps, from what only a Gaussian decision can tell: its divergence and its width.

GRPO-Guard, which also needs them, is `mmgrpo.objectives:guarded`. Axes: B samples, S decisions.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from mmgrpo.facts import Component, Facts
from mmgrpo.objectives import Objective, clipped
from mmgrpo.ratios import required, trained
from mmgrpo.types import Evaluation, same_shape
from mmgrpo.weighting import Weighted


def divergence_bound(
    evaluation: Evaluation, advantages: Tensor, *, limit: float = 1e-5, by_variance: bool = True
) -> Tensor:
    """Flow-DPPO (arXiv 2606.11025, eq. 14, 18): -ratio * A, but 0 where a step that moved on goes further; -> (B, S).

    A step has moved on where its `drift`, the exact KL from the policy that sampled, is at least `limit`; it goes further where
    its ratio has left 1 to the side that A pulls to. Without `by_variance` the drift is taken times step_std^2. The paper's
    KL is a sum over elements; the limit of the authors' code, 1e-5, is for its mean. No clip; dropped steps stay in the
    denominators. Tokens beside steps have no drift and are never dropped: `mmgrpo.weighting:by_kind` gives them a clip.
    """
    if limit <= 0:
        raise ValueError(f"limit is {limit}; expected a positive divergence, nats in the reduction of the log-ratio")
    drift, std = (required(evaluation, name) for name in FACTS[divergence_bound].needs)
    same_shape(log_ratio=evaluation.log_ratio, drift=drift, step_std=std, advantages=advantages)
    moved = drift if by_variance else drift * std.square()
    dropped = (moved >= limit) & (evaluation.log_ratio * advantages > 0)
    ratio = torch.where(dropped, 0, evaluation.log_ratio).exp()  # one that overflows leaves no NaN behind
    return torch.where(dropped, 0, -advantages * ratio)


def noise_weighted(*, objective: Objective = clipped, scale: float | None = None) -> Weighted:
    """An objective in which noisy, early steps weigh more (TempFlow-GRPO, arXiv 2508.04324, eq. 8).

    The weight is step_std over its mean in the sample, or times `scale` if it is given. PARTIAL: the source divides by the mean
    over the whole schedule, an evaluation holds the trained steps. Under a plan that moves give 1 over the mean of the schedule
    as `scale`, and under routes that branch, where a sample has one trained step and would weigh 1: 2.371 for 10 steps of
    shift 3 at a noise of 0.7. A public port has 2.25, not confirmed. A decision that is no step weighs 0.
    """
    if scale is not None and scale <= 0:
        raise ValueError(f"scale is {scale}; expected a positive factor of step_std, or none")
    return Weighted(objective, relative_noise if scale is None else partial(scaled_noise, scale=scale))


def relative_noise(evaluation: Evaluation, advantages: Tensor) -> Tensor:
    """step_std over its mean in the sample's trained steps; (B, S), of mean 1 there."""
    std = required(evaluation, "step_std")
    steps = trained(evaluation) & (std > 0)  # tokens have 0
    total = torch.where(steps, std, 0).sum(1, keepdim=True)
    return std * steps.sum(1, keepdim=True) / torch.where(total > 0, total, 1)


def scaled_noise(evaluation: Evaluation, advantages: Tensor, *, scale: float) -> Tensor:
    """scale * step_std; (B, S)."""
    return scale * required(evaluation, "step_std")


FACTS: Mapping[Component, Facts] = {
    divergence_bound: Facts(("drift", "step_std")),
    relative_noise: Facts(("step_std",), "sample"),
    scaled_noise: Facts(("step_std",)),
}
