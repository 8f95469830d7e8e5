"""How a pipeline is run as a policy: what the user asks for, and what its first runs showed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pipelines import arguments
from pipelines.decisions import Kernel
from pipelines.guides import Steering
from pipelines.source_videos import Cut


@dataclass(frozen=True)
class Options:
    """How a pipeline is run as a policy."""

    call: Mapping[str, Any]  # arguments of the pipeline's own call
    kernel: Kernel
    evaluation_call: Mapping[str, Any] = field(default_factory=dict)  # arguments that held-out samples have instead
    reduction: Literal["mean", "sum"] = "mean"  # over the latent elements of a decision
    rollout_rows: int = 8  # samples in one call of the pipeline
    replay_rows: int = 8  # samples whose graphs are held at once
    replay_steps: int = 1  # steps of these samples in one forward of the denoiser
    same_noise: bool = False  # start noise shared inside a group
    columns: tuple[str, ...] = ()  # columns of the data passed to the call, row by row
    autocast: torch.dtype | None = None
    video: Cut = field(default_factory=Cut)  # what is used of the videos that prompts bring
    offload_trajectory: bool = False  # it waits on the CPU for its replay
    keep_states: bool = False  # of every step, not only of those that a replay needs
    guide: Steering | None = None  # moves the stochastic steps of a rollout


@dataclass
class Layout:
    """What the first run of a pipeline showed."""

    denoisers: tuple[str, ...]
    trained: tuple[str, ...]
    steps: int = 0  # S
    parts: Mapping[int, int] = field(default_factory=dict)  # step -> scheduler steps that make its decision
    form: arguments.Form = "list"
    mixed: bool = True  # one call may hold rows of different prompts
    seated: bool = False  # a row is replayed at the place in a call that it was recorded at
    anchored: bool = False  # old outputs are recomputed by a replay, whose batches round otherwise than the rollout's
    rounding: float = 0.0  # mean |log-ratio| between the rollout's and the replay's geometry
