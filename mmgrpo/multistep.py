"""A deterministic step of second order, for steps that nothing is learned from. Axes: B samples, ... any event axes."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.transitions import Gaussian, Level, Step, from_clean, ode


class Before(NamedTuple):
    """What a step leaves to the one after it."""

    clean: Tensor  # (B, ...) predicted data
    level: Level  # at which it was predicted


def dpm_solver_2m(step: Step, before: Before | None = None) -> Gaussian:
    """DPM-Solver++(2M) in data prediction (arXiv 2211.01095, algorithm 2) on any path, std 0; without `before` of first order.

    It is `ode` with the predicted data extrapolated to the middle of the step in log(alpha / sigma). From pure noise
    (alpha = 0), whose place there is infinite, and to data (sigma = 0) nothing is extrapolated, as diffusers does under
    lower_order_final with a last level of 0.
    """
    ahead = step.clean if before is None else step.clean + _share(step, before.level) * (step.clean - before.clean)
    return ode(step._replace(clean=ahead, noise=from_clean(step.x, ahead, step.now).noise))


def _share(step: Step, before: Level) -> Tensor:
    """Half of this step's length over the one before, in log(alpha / sigma); 0 where one is infinite or there was none."""
    past, now, following = (level.alpha.log() - level.sigma.log() for level in (before, step.now, step.next))
    share = (following - now) / (2 * (now - past))
    return torch.where(share.isfinite(), share, 0).to(step.clean)
