"""The denoising steps of images inside an answer: noise levels and the distribution of a step. Axes: b rows, K steps."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mmgrpo.transitions import Gaussian, Level, Step, from_velocity, ode
from pipelines.decisions import Sampler


@dataclass(frozen=True)
class Steps:
    """K steps from noise (time 1) to an image (time 0)."""

    count: int  # K
    sampler: Sampler  # of the planned steps; the others are deterministic
    shift: float = 1.0  # above 1 the steps lie closer near the noise: t -> shift t / (1 + (shift - 1) t)
    reduction: Literal["mean", "sum"] = "mean"  # of log-ratios over the latent elements of a step

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """K + 1 of them; float64 scalars on the CPU."""
        t = torch.linspace(1, 0, self.count + 1, dtype=torch.float64)
        shifted = self.shift * t / (1 + (self.shift - 1) * t)
        return tuple(Level(1 - one, one) for one in shifted)

    def time(self, step: int, like: Tensor) -> Tensor:
        """The time in which a step starts, for every row; -> (b,) float32."""
        return self.levels[step].sigma.to(like.device, torch.float32).expand(len(like))

    def dt(self, step: int) -> Tensor:
        """The positive length of a step; ()."""
        return self.levels[step].sigma - self.levels[step + 1].sigma

    def gaussian(self, x: Tensor, velocity: Tensor, step: int, planned: bool = True) -> Gaussian:
        """The distribution of the next state under a velocity; (b, C, H, W) each."""
        now, following = self.levels[step], self.levels[step + 1]
        clean, noise = from_velocity(x.to(velocity), velocity, now)
        sampler = self.sampler if planned else ode
        return sampler(Step(x.to(velocity), clean, noise, now, following, self.levels[1]))
