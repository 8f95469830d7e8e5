"""Weights that add the losses of decisions up: (mask (B, S), *, options) -> (B, S), the loss being their weighted sum.

    weighted_sum(objective(masked(evaluation, mask), advantages), aggregation(mask, keep=keep, total=total))

where `total` is the denominator of the whole update, the sum of `denominator(aggregation, mask, keep)` over its micro-batches
and ranks, so that parts add up to one large batch. An objective whose ratio is a sample's, or whose loss is a group's, gives
every decision the whole loss of its sample or group: `seq_mean` turns that into the mean over samples or groups, groups counting
by their kept samples. Axes: B samples, S decisions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmgrpo.facts import unbound
from mmgrpo.types import require_shape, same_shape

Aggregation = Callable[..., Tensor]


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
    if unbound(aggregation) is token_mean:
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
