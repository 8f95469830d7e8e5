"""The policy that samples: today's weights, or ones that lag behind them.

DiffusionNFT (arXiv 2509.16117) samples with an average of the trained weights, old <- q old + (1 - q) theta after each iteration;
its losses compare with the same weights. A lag is what keeps such a loss stable at a high learning rate.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from mmgrpo.shadow import Shadow


def share_kept(iteration: int, lag: float, ramp: float | None, flat: int) -> float:
    """q after an iteration, from 0: min(ramp * (iteration + 1 - flat), lag), at least 0; `lag` itself without a ramp."""
    return lag if ramp is None else min(max(0.0, ramp * (iteration + 1 - flat)), lag)


class Behaviour:
    """The weights that sample, in float32 or finer where they lag."""

    def __init__(
        self, parameters: Mapping[str, Parameter], lag: float = 0.0, ramp: float | None = None, flat: int = 0
    ) -> None:
        """lag: the largest q, 0 is today's weights; ramp: by which q rises each iteration; flat: iterations before it does."""
        if not 0 <= lag < 1:
            raise ValueError(f"lag is {lag}; expected a number in [0, 1)")
        self._lag, self._ramp, self._flat = lag, ramp, flat
        self._shadow = Shadow(parameters, torch.float32) if lag else None

    @property
    def lags(self) -> bool:
        """Whether other weights than today's sample."""
        return self._shadow is not None

    def applied(self) -> AbstractContextManager[None]:
        """Within the context the policy computes with the weights that sample."""
        return nullcontext() if self._shadow is None else self._shadow.applied()

    def after_iteration(self, iteration: int) -> None:
        """Call once after the last update of every iteration."""
        if self._shadow is not None:
            self._shadow.follow(share_kept(iteration, self._lag, self._ramp, self._flat))

    def tensors(self) -> dict[str, Tensor]:
        """Its own weights for a checkpoint; none where it samples with today's."""
        return {} if self._shadow is None else self._shadow.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; raises ValueError where it does not fit."""
        if self._shadow is not None:
            self._shadow.load(tensors)
