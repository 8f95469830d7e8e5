"""Draws of the forward process: at which levels clean samples are noised again, and which samples share level and noise.

Objectives on such draws (mmgrpo/matching.py) compare a model's output with what it should have been and never ask a sampler for
a likelihood. Axes: B samples, K draws of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmgrpo.seeds import derive
from mmgrpo.types import Batch


@dataclass(frozen=True)
class Draws:
    """How clean samples are noised again."""

    count: int = 2  # K, of every sample in every iteration
    low: float = 0.02  # least share of noise, t on a flow's path, where 1 is noise
    high: float = 0.98  # largest share of noise
    share: Literal["group", "sample"] = "group"  # whose draws have one noise
    sets: int = 4  # different sets of K levels in an iteration, dealt out among the groups
    one_noise: bool = False  # the K draws of a sample have the same noise, as DGPO's (arXiv 2510.08425)
    call: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline in training, such as guidance_scale = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 1:
            raise ValueError(f"draws.low and draws.high are {self.low} and {self.high}; expected 0 < low < high < 1")
        for name, value in (("count", self.count), ("sets", self.sets)):
            if value < 1:
                raise ValueError(f"draws.{name} is {value}; expected at least 1")


def which_set(draws: Draws, batch: Batch) -> Tensor:
    """The set of levels that each sample has, the same for its group; -> (B,) int64."""
    return batch.group % draws.sets


def shares(draws: Draws, which: int, seed: int, iteration: int) -> Tensor:
    """The shares of noise of one set, from much to little, one in each of sets * count strata of [low, high]; -> (K,) float64.

    The sets of an iteration interleave: together they cover the range evenly.
    """
    strata = draws.sets * draws.count
    places = torch.arange(draws.count) * draws.sets + which
    inside = torch.stack([_uniform(derive(seed, "draw", "level", iteration, int(place))) for place in places])
    return (draws.low + (draws.high - draws.low) * (places + inside) / strata).flip(0)


def noise_seeds(draws: Draws, batch: Batch, draw: int) -> list[int]:
    """The seed of each sample's noise in a draw: equal where the noise is shared; B of them."""
    ids = batch.group if draws.share == "group" else batch.sample
    which = 0 if draws.one_noise else draw
    return [derive(batch.seed, "draw", draws.share, int(one), batch.iteration, which) for one in ids]


def all_shares(draws: Draws, batch: Batch) -> Tensor:
    """The shares of noise of every draw; -> (B, K) float64."""
    return torch.stack(
        [shares(draws, which, batch.seed, batch.iteration) for which in which_set(draws, batch).tolist()]
    )


def all_noise_seeds(draws: Draws, batch: Batch) -> Tensor:
    """The seeds of the noises of every draw; -> (B, K) int64."""
    return torch.tensor([noise_seeds(draws, batch, draw) for draw in range(draws.count)]).T


def _uniform(seed: int) -> Tensor:
    return torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
