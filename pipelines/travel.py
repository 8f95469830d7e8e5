"""Rollouts whose samples go through the schedule by different routes, and what a replay must know of them.

A route's steps before its first stochastic one are the same for all samples that start from one noise: with `same_noise` they
are computed for one sample of a group. Axes: B samples, S steps of the schedule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmgrpo.routes import Route, shared_out
from mmgrpo.seeds import derive
from mmgrpo.types import Batch, Prompt, Samples, Trajectory
from pipelines import thinning
from pipelines.engine import Engine
from pipelines.listeners import Recorder, Way
from pipelines.thinning import Change

if TYPE_CHECKING:
    from pipelines.reverse_process import ReverseProcess


def travelled(process: "ReverseProcess", batch: Batch, routes: Sequence[Route]) -> tuple[Trajectory, Samples]:
    """One sample per row by its route, and its decisions."""
    engine = process.engine
    steps, which = engine.layout.steps, assigned(batch, len(routes))
    states = trunk(process, batch, routes)
    parts = []
    for number, route in enumerate(routes):
        rows = (which == number).nonzero().flatten()
        parts.append(
            (rows, *one_way(engine, batch.take(rows), route, {name: state[rows] for name, state in states.items()}))
        )
    mask = torch.zeros(len(batch), steps, dtype=torch.bool)
    for rows, recorded, _ in parts:
        mask[rows] = torch.tensor([f"output.{step}.0" in recorded for step in range(steps)])
    _, record, samples = parts[0]
    if len(parts) > 1:
        record = together([(rows, recorded) for rows, recorded, _ in parts], len(batch))
        samples = joined_samples([(rows, made) for rows, _, made in parts], batch)
    trajectory = Trajectory(batch, mask, torch.zeros_like(mask, dtype=torch.int64), record)
    if engine.layout.anchored or int(record["rows"].max()) > engine.options.replay_rows:
        trajectory, engine.layout.rounding = process.rounded(trajectory)
    return trajectory, samples


def assigned(batch: Batch, routes: int) -> Tensor:
    """Which route each sample takes, by its place in its group; -> (B,) int64. Raises ValueError if a group does not divide."""
    which = torch.zeros(len(batch), dtype=torch.int64)
    for group in batch.group.unique():
        rows = (batch.group == group).nonzero().flatten()
        which[rows] = torch.tensor(shared_out(routes, len(rows)))
    return which


def one_way(
    engine: Engine, batch: Batch, route: Route, states: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Samples]:
    """The record and the samples of rows that take one route; `states` are those of a trunk, by name."""
    steps = engine.layout.steps
    planned = torch.zeros(steps, dtype=torch.bool)
    planned[list(route.trained)] = True
    begin = first(route) if states else 0

    def listen(part: Batch) -> Recorder:
        rows = torch.isin(batch.sample, part.sample).nonzero().flatten()
        known = {name: state[rows] for name, state in states.items()}
        return engine.recorder(part, planned, Way(begin, known, engine.stub, fast_from=route.fast_from))

    taken = list(route.taken)
    record, samples = engine.made(batch, listen, reschedule=change(taken, steps))
    record["branch"] = torch.full((len(batch),), derive(*taken, "trained", *route.trained))
    if taken != list(range(steps)):
        padded = torch.tensor([*taken, *[-1] * (steps - len(taken))])
        record["taken"] = padded.expand(len(batch), -1).clone()
    return record, samples


def first(route: Route) -> int:
    """The position of the first stochastic step, 0 where there is none."""
    return min(route.trained, default=0)


def trunk(process: "ReverseProcess", batch: Batch, routes: Sequence[Route]) -> dict[str, Tensor]:
    """The states in front of the first stochastic steps, computed for one sample of each group; by name, (B, ...).

    Nothing where samples start from noises of their own, or where steps depend on outputs of earlier ones.
    """
    engine = process.engine
    needed = {first(route) - 1 for route in routes if first(route) > 0}
    groups, where = batch.group.unique(return_inverse=True)
    if not engine.options.same_noise or engine.stub.kind != "zeros" or not needed or len(groups) == len(batch):
        return {}
    firsts = torch.tensor([int((where == number).nonzero()[0]) for number in range(len(groups))])
    one_each = batch.take(firsts)
    never = torch.zeros(engine.layout.steps, dtype=torch.bool)
    found: dict[str, Tensor] = {}
    for rows in engine.calls(one_each, torch.tensor(engine.options.rollout_rows).expand(len(one_each))):
        recorder = engine.recorder(one_each.take(rows), never, Way(end=max(needed) + 1))
        recorder.everything = True
        engine.run(recorder, one_each.take(rows))
        for name, state in recorder.record.items():
            if int(name.split(".")[1]) in needed:
                found.setdefault(name, state.new_empty(len(one_each), *state.shape[1:]))[rows] = state
    return {name: state[where] for name, state in found.items()}


def change(taken: Sequence[int], steps: int) -> Change | None:
    """What thins a schedule out to the steps taken; None where all are."""
    return None if list(taken) == list(range(steps)) else partial(thinning.thin, taken=taken)


def thinned(part: Trajectory) -> Change | None:
    """The schedule of the replay of rows that took one route."""
    if "taken" not in part.record:
        return None
    taken = [step for step in part.record["taken"][0].tolist() if step >= 0]
    return change(taken, part.mask.shape[1]) if taken else None  # none are noted of a route that takes all


def ways_of(trajectory: Trajectory, sizes: bool = True) -> Tensor:
    """A number for each row, equal where one call can replay rows: of one route and, with `sizes`, of one call's size; (B,)."""
    record = trajectory.record
    columns = [record["rows"].unsqueeze(1)] if sizes else [torch.zeros_like(record["rows"]).unsqueeze(1)]
    columns += [record[name].view(len(trajectory), -1) for name in ("taken", "branch") if name in record]
    return torch.cat(columns, 1).unique(dim=0, return_inverse=True)[1]


def together(parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]], count: int) -> dict[str, Tensor]:
    """The records of several routes as one of all rows; what a route did not record is NaN, or -1 of whole numbers."""
    whole: dict[str, Tensor] = {}
    for rows, record in parts:
        for name, value in record.items():
            missing = torch.nan if value.is_floating_point() else -1
            place = whole.setdefault(name, value.new_full((count, *value.shape[1:]), missing))
            place[rows] = value
    return whole


def joined_samples(parts: Sequence[tuple[Tensor, Samples]], batch: Batch) -> Samples:
    """The samples of several routes in the order of the batch."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    made = [samples for _, samples in parts]
    media: dict[str, Any] = {
        name: torch.cat([getattr(one, name) for one in made])[order]
        for name in ("image", "video", "source_video", "audio")
        if getattr(made[0], name) is not None
    }
    return replace(made[0], batch=batch, **media)


def schedule_shares(engine: Engine, prompt: Prompt) -> Tensor:
    """The shares of noise at which the steps of a rollout begin, and that of its end; (S + 1,) float64.

    Raises ValueError if the pipeline's loop does not go through its scheduler's timesteps one by one.
    """
    levels, steps = engine.schedule(prompt), engine.layout.steps
    if len(levels) != steps + 1:
        raise ValueError(
            f"policy.routes: the schedule has {len(levels) - 1} timesteps and the loop {steps} steps; expected one for each"
        )
    return torch.stack([thinning.noise_share(level) for level in levels])
