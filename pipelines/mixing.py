"""Draws at several levels in one forward of the denoiser, where one call of a pipeline holds one level for all its rows.

The arguments of the denoiser at each level are captured from steps of the pipeline that make none of the calls; of what differs
between levels each row takes its own, and the same run goes on with what was predicted. Axes: b rows of one call, N levels of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from pipelines.batching import DenoiserCall, Unbatchable
from pipelines.listeners import set_up_call
from pipelines.memo import Memo
from pipelines.schedulers import advance
from pipelines.stubs import StandIn
from pipelines.tape import Call, Counter, StepResult, Stop


class Mixing:
    """Notes the denoiser's call at each level, none of which is made, and makes one for each draw, its rows at levels of their own.

    The run's schedule holds a first step that is skipped, the levels, and one step more for each draw.
    """

    def __init__(
        self,
        denoisers: Sequence[str],
        memo: Memo,
        stub: StandIn,
        states: Sequence[Tensor],
        which: Tensor,
        emit: Callable[[int, Mapping[str, Any]], None],
    ) -> None:
        self.denoisers, self.memo, self.stub = denoisers, memo, stub
        self.states = states  # at each level; N of (b, ...)
        self.which = which  # (b, K), the level of each row in each draw
        self.emit = emit  # (draw, the arguments of its scheduler step)
        self.counter = Counter()
        self.calls: list[DenoiserCall] = []
        self.made = 0  # draws

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.denoisers:
            return set_up_call(self.memo, self.counter, name, forward, args, kwargs)
        group = self.counter.called()
        levels = len(self.states)
        if group > levels:
            self.made += 1
            require_one(self.made, group - levels)
            return mixed(self.calls, self.which[:, self.made - 1])
        if group > 0:
            self.calls.append(DenoiserCall(name, forward, args, kwargs))
            require_one(len(self.calls), group)
        return self.stub(name, forward, args, kwargs, {}, f"denoised.{group}.0")

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        group, sample, levels = self.counter.step(), arguments["sample"], len(self.states)
        if group > levels:
            self.emit(group - levels - 1, arguments)
        if group == levels + self.which.shape[1]:
            raise Stop
        advance(scheduler, arguments["timestep"])
        state = self.states[group % levels]  # behind the levels any will do
        return StepResult(lambda: state.reshape(sample.shape).to(sample, copy=True), sample)


def require_one(calls: int, steps: int) -> None:
    """Raise Unbatchable where a step did not make one call."""
    if calls != steps:
        raise Unbatchable("a step calls several denoisers")


def mixed(calls: Sequence[DenoiserCall], which: Tensor) -> Any:
    """One forward in which row r has the arguments of call which[r]; which (b,) int64. Raises Unbatchable if it cannot."""
    first = calls[0]
    if any(call.name != first.name for call in calls):
        raise Unbatchable("levels have different denoisers")
    args, kwargs = chosen([(call.args, call.kwargs) for call in calls], which)
    return first.forward(*args, **kwargs)


def chosen(values: Sequence[Any], which: Tensor) -> Any:
    """Of nested arguments, one for each level: what is the same at all levels, or each row's own."""
    first = values[0]
    if isinstance(first, Tensor):
        return chosen_rows(values, which)
    if isinstance(first, dict):
        return {name: chosen([value[name] for value in values], which) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(chosen(list(parts), which) for parts in zip(*values, strict=True))
    if any(value is not first and value != first for value in values[1:]):
        raise Unbatchable(f"levels differ in an argument that is no tensor: {first!r}")
    return first


def chosen_rows(values: Sequence[Tensor], which: Tensor) -> Tensor:
    """(b, ...) or (1,) each -> (b, ...)."""
    first, rows = values[0], torch.arange(len(which))
    if all(value is first or torch.equal(value, first) for value in values[1:]):
        return first
    if first.numel() == 1:  # a timestep for all rows becomes one for each
        return torch.cat([value.reshape(1) for value in values])[which.to(first.device)]
    if len(first) != len(which):
        raise Unbatchable(f"levels differ in an argument of shape {tuple(first.shape)}; expected {len(which)} rows")
    used = which.unique().tolist()
    place = {level: number for number, level in enumerate(used)}
    stacked = torch.stack([values[level] for level in used])
    return stacked[torch.tensor([place[level] for level in which.tolist()]), rows]
