"""Statistics inside groups: samples of one prompt carry one id. NaN is a sample without an opinion and enters none.

Computed in float64 from the distance to the group's smallest score, so that a group of equal scores has exactly no spread.
Axes: B samples, in any order; group ids are any int64 values.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.types import require_shape, same_shape


class Spread(NamedTuple):
    """How much groups disagree inside; groups without any opinion do not count."""

    none_share: float  # share of groups whose scores are all equal, in [0, 1]
    mean_std: float  # mean over groups of the standard deviation inside


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """Sum over the members of each sample's group; (B,), (B,) int64 -> (B,)."""
    index = _index(values, group)
    return torch.zeros_like(values).index_add(0, index, values)[index]


def group_size(scores: Tensor, group: Tensor) -> Tensor:
    """How many members of each sample's group have an opinion; (B,) float64."""
    return group_sum((~scores.isnan()).double(), group)


def group_least(scores: Tensor, group: Tensor) -> Tensor:
    """The smallest score of each sample's group, infinite without any opinion; (B,) float64."""
    index = _index(scores, group)
    least = torch.full((len(scores),), torch.inf, dtype=torch.float64, device=scores.device)
    return least.scatter_reduce(0, index, torch.where(scores.isnan(), torch.inf, scores.double()), "amin")[index]


def group_most(scores: Tensor, group: Tensor) -> Tensor:
    """The largest score of each sample's group, minus infinity without any opinion; (B,) float64."""
    return -group_least(-scores, group)


def group_centred(scores: Tensor, group: Tensor) -> Tensor:
    """Score minus the mean of its group, NaN without an opinion; (B,) float64."""
    heard = ~scores.isnan()
    above = torch.where(heard, scores.double() - group_least(scores, group), 0)  # exactly 0 where all are equal
    mean = group_sum(above, group) / group_size(scores, group).clamp(min=1)
    return torch.where(heard, above - mean, torch.nan)


def group_std(scores: Tensor, group: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation inside each sample's group, 0 where at most `ddof` members have an opinion; (B,) float64."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; expected 1 (divide by n - 1) or 0 (divide by n)")
    squares = group_sum(group_centred(scores, group).square().nan_to_num(0), group)
    return (squares / (group_size(scores, group) - ddof).clamp(min=1)).sqrt()


def within(scores: Tensor, group: Tensor, estimate: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of each group's opinions (G,) float64 -> (G,), put together; NaN without an opinion; (B,), (B,) -> (B,)."""
    index = _index(scores, group)
    values = torch.full(scores.shape, torch.nan, dtype=torch.float64, device=scores.device)
    for number in range(int(index.max()) + 1 if len(index) else 0):
        rows = ((index == number) & ~scores.isnan()).nonzero().flatten()
        if len(rows):
            values[rows] = estimate(scores[rows].double())
    return values


def group_ranks(scores: Tensor, group: Tensor) -> Tensor:
    """Rank in each sample's group from 1, the mean rank of equal scores, NaN without an opinion; (B,) float64."""

    def ranks(heard: Tensor) -> Tensor:
        _, which, counts = torch.unique(heard, return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts.double() - 1) / 2)[which]

    return within(scores, group, ranks)


def rank_correlation(first: Tensor, second: Tensor, group: Tensor) -> Tensor:
    """Spearman's correlation of two scores in each sample's group, of those that have both; NaN if either is constant; (B,)."""
    same_shape(first=first, second=second)
    heard = ~(first.isnan() | second.isnan())
    x, y = (
        group_centred(group_ranks(torch.where(heard, one, torch.nan), group), group).nan_to_num(0)
        for one in (first, second)
    )
    scale = (group_sum(x.square(), group) * group_sum(y.square(), group)).sqrt()
    return torch.where(scale > 0, group_sum(x * y, group) / scale, torch.nan)


def spread(scores: Tensor, group: Tensor) -> Spread:
    """Share of groups without spread, and their mean standard deviation (ddof 1); (B,), (B,) -> two numbers."""
    std = group_std(scores, group)
    weight = torch.where(scores.isnan(), 0, 1 / group_size(scores, group).clamp(min=1))  # sums to 1 in each group
    groups = weight.sum().clamp(min=1)
    return Spread(min(1.0, float((weight * (std == 0)).sum() / groups)), float((weight * std).sum() / groups))


def _index(values: Tensor, group: Tensor) -> Tensor:
    require_shape("scores", values, None)
    same_shape(scores=values, group=group)
    if group.dtype != torch.int64:
        raise ValueError(f"group has dtype {group.dtype}; expected torch.int64, ids never pass through floats")
    return torch.unique(group, return_inverse=True)[1]
