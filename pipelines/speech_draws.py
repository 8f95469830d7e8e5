"""Enhanced recordings as decisions of the forward process: their clean latents noised again, at any times of the flow's path.

Axes: B samples, b those of one call, C channels, K bands or frequencies, T frames, S draws of each sample.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.draws import Draws, all_noise_seeds, all_shares
from mmgrpo.seeds import normal
from mmgrpo.types import KINDS, Trajectory
from pipelines.speech_steps import Given


class State(NamedTuple):
    """What the network sees of one decision of a call's rows."""

    x: Tensor  # (b, C, K, T)
    t: Tensor  # (b,) 1 is noise
    target: Tensor | None = None  # (b, C, K, T) of a draw: the velocity that it should predict


def drawn(trajectory: Trajectory, draws: Draws) -> Trajectory:
    """The trajectory with the times and the noise seeds of its draws, which are its decisions."""
    batch = trajectory.batch
    times, noises = all_shares(draws, batch), all_noise_seeds(draws, batch)
    record = {**trajectory.record, "time": times, "noise": noises}
    mask = torch.ones(times.shape, dtype=torch.bool)
    return replace(trajectory, mask=mask, kind=torch.full(times.shape, KINDS["draw"]), record=record)


def noised(part: Trajectory, draw: int, clean: Tensor, given: Given) -> State:
    """The clean latents of a call's rows, (b, C, K, T), at a draw's times: x_t = (1 - t) x_0 + t x_1 with x_1 = centre + noise."""
    x0, t = clean.to(given.centre), part.record["time"][:, draw].to(given.centre)
    x1 = given.centre + normal(part.record["noise"][:, draw].tolist(), x0.shape[1:]).to(x0)
    along = t[:, None, None, None]
    return State((1 - along) * x0 + along * x1, t, x1 - x0)
