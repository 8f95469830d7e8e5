"""Terms of the loss that hold the policy's entropy up, or inside a band. Axes: B samples, S decisions."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.aggregations import weighted_sum
from mmgrpo.ratios import required
from mmgrpo.types import Evaluation
from mmgrpo.weighting import Weight


class Band(NamedTuple):
    """Where the mean negative log-prob of the decisions may lie, nats, and the weight of what is outside."""

    low: float
    high: float
    weight: float


class Adaptation(NamedTuple):
    """How the bonus follows the entropy (Skywork-OR1, arXiv 2505.22312)."""

    target: float  # nats
    delta: float = 0.005  # change of the weight per update
    least: float = 0.0
    most: float = 1.0


class Bonus(NamedTuple):
    """The weight of the bonus, and the mean entropy of the update before, infinite before the first."""

    weight: float
    last: float = torch.inf


def applied(bonus: Bonus, how: Adaptation | None) -> float:
    """The weight that an update has: that of the bonus, or 0 while the entropy is above its target."""
    return bonus.weight if how is None or bonus.last <= how.target else 0.0


def adapted(bonus: Bonus, entropy: float, how: Adaptation) -> Bonus:
    """The bonus after an update with that mean entropy: larger up to the target, else smaller."""
    change = how.delta if entropy <= how.target else -how.delta
    return Bonus(min(max(bonus.weight + change, how.least), how.most), entropy)


def mean_entropy(evaluation: Evaluation, advantages: Tensor, evenly: Tensor, chosen: Weight | None = None) -> Tensor:
    """The mean over an update's trained decisions, or over those that an objective chose by their entropy; -> () nats.

    `evenly` (B, S) is 1 / the number of the update's trained decisions, whatever the aggregation of the losses.
    """
    entropy = required(evaluation, "entropy")
    if chosen is None:
        return weighted_sum(entropy, evenly)
    weights = evenly * chosen(evaluation, advantages)
    return weighted_sum(entropy, weights) / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def outside(evaluation: Evaluation, evenly: Tensor, band: Band) -> Tensor:
    """How far the mean of -log pi over an update's trained decisions is out of its band; -> () nats.

    OpenVLThinkerV2 (arXiv 2604.08539), which has a band for each task and publishes no values; here one for the run.
    """
    entropy = weighted_sum(-required(evaluation, "log_prob"), evenly)
    return (entropy - band.high).relu() + (band.low - entropy).relu()
