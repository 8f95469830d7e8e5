"""What a pipeline must show before it is trained: exact replay, true gradients, the stock sampler when the noise is off.

Axes: S decisions, b rows of one call.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.types import Batch, Chunk, Finding, Prompt, Trajectory
from pipelines import arguments
from pipelines.batching import Unbatchable
from pipelines.engine import Engine, probe_batch
from pipelines.first_order import NoFirstOrder, first_order
from pipelines.listeners import ReplayMismatch, Stub
from pipelines.tape import Call, StepResult

ENDS = "the first and last row"
ALONE = "a step without those before it"
APART = "alone differs from the row in a batch"
REFUSED = "refused"
ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # relative, between two batch shapes
REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    AttributeError,
    KeyError,
    NotImplementedError,
    AssertionError,
)


def settle(engine: Engine, prompts: Sequence[Prompt]) -> list[str]:
    """Choose the most economical way to run the pipeline that replays exactly; -> notes.

    Ways: rows of several prompts in one call, rows of one prompt, a prompt repeated by the pipeline, one row at a time;
    each with denoisers of unwanted steps replaced by zeros, by their recorded outputs, or run, and with rows anywhere in
    a call or at their recorded place. Raises ValueError with what differed and at which step if none does.
    """
    tried: dict[str, str] = {}  # way -> why it does not replay exactly
    asked_steps = engine.options.replay_steps
    engine.options = replace(engine.options, replay_steps=1)
    for form, mixed in ways(engine):
        engine.layout.form, engine.layout.mixed, engine.layout.seated = form, mixed, False
        rows = 1 if form == "single" else min(3, engine.options.rollout_rows)
        asked = [prompts[row % 2 % len(prompts)] if mixed else prompts[0] for row in range(rows)]
        for engine.stub in map(Stub, Stub.LADDER):
            reason = attempt(engine, probe_batch(asked, range(rows)))
            if reason is None:
                way = (
                    f"{form}{' of mixed prompts' if mixed else ''}{' at fixed places' if engine.layout.seated else ''}"
                )
                return [
                    f"replay: {way}, unwanted steps {engine.stub.kind}",
                    *(f"not {way}: {reason}" for way, reason in tried.items()),
                    *share_forward(engine, asked, asked_steps),
                ]
            tried[f"{form}{', mixed' if mixed else ''}, unwanted steps {engine.stub.kind}"] = reason
            if APART in reason or reason.startswith(REFUSED):  # nothing that a stub decides
                break
    same = set(tried.values()) if len(set(tried.values())) == 1 else [f"{way}: {why}" for way, why in tried.items()]
    raise ValueError(f"{type(engine.pipeline).__name__} cannot be replayed exactly: {'; '.join(same)}")


def attempt(engine: Engine, batch: Batch) -> str | None:
    """Why this way does not replay exactly, or None; notes in the layout if rows must keep their places."""
    try:
        reason = difference(engine, batch)
        if reason is not None and ENDS in reason:
            engine.layout.seated = True
            reason = difference(engine, batch)
    except (ReplayMismatch, *REFUSALS) as error:  # pipelines refuse unsupported batches in any of these ways
        return shown(error)
    return reason


def shown(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def share_forward(engine: Engine, prompts: Sequence[Prompt], steps: int) -> list[str]:
    """Try to replay so many steps in one forward; -> a note on how it went."""
    if steps == 1:
        return []
    trajectory, _ = engine.rollout(probe_batch(prompts, range(len(prompts))), engine.planned)
    engine.options = replace(engine.options, replay_steps=steps)
    try:
        reason = apart(engine, trajectory)
        worst = max(
            float(log_ratios(engine, part).abs().max()) for part in (trajectory, trajectory.take(ends(trajectory)))
        )
    except (Unbatchable, *REFUSALS) as error:  # modules refuse unsupported batches in any of these ways
        reason = " ".join(str(error).split())[:200]
    if reason is not None:
        engine.options = replace(engine.options, replay_steps=1)
        return [f"steps are replayed one at a time: {reason}"]
    engine.layout.anchored = True  # exact here says nothing of calls of another size
    return [
        f"{steps} steps share a forward, which moved the log-ratio by {worst:.1e}; old outputs are taken from a replay"
    ]


def ways(engine: Engine) -> Iterator[tuple[arguments.Form, bool]]:
    """Forms of a call, and whether rows of several prompts share it."""
    for form in arguments.forms(engine.pipeline):
        if engine.options.rollout_rows == 1 and form != "single":
            continue
        if form == "list":
            yield form, True
        yield form, False


def difference(engine: Engine, batch: Batch) -> str | None:
    """Why a replay of these rows is not their rollout, or None: all rows, a part of them, a step alone, each row alone."""
    try:
        trajectory, _ = engine.rollout(batch, engine.planned)
    except REFUSALS as error:
        return f"{REFUSED}, {shown(error)}"
    if not trajectory.mask.any():
        return "no step is stochastic"
    last = int(trajectory.mask.any(0).nonzero().max())
    parts = {"all rows": trajectory, ENDS: trajectory.take(ends(trajectory)), ALONE: only(trajectory, last)}
    for name, part in parts.items():
        worst = log_ratios(engine, part).abs()
        if worst.max() != 0:
            step = int(worst.amax(0).argmax())
            return f"step {step}: log-ratio {float(worst.max()):.2e} instead of 0 for {name}"
    return apart(engine, trajectory)


def apart(engine: Engine, trajectory: Trajectory) -> str | None:
    """Whether a row's model outputs in a batch differ from those of the row alone by more than rounding."""
    tolerance = ROUNDING[engine.dtype()]
    for row in range(len(trajectory)):
        alone = trajectory.take(torch.tensor([row]))
        for name, output in engine.outputs(alone).items():
            expected = trajectory.record[name][row : row + 1].float()
            error = float((output.float() - expected).norm() / expected.norm().clamp(min=1e-30))
            if error > tolerance:
                return f"{name}: row {row} {APART} by {error:.1e}, relative"
    return None


