"""The most economical way to run a pipeline that replays exactly, found by trying.

Axes: S decisions, b rows of one call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.types import Batch, Chunk, Prompt, Trajectory
from pipelines import arguments
from pipelines.engine import Engine, probe_batch
from pipelines.stubs import Stub

if TYPE_CHECKING:
    from pipelines.reverse_process import ReverseProcess

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
REFUSALS = (  # how pipelines and their modules turn down a batch that they do not support
    ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError
)  # fmt: skip


def settle(process: "ReverseProcess", prompts: Sequence[Prompt]) -> list[str]:
    """Choose the most economical way to run the pipeline that replays exactly; -> notes.

    Ways: rows of several prompts in one call, rows of one prompt, a prompt repeated by the pipeline, one row at a time;
    each with denoisers of unwanted steps replaced by zeros, by their recorded outputs, or run, and with rows anywhere in
    a call or at their recorded place. Raises ValueError with what differed and at which step if none does.
    """
    tried: dict[str, str] = {}  # way -> why it does not replay exactly
    asked_steps = process.engine.options.replay_steps
    process.engine.options = replace(process.engine.options, replay_steps=1)
    for form, mixed in ways(process.engine):
        process.engine.layout.form, process.engine.layout.mixed = form, mixed
        rows = 1 if form == "single" else min(3, process.engine.options.rollout_rows)
        asked = [prompts[row % 2 % len(prompts)] if mixed else prompts[0] for row in range(rows)]
        for process.engine.stub in map(Stub, Stub.LADDER):
            reason = attempt(process, probe_batch(asked, range(rows)))
            if reason is None:
                kept = ", rows at fixed places" if process.engine.layout.seated else ""
                return [
                    f"replay: {form}{', mixed' if mixed else ''}, unwanted steps {process.engine.stub.kind}{kept}",
                    *(f"not {way}: {reason}" for way, reason in tried.items()),
                    *share_forward(process, asked, asked_steps),
                ]
            tried[f"{form}{', mixed' if mixed else ''}, unwanted steps {process.engine.stub.kind}"] = reason
            if APART in reason or reason.startswith(REFUSED):  # nothing that a stub decides
                break
    same = set(tried.values()) if len(set(tried.values())) == 1 else [f"{way}: {why}" for way, why in tried.items()]
    raise ValueError(f"{type(process.engine.pipeline).__name__} cannot be replayed exactly: {'; '.join(same)}")


def attempt(process: "ReverseProcess", batch: Batch) -> str | None:
    """Why this way does not replay exactly, or None; notes in the layout if rows must keep their places."""
    process.engine.layout.seated = False
    try:
        reason = difference(process, batch)
        if reason is not None and ENDS in reason:
            process.engine.layout.seated = True
            reason = difference(process, batch)
    except REFUSALS as error:
        return shown(error)
    return reason


def shown(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def share_forward(process: "ReverseProcess", prompts: Sequence[Prompt], steps: int) -> list[str]:
    """Try to replay so many steps in one forward; -> a note on how it went."""
    if steps == 1:
        return []
    trajectory, _ = process.walked(probe_batch(prompts, range(len(prompts))), process.engine.planned)
    process.engine.options = replace(process.engine.options, replay_steps=steps)
    try:
        reason = apart(process, trajectory)
        worst = max(
            float(log_ratios(process, part).abs().max()) for part in (trajectory, trajectory.take(ends(trajectory)))
        )
    except REFUSALS as error:
        reason = shown(error)
    if reason is not None:
        process.engine.options = replace(process.engine.options, replay_steps=1)
        return [f"steps are replayed one at a time: {reason}"]
    process.engine.layout.anchored = True  # exact here says nothing of calls of another size
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


def difference(process: "ReverseProcess", batch: Batch) -> str | None:
    """Why a replay of these rows is not their rollout, or None: all rows, a part of them, a step alone, each row alone."""
    try:
        trajectory, _ = process.walked(batch, process.engine.planned)
    except REFUSALS as error:
        return f"{REFUSED}, {shown(error)}"
    if not trajectory.mask.any():
        return "no step is stochastic"
    last = int(trajectory.mask.any(0).nonzero().max())
    parts = {"all rows": trajectory, ENDS: trajectory.take(ends(trajectory)), ALONE: only(trajectory, last)}
    for name, part in parts.items():
        worst = log_ratios(process, part).abs()
        if worst.max() != 0:
            step = int(worst.amax(0).argmax())
            return f"step {step}: log-ratio {float(worst.max()):.2e} instead of 0 for {name}"
    return apart(process, trajectory)


def apart(process: "ReverseProcess", trajectory: Trajectory) -> str | None:
    """Whether a row's model outputs in a batch differ from those of the row alone by more than rounding."""
    tolerance = ROUNDING[process.engine.dtype()]
    for row in range(len(trajectory)):
        alone = trajectory.take(torch.tensor([row]))
        for name, output in process.outputs(alone).items():
            expected = trajectory.record[name][row : row + 1].float()
            error = float((output.float() - expected).norm() / expected.norm().clamp(min=1e-30))
            if error > tolerance:
                return f"{name}: row {row} {APART} by {error:.1e}, relative"
    return None


def ends(trajectory: Trajectory) -> Tensor:
    return torch.tensor(sorted({0, len(trajectory) - 1}))


@torch.no_grad()
def log_ratios(process: "ReverseProcess", trajectory: Trajectory) -> Tensor:
    """Log-ratios of a trajectory under today's weights; (B, S), 0 where nothing is trained."""
    found = torch.zeros(trajectory.mask.shape)

    def consume(chunk: Chunk) -> None:
        found[chunk.rows.unsqueeze(1), chunk.steps] = chunk.evaluation.log_ratio.float().cpu()

    process.replay(trajectory, consume)
    return found


def only(trajectory: Trajectory, step: int) -> Trajectory:
    mask = torch.zeros_like(trajectory.mask)
    mask[:, step] = trajectory.mask[:, step]
    return Trajectory(trajectory.batch, mask, trajectory.kind, trajectory.record)
