"""Schedules of which only some levels are used: a few of a fine one, steps merged, a tail in fewer steps.

Axes: N entries of a schedule's tables.
"""

from collections.abc import Callable, Sequence
from functools import partial

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.transitions import Level
from pipelines import schedulers
from pipelines.levels import Levels, read
from pipelines.schedulers import Unsupported

Change = Callable[[SchedulerMixin], None]  # made to a scheduler right after its timesteps are set
TABLES = (*schedulers.FLOW, *schedulers.SIGMA_SPACE, *schedulers.EDM, *schedulers.CONVERTING)  # of sigmas
LISTS = (*schedulers.STRIDED, *schedulers.LISTED)  # of timesteps alone


def thin(scheduler: SchedulerMixin, taken: Sequence[int]) -> None:
    """Keep the given entries of the schedule, in their order; the last step still ends where the schedule does.

    Raises Unsupported for a class whose schedule is more than tables, ValueError for entries that it does not have.
    """
    if not isinstance(scheduler, (*TABLES, *LISTS)) or isinstance(scheduler, diffusers.PNDMScheduler):
        raise Unsupported(f"{type(scheduler).__name__} has a schedule that cannot be thinned out")
    count = len(scheduler.timesteps)
    if not taken or not all(0 <= entry < count for entry in taken):
        raise ValueError(
            f"entries {list(taken)[:8]} of a schedule of {count} steps; expected some from 0 to {count - 1}"
        )
    index = torch.tensor(taken)
    scheduler.timesteps = scheduler.timesteps[index.to(scheduler.timesteps.device)]
    if isinstance(scheduler, TABLES):
        sigmas = scheduler.sigmas
        if len(sigmas) != count + 1:
            raise Unsupported(f"{type(scheduler).__name__} has {len(sigmas)} sigmas for {count} timesteps")
        scheduler.sigmas = torch.cat([sigmas[index.to(sigmas.device)], sigmas[-1:]])


def thinner(taken: Sequence[int]) -> Change:
    """What keeps the given entries of a schedule."""
    return partial(thin, taken=taken)


def steps(scheduler: SchedulerMixin) -> list[Levels]:
    """The steps of a schedule; N of them, float64 scalars."""
    indexed = isinstance(scheduler, schedulers.INDEXED)
    return [read(scheduler, time, place if indexed else None) for place, time in enumerate(scheduler.timesteps)]


class Seen(Exception):  # noqa: N818 - ends a run on purpose
    """Leaves a pipeline's call when its schedule is known."""


def noise_share(level: Level) -> Tensor:
    """sigma / (alpha + sigma): t on a flow's path; 1 is noise."""
    return level.sigma / (level.alpha + level.sigma)


def nearest(table: Tensor, shares: Tensor) -> list[int]:
    """The entries of a table of shares that are nearest to some, from the first one after the start on; (N,), (K,) -> K of them.

    Equal ones are moved apart, so that the entries rise: no level is drawn twice in one run.
    """
    found: list[int] = []
    for share in shares.sort(descending=True).values:
        entry = 1 + int((table[1:] - share).abs().argmin())
        found.append(max(entry, found[-1] + 1) if found else entry)
    over = found[-1] - (len(table) - 1)
    if over > 0:
        found = [entry - over for entry in found]
    if found[0] < 1:
        raise ValueError(f"{len(shares)} draws from a schedule of {len(table)} levels; expected fewer draws.count")
    return found