def ends(trajectory: Trajectory) -> Tensor:
    return torch.tensor(sorted({0, len(trajectory) - 1}))


@torch.no_grad()
def log_ratios(engine: Engine, trajectory: Trajectory) -> Tensor:
    """Log-ratios of a trajectory under today's weights; (B, S), 0 where nothing is trained."""
    found = torch.zeros(trajectory.mask.shape)

    def consume(chunk: Chunk) -> None:
        found[chunk.rows.unsqueeze(1), chunk.steps] = chunk.evaluation.log_ratio.float().cpu()

    engine.replay(trajectory, consume)
    return found


def findings(engine: Engine, prompts: Sequence[Prompt]) -> list[Finding]:
    """The four parts of the self-test in the recipe's dtype, guidance and batch shape."""
    rows = engine.options.rollout_rows
    batch = probe_batch([prompts[row % len(prompts)] for row in range(min(rows, 4))], range(min(rows, 4)))
    trajectory, _ = engine.rollout(batch, engine.planned)
    return [
        replay_is_exact(engine, trajectory),
        *gradients_are_true(engine, trajectory),
        noise_off_is_stock(engine, batch.take(torch.tensor([0]))),
        other_batch(engine, trajectory),
    ]


def replay_is_exact(engine: Engine, trajectory: Trajectory) -> Finding:
    worst = log_ratios(engine, trajectory).abs().amax(0)
    steps = trajectory.mask.any(0).nonzero().flatten().tolist()
    if worst.max() == 0:
        return Finding(True, "replay", f"log-ratio exactly 0 at steps {steps}")
    step = int(worst.argmax())
    return Finding(False, "replay", f"log-ratio {float(worst[step]):.2e} at step {step}; expected exactly 0")


def gradients_are_true(engine: Engine, trajectory: Trajectory) -> list[Finding]:
    """Gradient reaches every trained module, and a finite difference of the log-ratio along it agrees."""
    steps = trajectory.mask.any(0).nonzero().flatten().tolist()
    found, reached = [], set()
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        gradient = step_gradient(engine, trajectory, step)
        reached |= {name.split(".")[0] for name, value in gradient.items() if value.abs().max() > 0}
        found.append(finite_difference(engine, trajectory, step, gradient))
    missing = sorted(set(engine.layout.trained) - reached)
    detail = f"no gradient reaches {missing}" if missing else f"gradient reaches {sorted(reached)}"
    return [Finding(not missing, "gradient", detail), *found]


