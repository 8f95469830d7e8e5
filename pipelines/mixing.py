"""Draws at several levels in one forward of the denoiser, where one call of a pipeline holds one level for all its rows.

The arguments of the denoiser at each level are captured from a run of the pipeline that makes none of the calls; of what differs
between levels each row takes its own. Axes: b rows of one call, N levels of them.
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


class Collector:
    """Notes the denoiser's call at each step of a run behind the first, none of which is made."""

    def __init__(
        self, denoisers: Sequence[str], memo: Memo, stub: StandIn, count: int, state: Callable[[int, Tensor], Tensor]
    ) -> None:
        self.denoisers, self.memo, self.stub, self.count = denoisers, memo, stub, count
        self.state = state  # (step behind the first, like) -> what it starts from
        self.counter = Counter()
        self.calls: list[DenoiserCall] = []

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.denoisers:
            return set_up_call(self.memo, self.counter, name, forward, args, kwargs)
        group = self.counter.called()
        if group > 0:
            if len(self.calls) == group:
                raise Unbatchable("a step calls several denoisers")
            self.calls.append(DenoiserCall(name, forward, args, kwargs))
        return self.stub(name, forward, args, kwargs, {}, f"denoised.{group}.0")

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        group, sample = self.counter.step(), arguments["sample"]
        advance(scheduler, arguments["timestep"])
        return StepResult(lambda: self._next(group, sample), sample)

    def _next(self, group: int, sample: Tensor) -> Tensor:
        if group == self.count:
            raise Stop
        return self.state(group, sample)


class Supplied:
    """Hands a denoiser's output, computed elsewhere, to the step behind the first, and notes what the scheduler is given."""

    def __init__(self, denoisers: Sequence[str], memo: Memo, stub: StandIn, output: Any, state: Tensor) -> None:
        self.denoisers, self.memo, self.stub, self.output, self.state = denoisers, memo, stub, output, state
        self.counter = Counter()
        self.arguments: Mapping[str, Any] = {}

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.denoisers:
            return set_up_call(self.memo, self.counter, name, forward, args, kwargs)
        return self.stub(name, forward, args, kwargs, {}, "denoised.0.0") if self.counter.called() == 0 else self.output

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        sample = arguments["sample"]
        if self.counter.step() == 1:
            self.arguments = arguments
            raise Stop
        advance(scheduler, arguments["timestep"])
        return StepResult(lambda: self.state.reshape(sample.shape).to(sample), sample)


def forward(calls: Sequence[DenoiserCall], which: Tensor) -> Any:
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
