"""The two runs of a pipeline that make it a policy: recording its denoising steps, and evaluating them again."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo import seeds
from mmgrpo.multistep import Before, dpm_solver_2m
from mmgrpo.transitions import Gaussian
from mmgrpo.types import Evaluation
from pipelines import structure
from pipelines.decisions import (
    Kernel,
    Part,
    Reduction,
    Sampler,
    Transition,
    checksum,
    evaluate,
    from_levels,
    levels_of,
    prediction,
)
from pipelines.guides import Steered
from pipelines.memo import Memo
from pipelines.schedulers import advance, state_dtype
from pipelines.stubs import StandIn
from pipelines.tape import Call, Counter, StepResult, Stop


class ReplayMismatch(RuntimeError):
    """A replay met another state than its rollout; training on it would be wrong."""


@dataclass(frozen=True)
class Way:
    """What of a rollout is not step by step from the start, first-order, to the end."""

    begin: int = 0  # group with which the rows begin: what is before it was computed elsewhere
    states: Mapping[str, Tensor] = field(default_factory=dict)  # of the rows before it, "next.GROUP.PART": (b, ...)
    stub: StandIn | None = None  # answers for denoisers before it
    end: int | None = None  # group before which to stop
    fast_from: int | None = None  # group from which deterministic steps are of second order


STRAIGHT_ON = Way()


class Recorder:
    """Takes stochastic steps where the plan says so and records what a replay needs."""

    def __init__(
        self,
        denoisers: Sequence[str],
        memo: Memo,
        kernel: Kernel,
        planned: Tensor,
        row_seeds: Sequence[int],
        outputs: bool,
        offload: bool = False,
        everything: bool = False,
        steered: Steered | None = None,
        way: Way = STRAIGHT_ON,
    ) -> None:
        self.denoisers = denoisers
        self.memo = memo
        self.kernel = kernel
        self.planned = planned  # (S,) bool
        self.row_seeds = row_seeds  # one per row
        self.everything = everything  # keep the states of every step
        self.offload = offload  # keep the record on the CPU
        self.outputs = outputs  # keep every denoiser output, for pipelines whose steps depend on earlier outputs
        self.counter = Counter()
        self.parts: dict[int, int] = defaultdict(int)  # group -> steps taken
        self.calls: dict[int, int] = defaultdict(int)  # group -> denoiser calls
        self.trained: set[int] = set()  # groups with a random element
        self.steered = steered  # by a guide
        self.way = way
        self.before: dict[int, Before] = {}  # part -> what the step before it predicted
        self.record: dict[str, Tensor] = {} if steered is None else steered.record

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.denoisers:
            return set_up_call(self.memo, self.counter, name, forward, args, kwargs)
        group = self.counter.called()
        if group == self.way.end:
            raise Stop
        if group < self.way.begin and self.way.stub is not None:
            return self.way.stub(name, forward, args, kwargs, {}, "")
        output = forward(*args, **kwargs)
        if self.outputs:
            for place, tensor in enumerate(structure.tensors(output)):
                self.keep(f"denoised.{group}.{self.calls[group]}.{place}", tensor)
        self.calls[group] += 1
        return output

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        group = self.counter.step()
        if group >= len(self.planned):
            raise ValueError(f"the pipeline took step {group + 1}; expected {len(self.planned)} as in its first run")
        sample, output = arguments["sample"], prediction(arguments).value
        if group < self.way.begin:
            advance(scheduler, arguments["timestep"])
            return StepResult(lambda: self._given(group, sample), sample)
        kernel = self.kernel if self.planned[group] else from_levels(self._deterministic(group))
        taken = kernel(scheduler, arguments)(output)
        if self.way.fast_from is not None:
            self.before[self.parts[group]] = Before(taken.clean, levels_of(scheduler, arguments).now)
        drawn = taken.gaussian
        if self.steered is not None and self.planned[group]:
            drawn = self.steered.step(group, scheduler, arguments, taken)
        advance(scheduler, arguments["timestep"])
        dtype = state_dtype(scheduler, sample, output)
        return StepResult(lambda: self._draw(group, sample, output, drawn, dtype), taken.clean)

    def _deterministic(self, group: int) -> Sampler | None:
        """How a step that is not planned is taken; None: of first order."""
        fast = self.way.fast_from is not None and group >= self.way.fast_from
        return partial(dpm_solver_2m, before=self.before.get(self.parts[group])) if fast else None

    def _given(self, group: int, sample: Tensor) -> Tensor:
        """The state after a step that was computed elsewhere, or any before the last such step."""
        name = f"next.{group}.{self.parts[group]}"
        self.parts[group] += 1
        if group < self.way.begin - 1:
            return sample.detach()
        state = self.way.states[name].reshape(sample.shape).to(sample.device)
        self.keep(name, state)
        return state

    def _draw(self, group: int, sample: Tensor, output: Tensor, gaussian: Gaussian, dtype: torch.dtype) -> Tensor:
        part = self.parts[group]
        self.parts[group] += 1
        state = gaussian.mean
        if self.planned[group] and (gaussian.std > 0).any():
            drawn = [seeds.derive(seed, "step", group, part) for seed in self.row_seeds]
            noise = seeds.normal(drawn, by_row(sample, len(drawn)).shape[1:]).view_as(sample)
            state = state + gaussian.std * noise.to(state)
            self.trained.add(group)
            self.keep(f"state.{group}.{part}", checksum(by_row(sample, len(drawn))))
            self.keep(f"output.{group}.{part}", output)
        # rounded to the sampler's dtype before anything is scored, and laid out as a replay will: strides choose kernels
        state = state.to(dtype).contiguous()
        if (
            self.everything or self.planned[group : group + 2].any()
        ):  # teacher forcing needs the way into a trained step, and its outcome
            self.keep(f"next.{group}.{part}", state)
        return state

    def keep(self, name: str, tensor: Tensor) -> None:
        place = "cpu" if self.offload else tensor.device
        self.record[name] = by_row(tensor.detach(), len(self.row_seeds)).to(place, copy=True)


class Replayer:
    """Evaluates the wanted steps of recorded rows again, teacher-forcing the recorded states, and stops after the last."""

    def __init__(
        self,
        denoisers: Sequence[str],
        memo: Memo,
        kernel: Kernel,
        record: Mapping[str, Tensor],
        wanted: Sequence[int],
        parts: Mapping[int, int],
        reduction: Reduction,
        stub: StandIn,
        emit: Callable[[int, Evaluation], None],
        references: Mapping[str, Tensor] | None = None,
        supply: Mapping[str, Any] | None = None,
        last: int | None = None,
    ) -> None:
        self.denoisers = denoisers
        self.memo = memo
        self.kernel = kernel
        self.record = record  # each (b, ...)
        self.wanted = wanted  # groups
        self.parts = parts  # group -> steps that make its decision
        self.reduction = reduction
        self.stub = stub
        self.emit = emit
        self.references = references  # model outputs under the reference weights, by record name
        self.supply = supply or {}  # denoiser outputs that were computed elsewhere, by call
        self.last = max(wanted) if last is None else last  # the group after which to stop
        self.counter = Counter()
        self.calls: dict[int, int] = defaultdict(int)
        self.done: dict[int, list[Part]] = defaultdict(list)
        self.seen: dict[int, int] = defaultdict(int)
        self.outputs: dict[str, Tensor] = {}  # of this replay, under record names

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.denoisers:
            return set_up_call(self.memo, self.counter, name, forward, args, kwargs)
        group = self.counter.called()
        place = self.calls[group]
        self.calls[group] += 1
        key = f"denoised.{group}.{place}"
        if key in self.supply:
            return self.supply[key]
        if group in self.wanted:
            return self.stub.learn(name, args, kwargs, forward(*args, **kwargs))
        return self.stub(name, forward, args, kwargs, self.record, key)

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        group = self.counter.step()
        sample, output = arguments["sample"], prediction(arguments).value
        dtype = state_dtype(scheduler, sample, output)
        if group not in self.wanted:
            advance(scheduler, arguments["timestep"])
            return StepResult(lambda: self._skipped(group, sample).to(dtype), sample)
        step = self.kernel(scheduler, arguments)
        taken = step(output)
        advance(scheduler, arguments["timestep"])

        def old(values: Tensor) -> Gaussian:
            with torch.no_grad():
                return step(values.reshape(output.shape).to(output)).gaussian

        return StepResult(lambda: self._evaluate(group, sample, output, taken, old), taken.clean)

    def _skipped(self, group: int, sample: Tensor) -> Tensor:
        state = self._forced(group, sample)
        if group == self.last and self.seen[group] == self.parts[group]:
            raise Stop
        return state

    def _forced(self, group: int, sample: Tensor) -> Tensor:
        name = f"next.{group}.{self.seen[group]}"
        self.seen[group] += 1
        if name not in self.record:
            return sample.detach()
        return self.record[name].reshape(sample.shape).to(sample.device, copy=True)

    def _evaluate(
        self, group: int, sample: Tensor, output: Tensor, taken: Transition, old: Callable[[Tensor], Gaussian]
    ) -> Tensor:
        part = self.seen[group]
        state = self._forced(group, sample)
        name = f"output.{group}.{part}"
        if name in self.record:
            rows = len(self.record[name])
            found = checksum(by_row(sample, rows))
            wrong = (found != self.record[f"state.{group}.{part}"]).nonzero().flatten().tolist()
            if wrong:
                raise ReplayMismatch(
                    f"step {group}: the replay's input state differs from the rollout's in rows {wrong[:8]}"
                )
            self.outputs[name] = by_row(output.detach(), rows)
            reference = None if self.references is None else rowwise(old(self.references[name]), rows)
            self.done[group].append(
                Part(
                    by_row(state, rows),
                    rowwise(taken.gaussian, rows),
                    rowwise(old(self.record[name]), rows),
                    reference,
                    taken.dt,
                )
            )
        if self.seen[group] == self.parts[group]:
            self.emit(group, evaluate(self.done.pop(group), self.reduction))
            if group == self.last:
                raise Stop
        return state


def set_up_call(
    memo: Memo, counter: Counter, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Encoders before the loop are remembered; whatever runs after it runs as it is; neither is trained."""
    if counter.group == 0 and not counter.stepped:
        return memo.call(name, forward, args, kwargs)
    with torch.no_grad():
        return forward(*args, **kwargs)


def by_row(tensor: Tensor, rows: int) -> Tensor:
    """(rows * m, ...) -> (rows, m, ...); a tensor that has one entry a row stays; raises ValueError otherwise."""
    if tensor.shape[0] == rows:
        return tensor
    if tensor.shape[0] % rows:
        raise ValueError(
            f"a step's tensor has shape {tuple(tensor.shape)}; expected a leading size divisible by {rows} rows"
        )
    return tensor.view(rows, -1, *tensor.shape[1:])


def rowwise(gaussian: Gaussian, rows: int) -> Gaussian:
    """The same distribution with one leading entry a row."""
    mean = by_row(gaussian.mean, rows)
    if mean is gaussian.mean:
        return gaussian
    return Gaussian(mean, by_row(gaussian.std.expand_as(gaussian.mean), rows))
