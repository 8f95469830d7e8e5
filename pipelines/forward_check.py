"""What a pipeline must show before clean samples are noised again and learnt from: draws are evaluated as its own loop would.

Axes: S steps of the loop, K draws, b rows of one call.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.data import requests
from mmgrpo.types import Batch, Finding, Prompt, Trajectory
from pipelines import mixed_draws, replays
from pipelines.decisions import levels_of
from pipelines.engine import probe_batch
from pipelines.listeners import by_row
from pipelines.matching import Matched, matched
from pipelines.schedulers import Unsupported
from pipelines.settle import APART, REFUSALS, ROUNDING, shown, ways
from pipelines.stubs import Stub

if TYPE_CHECKING:
    from pipelines.forward_process import ForwardProcess

KINDS = ("zeros", "real")  # of stubs for the step that is skipped


class Witness:
    """What each step of a pipeline's own loop started from, and the denoiser's output there; by step and part."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.uneven = False  # tokens of a sample have levels of their own, such as those of a given first frame

    def __call__(self, step: int, part: int, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> None:
        state = arguments["sample"].detach().clone()
        levels = levels_of(scheduler, arguments)
        weights, self.uneven = levels.prediction.clean, self.uneven or levels.now.sigma.dim() > 0
        self.states[step, part], self.outputs[step, part] = state, matched(weights, arguments, state).output.detach()

    def state(self, step: int, part: int, like: Tensor) -> Tensor:
        """What a step started from."""
        return self.states[step, part].to(like, copy=True)

    def output(self, step: int, rows: int) -> Tensor:
        """The outputs of a step, all its parts; (b, D)."""
        found = [value for (at, _), value in self.outputs.items() if at == step]
        return torch.cat([by_row(value, rows).flatten(1) for value in found], 1)

    @property
    def last(self) -> int:
        return max(step for step, _ in self.states)


def settle(process: "ForwardProcess", prompts: Sequence[Prompt]) -> list[str]:
    """Choose the most economical call whose draws are evaluated exactly; -> notes. Raises ValueError if there is none."""
    engine, tried = process.engine, dict[str, str]()
    for form, mixed in ways(engine):
        engine.layout.form, engine.layout.mixed = form, mixed
        rows = 1 if form == "single" else min(3, engine.options.rollout_rows, engine.options.replay_rows)
        asked = [prompts[row % 2 % len(prompts)] if mixed else prompts[0] for row in range(rows)]
        for engine.stub in map(Stub, KINDS):
            way = f"{form}{', mixed' if mixed else ''}, first step {engine.stub.kind}"
            try:
                reason = difference(process, probe_batch(asked, range(rows)))
            except Unsupported as error:
                raise ValueError(f"policy.draws: {error}") from error
            except REFUSALS as error:
                reason = shown(error)
            if reason is None:
                missed = [f"not {other}: {why}" for other, why in tried.items()]
                return [f"draws: {way}", *missed, *share_forward(process, probe_batch(asked, range(rows)))]
            tried[way] = reason
    name = type(engine.pipeline).__name__
    raise ValueError(f"{name} cannot evaluate draws: {'; '.join(f'{way}: {why}' for way, why in tried.items())}")


def difference(process: "ForwardProcess", batch: Batch) -> str | None:
    """Why a draw of these rows is not what the pipeline's loop does at that state and level, or None."""
    witness = Witness()
    record, _ = process.sampled(batch, process.draws.call, witness)
    nothing = torch.zeros(len(batch), 0, dtype=torch.int64)
    part = Trajectory(batch, nothing.bool(), nothing, record)
    for step in sorted({1, (1 + witness.last) // 2, witness.last}):
        expected, found = witness.output(step, len(batch)), at_step(process, part, witness, step)
        if not torch.equal(found, expected):
            worst = float((found - expected).abs().max() / expected.abs().max())
            return f"step {step}: the output differs from that of the pipeline's own loop by {worst:.1e}, relative"
        alone = at_step(process, part.take(torch.tensor([0])), witness, step)
        error = float((alone - expected[:1]).norm() / expected[:1].norm().clamp(min=1e-30))
        if error > ROUNDING[process.engine.dtype()]:
            return f"step {step}: row 0 {APART} by {error:.1e}, relative"
    return None


def share_forward(process: "ForwardProcess", batch: Batch) -> list[str]:
    """Have rows at different levels share a forward if that is the same; -> a note on how it went."""
    if len(batch) < 2 or process.draws.sets == 1:
        return []
    witness = Witness()
    record, _ = process.sampled(batch, process.draws.call, witness)
    if witness.uneven:
        return [
            "rows at different levels are predicted one level at a time: tokens of a sample have levels of their own"
        ]
    nothing = torch.zeros(len(batch), 0, dtype=torch.int64)
    part, taken = Trajectory(batch, nothing.bool(), nothing, record), [1, witness.last]
    which = torch.arange(len(batch)) % len(taken)
    try:
        found = of_levels(process, part, witness, taken, which)
    except REFUSALS as error:
        return [f"rows at different levels are predicted one level at a time: {shown(error)}"]
    expected = torch.stack([witness.output(step, len(batch)) for step in taken])[which, torch.arange(len(batch))]
    away = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    process.mixed = away <= ROUNDING[process.engine.dtype()]
    said = "share a forward" if process.mixed else "are predicted one level at a time"
    return [f"rows at different levels {said}: it differs by {away:.1e}, relative"]


@torch.no_grad()
def of_levels(
    process: "ForwardProcess", part: Trajectory, witness: Witness, taken: Sequence[int], which: Tensor
) -> Tensor:
    """The outputs of rows that are each at one of some steps of the pipeline's own loop, in one forward; (b, D)."""
    states = [witness.states[step, 0] for step in taken]
    steps = process.engine.schedule(part.batch.prompts[0], process.draws.call)
    levels = [steps[step] for step in taken]
    found: list[Tensor] = []

    def show(draw: int, one: Matched) -> None:
        found.append(one.output.flatten(1))

    mixed_draws.predicted(process, part, states, which.unsqueeze(1), levels, taken, show, process.draws.call)
    return found[0]


def at_step(process: "ForwardProcess", part: Trajectory, witness: Witness, step: int) -> Tensor:
    """The outputs of the first rows of a call at a step of the pipeline's own loop; (b, D)."""

    def state(draw: int, piece: int, like: Tensor, frozen: Tensor | None) -> Tensor:
        return witness.state(step, piece, like)[: len(like)].reshape(like.shape)

    with torch.no_grad():
        return process.matched(part, [0, step], state, lambda draw, evaluation: None, changed=process.draws.call)[0]


def findings(process: "ForwardProcess", prompts: Sequence[Prompt]) -> list[Finding]:
    """Draws are those of the loop, replays agree to the last bit, the gradient is true and reaches every trained module."""
    count = min(2, len(prompts))
    batch = requests(prompts, range(count), group_size=2, seed=0, iteration=0)
    trajectory, _ = process.rollout(batch)
    anchored = process.anchor(trajectory, [torch.arange(len(trajectory))])
    slope = replays.gradient(process, trajectory)
    found = [
        levels_found(process, trajectory),
        parity(process, batch),
        replays.exact(process, anchored),
        reached(process, slope),
    ]
    if not found[-1].ok:
        return found
    follows = replays.follows_the_weights(process, anchored, slope)
    return [*found, replays.straight(process, anchored, slope, process.engine.dtype()), follows]


def levels_found(process: "ForwardProcess", trajectory: Trajectory) -> Finding:
    """Which shares of noise were drawn."""
    entries = trajectory.record["entry"].flatten().unique()
    shares = ", ".join(f"{float(process.noise_shares[entry]):.3f}" for entry in entries)
    return Finding(True, "draws", f"at shares of noise {shares}")


def parity(process: "ForwardProcess", batch: Batch) -> Finding:
    """A draw at a state of the pipeline's own loop is what the loop computed there."""
    form = process.engine.layout.form
    rows = torch.arange(1 if form == "single" else min(2, process.engine.options.replay_rows))
    reason = difference(process, batch.take(rows))
    return Finding(reason is None, "loop", reason or "a draw equals the pipeline's own loop to the last bit")


def reached(process: "ForwardProcess", slope: Mapping[str, Tensor]) -> Finding:
    """Gradient reaches every trained module."""
    there = {name.split(".")[0] for name, value in slope.items() if value.abs().max() > 0}
    missing = sorted(set(process.engine.layout.trained) - there)
    return Finding(
        not missing, "gradient", f"no gradient reaches {missing}" if missing else f"gradient reaches {sorted(there)}"
    )