def step_gradient(engine: Engine, trajectory: Trajectory, step: int) -> dict[str, Tensor]:
    """Gradient of the summed log-ratio of one step; leaves no gradient behind."""
    engine.replay(only(trajectory, step), lambda chunk: chunk.evaluation.log_ratio.sum().backward())
    parameters = engine.trainable()
    gradient = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    for value in parameters.values():
        value.grad = None
    return gradient


def only(trajectory: Trajectory, step: int) -> Trajectory:
    mask = torch.zeros_like(trajectory.mask)
    mask[:, step] = trajectory.mask[:, step]
    return Trajectory(trajectory.batch, mask, trajectory.kind, trajectory.record)


def finite_difference(engine: Engine, trajectory: Trajectory, step: int, gradient: Mapping[str, Tensor]) -> Finding:
    """The slope of the log-ratio along its gradient, measured from both sides; needs float32 weights."""
    name = f"finite difference, step {step}"
    parameters = {key: engine.trainable()[key] for key in gradient}
    if engine.dtype() not in (torch.float32, torch.float64):  # also where float32 adapters sit on weights of less
        return Finding(True, name, f"not measured: {engine.dtype()} rounds a small move of the weights away")
    norm = torch.stack([value.double().norm() for value in gradient.values()]).norm()
    if norm == 0:
        return Finding(False, name, "the gradient is zero")
    size = torch.stack([value.detach().double().square().mean() for value in parameters.values()]).mean().sqrt()
    reach = float(1e-3 * size / norm * len(parameters) ** 0.5)
    error = math.inf
    for factor in (1.0, 0.1, 0.01, 0.001):  # the first at which the log-ratio is straight enough
        if error >= 0.05:
            with moved(parameters, gradient, factor * reach):
                above = log_ratios(engine, only(trajectory, step)).sum()
            with moved(parameters, gradient, -factor * reach):
                below = log_ratios(engine, only(trajectory, step)).sum()
            slope = float(above - below) / (2 * factor * reach)
            error = min(error, abs(slope / float(norm) ** 2 - 1))
    return Finding(error < 0.05, name, f"slope along the gradient differs by {error:.1%} from the gradient's")


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
def noise_off_is_stock(engine: Engine, batch: Batch) -> Finding:
    """With the noise off the recording sampler and the stock first-order one pass through the same states.

    The second stage of a two-stage solver is a step that stays where it is; it has no counterpart.
    """
    ours, stock = engine.noise_off_states(batch), Watcher()
    try:
        with engine.tape.schedulers_replaced(first_order):
            engine.run(stock, batch)
    except NoFirstOrder as error:
        return Finding(True, "noise off", f"not measured: {error}")
    ours = [state for number, state in enumerate(ours) if number == 0 or not torch.equal(state, ours[number - 1])]
    if len(ours) != len(stock.states):
        return Finding(False, "noise off", f"{len(ours)} steps of ours, {len(stock.states)} of the stock sampler")
    errors = [relative(mine, theirs) for mine, theirs in zip(ours, stock.states, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    tolerance = ROUNDING[engine.dtype()]
    detail = f"differs from the stock first-order sampler by {errors[worst]:.1e}, relative, at step {worst}"
    return Finding(errors[worst] < tolerance, "noise off", detail)


def relative(ours: Tensor, stock: Tensor) -> float:
    return float((ours.float() - stock.float()).norm() / stock.float().norm().clamp(min=1e-30))


def other_batch(engine: Engine, trajectory: Trajectory) -> Finding:
    """The rounding that another batch shape brings; reported, and the reason for replaying in the recorded shape."""
    rows, seat = (trajectory.record[name] for name in ("rows", "seat"))
    alone = {**trajectory.record, "rows": torch.ones_like(rows), "seat": torch.zeros_like(seat)}
    worst = float(log_ratios(engine, replace(trajectory, record=alone)).abs().max())
    return Finding(True, "batch shape", f"one row at a time moves the log-ratio by up to {worst:.1e}")
