"""What a pipeline must show before it is trained: exact replay, true gradients, the stock sampler when the noise is off.

Axes: S decisions, b rows of one call.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.types import Batch, Finding, Prompt, Trajectory
from pipelines import guides
from pipelines.engine import probe_batch
from pipelines.first_order import NoFirstOrder, first_order
from pipelines.replays import LENGTHS, STRAIGHT
from pipelines.settle import ROUNDING, log_ratios, only
from pipelines.tape import Call, StepResult

if TYPE_CHECKING:
    from pipelines.reverse_process import ReverseProcess


def findings(process: "ReverseProcess", prompts: Sequence[Prompt]) -> list[Finding]:
    """The four parts of the self-test in the recipe's dtype, guidance and batch shape."""
    rows = process.engine.options.rollout_rows
    batch = probe_batch([prompts[row % len(prompts)] for row in range(min(rows, 4))], range(min(rows, 4)))
    trajectory, _ = process.walked(batch, process.engine.planned)
    return [
        replay_is_exact(process, trajectory),
        *gradients_are_true(process, trajectory),
        noise_off_is_stock(process, batch.take(torch.tensor([0]))),
        other_batch(process, trajectory),
        *guides.findings(trajectory),
    ]


def replay_is_exact(process: "ReverseProcess", trajectory: Trajectory) -> Finding:
    worst = log_ratios(process, trajectory).abs().amax(0)
    steps = trajectory.mask.any(0).nonzero().flatten().tolist()
    if worst.max() == 0:
        return Finding(True, "replay", f"log-ratio exactly 0 at steps {steps}")
    step = int(worst.argmax())
    return Finding(False, "replay", f"log-ratio {float(worst[step]):.2e} at step {step}; expected exactly 0")


def gradients_are_true(process: "ReverseProcess", trajectory: Trajectory) -> list[Finding]:
    """Gradient reaches every trained module, and a finite difference of the log-ratio along it agrees."""
    steps = trajectory.mask.any(0).nonzero().flatten().tolist()
    found, reached = [], set()
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        gradient = step_gradient(process, trajectory, step)
        reached |= {name.split(".")[0] for name, value in gradient.items() if value.abs().max() > 0}
        found.append(finite_difference(process, trajectory, step, gradient))
    missing = sorted(set(process.engine.layout.trained) - reached)
    detail = f"no gradient reaches {missing}" if missing else f"gradient reaches {sorted(reached)}"
    return [Finding(not missing, "gradient", detail), *found]


def step_gradient(process: "ReverseProcess", trajectory: Trajectory, step: int) -> dict[str, Tensor]:
    """Gradient of the summed log-ratio of one step; leaves no gradient behind."""
    process.replay(only(trajectory, step), lambda chunk: chunk.evaluation.log_ratio.sum().backward())
    parameters = process.engine.trainable()
    gradient = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    for value in parameters.values():
        value.grad = None
    return gradient


def finite_difference(
    process: "ReverseProcess", trajectory: Trajectory, step: int, gradient: Mapping[str, Tensor]
) -> Finding:
    """The slope of the log-ratio along its gradient, measured from both sides; needs float32 weights."""
    name = f"finite difference, step {step}"
    parameters = {key: process.engine.trainable()[key] for key in gradient}
    if process.engine.dtype() not in (
        torch.float32,
        torch.float64,
    ):  # also where float32 adapters sit on weights of less
        return Finding(True, name, f"not measured: {process.engine.dtype()} rounds a small move of the weights away")
    norm = torch.stack([value.double().norm() for value in gradient.values()]).norm()
    if norm == 0:
        return Finding(False, name, "the gradient is zero")
    size = torch.stack([value.detach().double().square().mean() for value in parameters.values()]).mean().sqrt()
    reach = float(1e-3 * size / norm * len(parameters) ** 0.5)
    error = math.inf
    for factor in LENGTHS:  # the first at which the log-ratio is straight enough
        if error >= STRAIGHT:
            with moved(parameters, gradient, factor * reach):
                above = log_ratios(process, only(trajectory, step)).sum()
            with moved(parameters, gradient, -factor * reach):
                below = log_ratios(process, only(trajectory, step)).sum()
            slope = float(above - below) / (2 * factor * reach)
            error = min(error, abs(slope / float(norm) ** 2 - 1))
    return Finding(error < STRAIGHT, name, f"slope along the gradient differs by {error:.1%} from the gradient's")


@contextmanager
def moved(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], by: float) -> Iterator[None]:
    """Within the context the parameters are moved; they come back bit for bit."""
    originals = {name: value.data for name, value in parameters.items()}
    for name, value in parameters.items():
        value.data = value.data + by * direction[name].to(value)
    try:
        yield
    finally:
        for name, value in parameters.items():
            value.data = originals[name]


class Watcher:
    """Takes stock steps and keeps every next state."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)

    def step(self, scheduler: SchedulerMixin, given: Mapping[str, Any]) -> StepResult:
        stock = dict(given) | {"return_dict": False} | ({"eta": 0.0} if "eta" in given else {})
        channels = given["sample"].shape[1]
        if (
            given["model_output"].shape[1] == 2 * channels
        ):  # a learned variance, which a deterministic sampler has no use for
            stock["model_output"] = given["model_output"][:, :channels]
        state, *_ = type(scheduler).step(stock.pop("self"), **stock)
        self.states.append(state)
        return StepResult(lambda: state, state)


@torch.no_grad()
def noise_off_is_stock(process: "ReverseProcess", batch: Batch) -> Finding:
    """With the noise off the recording sampler and the stock first-order one pass through the same states.

    The second stage of a two-stage solver is a step that stays where it is; it has no counterpart.
    """
    ours, stock = process.noise_off_states(batch), Watcher()
    try:
        with process.engine.tape.schedulers_replaced(first_order):
            process.engine.run(stock, batch)
    except NoFirstOrder as error:
        return Finding(True, "noise off", f"not measured: {error}")
    ours = [state for number, state in enumerate(ours) if number == 0 or not torch.equal(state, ours[number - 1])]
    if len(ours) != len(stock.states):
        return Finding(False, "noise off", f"{len(ours)} steps of ours, {len(stock.states)} of the stock sampler")
    errors = [relative(mine, theirs) for mine, theirs in zip(ours, stock.states, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    tolerance = ROUNDING[process.engine.dtype()]
    detail = f"differs from the stock first-order sampler by {errors[worst]:.1e}, relative, at step {worst}"
    return Finding(errors[worst] < tolerance, "noise off", detail)


def relative(ours: Tensor, stock: Tensor) -> float:
    return float((ours.float() - stock.float()).norm() / stock.float().norm().clamp(min=1e-30))


def other_batch(process: "ReverseProcess", trajectory: Trajectory) -> Finding:
    """The rounding that another batch shape brings; reported, and the reason for replaying in the recorded shape."""
    rows, seat = (trajectory.record[name] for name in ("rows", "seat"))
    alone = {**trajectory.record, "rows": torch.ones_like(rows), "seat": torch.zeros_like(seat)}
    worst = float(log_ratios(process, replace(trajectory, record=alone)).abs().max())
    return Finding(True, "batch shape", f"one row at a time moves the log-ratio by up to {worst:.1e}")
