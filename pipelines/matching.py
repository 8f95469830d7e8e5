"""The two runs of a pipeline of the forward process: sampling with its own solver, and predicting clean samples noised again.

Axes: B rows of one call, K draws, D elements of a draw (all parts of a decision, flattened).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo import seeds
from mmgrpo.types import Evaluation, Trajectory
from pipelines.decisions import Prediction, levels_of, prediction
from pipelines.listeners import by_row, set_up_call
from pipelines.memo import Memo
from pipelines.predictions import Weights
from pipelines.schedulers import advance
from pipelines.stubs import StandIn
from pipelines.tape import Call, Counter, StepResult, Stop

Emit = Callable[[int, Evaluation], None]  # (draw, what it showed)
State = Callable[
    [int, int, Tensor, Tensor | None], Tensor
]  # (draw, part, like, frozen) -> the state that it starts from

Witness = Callable[
    [int, int, SchedulerMixin, Mapping[str, Any]], None
]  # (step, part, scheduler, arguments of its step)


class Sampling:
    """Lets a pipeline run as it is, with any solver of its scheduler, and keeps the latents that it ends with."""

    def __init__(self, denoisers: Sequence[str], memo: Memo, rows: int, witness: Witness | None = None) -> None:
        self.denoisers, self.memo, self.rows = denoisers, memo, rows
        self.witness = witness
        self.counter = Counter()
        self.part = 0  # scheduler steps since the last denoiser call
        self.record: dict[str, Tensor] = {}  # "clean.PART": (B, ...)

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.denoisers:
            return set_up_call(self.memo, self.counter, name, forward, args, kwargs)
        self.counter.called()
        self.part = 0
        return forward(*args, **kwargs)

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        group = self.counter.step()
        if self.witness is not None:
            self.witness(group, self.part, scheduler, arguments)
        stock = dict(arguments) | {"return_dict": False}
        state, *further = type(scheduler).step(stock.pop("self"), **stock)
        self.record[f"clean.{self.part}"] = by_row(state.detach(), self.rows).clone()
        self.part += 1
        return StepResult(lambda: state, further[0] if further else state)


class Matcher:
    """Runs the K draws of some rows through a pipeline whose schedule holds their levels, behind a first step that is skipped.

    At step k + 1 the denoiser sees the state of draw k; what it predicts and should have predicted is handed to `emit`.
    """

    def __init__(
        self,
        denoisers: Sequence[str],
        memo: Memo,
        count: int,
        parts: Mapping[int, int],
        clean: Mapping[int, Tensor],
        state: State,
        stub: StandIn,
        emit: Emit,
        olds: Mapping[int, Tensor],
        references: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.denoisers, self.memo, self.count, self.stub, self.emit = denoisers, memo, count, stub, emit
        self.parts = max(parts.values())  # scheduler steps of a decision
        self.clean = clean  # by part, each (B, ...)
        self.state = state
        self.olds = olds  # by draw, (B, D): outputs of the weights that sampled, NaN where today's are those
        self.references = references  # by draw, (B, D): outputs of the reference
        self.counter = Counter()
        self.calls = 0  # of denoisers in the step that is skipped
        self.part = 0  # of the decision that is going on
        self.found: list[Matched] = []  # its parts
        self.outputs: dict[int, Tensor] = {}  # by draw, (B, D), no gradient

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.denoisers:
            return set_up_call(self.memo, self.counter, name, forward, args, kwargs)
        group = self.counter.called()
        if group == 0:
            self.calls += 1
            return self.stub(name, forward, args, kwargs, {}, f"denoised.{group}.{self.calls - 1}")
        return self.stub.learn(name, args, kwargs, forward(*args, **kwargs))

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        group = self.counter.step()
        if group > self.count:
            raise ValueError(
                f"the pipeline took step {group + 1}; expected {self.count + 1}, as many as its schedule has"
            )
        sample, part = arguments["sample"], self.part
        level = levels_of(scheduler, arguments)
        if group > 0:
            self.found.append(matched(level.prediction.clean, arguments, self.clean[part].reshape(sample.shape)))
        self.part = (part + 1) % self.parts
        advance(scheduler, arguments["timestep"])
        frozen = level.now.sigma == 0 if level.now.sigma.dim() else None
        return StepResult(lambda: self._next(group, part, sample, frozen), sample)

    def _next(self, group: int, part: int, sample: Tensor, frozen: Tensor | None) -> Tensor:
        if group > 0 and part == self.parts - 1:
            self._finish(group - 1)
            self.found = []
            if group == self.count:
                raise Stop
        if group == self.count:
            return sample.detach()  # nothing comes after it
        return self.state(group, part, sample, frozen)

    def _finish(self, draw: int) -> None:
        rows = len(self.clean[0])
        output, target = (
            torch.cat([by_row(values, rows).flatten(1) for values in side], 1)
            for side in ([one.output for one in self.found], [one.target for one in self.found])
        )
        self.outputs[draw] = output.detach()
        scale = torch.stack([one.scale.mean() for one in self.found]).mean()
        reference = None if self.references is None else self.references[draw].to(output)
        self.emit(draw, evaluation(output, target, self.olds.get(draw), reference, scale))


class Matched(NamedTuple):
    """One part of a draw, at least float32."""

    output: Tensor  # the model's, of the sample's shape
    target: Tensor  # what it should have been
    scale: Tensor  # |change of the predicted clean sample by the output|: () or (b, 1)


def matched(weights: Weights, arguments: Mapping[str, Any], clean: Tensor) -> Matched:
    """A denoiser's output beside its target: the output with which the prediction at this state is the clean sample.

    The prediction is affine in state and output, so the target is (clean - weight x) / weight; elements without noise, which
    nothing is predicted of, are 0 in both.
    """
    sample, given = arguments["sample"], prediction(arguments)
    kind = torch.promote_types(torch.promote_types(sample.dtype, given.value.dtype), torch.float32)
    x, output = sample.detach().to(kind), first_half(given, sample).to(kind)
    if given.clean:
        return Matched(output, clean.to(output), torch.ones((), device=output.device))
    skip, scale = (weight.to(output) for weight in weights)
    some = (scale != 0).expand_as(output)
    target = (clean.to(output) - skip * x) / torch.where(scale == 0, 1, scale)
    size = scale.abs() if scale.dim() == 0 else scale.abs().flatten(1).mean(1, keepdim=True)
    return Matched(torch.where(some, output, 0), torch.where(some, target, 0), size)


def first_half(given: Prediction, sample: Tensor) -> Tensor:
    """The output without a learned variance in a second half of its channels."""
    value, channels = given.value, sample.shape[1] if sample.dim() > 1 else 0
    return value[:, :channels] if value.dim() > 1 and value.shape[1] == 2 * channels else value


def evaluation(
    output: Tensor, target: Tensor, old: Tensor | None, reference: Tensor | None, scale: Tensor
) -> Evaluation:
    """One draw under today's weights, old ones and those of a reference; (b, D) each -> (b, 1), three fields (b, 1, D).

    Where the old output is NaN or there is none, today's weights are those that sampled.
    """
    own = output.detach()
    before = own if old is None else torch.where(old.isnan(), own, old.to(own))

    def mean(values: Tensor) -> Tensor:
        return values.square().mean(1, keepdim=True)

    error, old_error = mean(output - target), mean(before - target)
    return Evaluation(
        log_ratio=old_error - error,
        kl=None if reference is None else mean(output - reference),
        drift=mean(output - before),
        error=error,
        old_error=old_error,
        reference_error=None if reference is None else mean(reference - target),
        clean_scale=scale.expand_as(error),
        prediction=output.unsqueeze(1),
        old_prediction=before.unsqueeze(1),
        target=target.unsqueeze(1),
    )


def cleans(record: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The latents that samples end with, by part."""
    return {int(name.split(".")[1]): value for name, value in record.items() if name.startswith("clean.")}


def olds(record: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The outputs of the weights that sampled, by draw."""
    return {int(name.split(".")[1]): value for name, value in record.items() if name.startswith("old.")}


def noise_of(part: Trajectory, draw: int, piece: int = 0) -> Tensor:
    """The noise of a draw; (b, ...) on the CPU."""
    row_seeds = [seeds.derive(seed, piece) for seed in part.record["noise"][:, draw].tolist()]
    return shared_noise(row_seeds, part.record[f"clean.{piece}"].shape[1:])


def shared_noise(row_seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard-normal noise, computed once for rows of one seed; (b, *shape) on the CPU."""
    shared = {seed: place for place, seed in enumerate(dict.fromkeys(row_seeds))}
    return seeds.normal(list(shared), shape)[[shared[seed] for seed in row_seeds]]
