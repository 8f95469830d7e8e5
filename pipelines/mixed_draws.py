"""The draws of rows at different levels, of each row one in a forward. Axes: b rows, K draws, N levels of them, D elements."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.types import Trajectory
from pipelines.batching import DenoiserCall, Unbatchable
from pipelines.engine import autocast
from pipelines.levels import Levels
from pipelines.matching import Emit, Matched, cleans, evaluation, matched, noise_of, olds
from pipelines.mixing import Collector, Supplied, forward
from pipelines.thinning import thinner

if TYPE_CHECKING:
    from pipelines.forward_process import ForwardProcess


def evaluated(
    process: "ForwardProcess", part: Trajectory, emit: Emit, references: Mapping[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """Evaluate all draws of some rows; -> the outputs of each, (b, D)."""
    levels, which = part.record["entry"].unique(return_inverse=True)  # (N,) rising, (b, K)
    taken, draws = levels.tolist(), range(which.shape[1])
    steps = [process.levels[entry] for entry in taken]
    states = noised(part, steps, which)
    calls = collected(process, part, taken, states)
    known, outputs = olds(part.record), dict[int, Tensor]()
    for draw in draws:
        found = predicted(process, part, calls, states, which[:, draw], steps, taken)
        output, target = found.output.flatten(1), found.target.flatten(1)
        outputs[draw] = output.detach()
        reference = None if references is None else references[draw].to(output)
        emit(draw, evaluation(output, target, known.get(draw), reference, found.scale))
    return outputs


def noised(part: Trajectory, steps: Sequence[Levels], which: Tensor) -> list[Tensor]:
    """The clean samples at each level, each row with the noise of its draw at that level or, if it has none, its first; N of (b, ...)."""
    clean, rows = cleans(part.record)[0], torch.arange(len(part))
    noises = torch.stack([noise_of(part, draw) for draw in range(which.shape[1])]).to(clean)  # (K, b, ...)
    found = []
    for place, step in enumerate(steps):
        noise = noises[(which == place).int().argmax(1), rows]
        found.append(step.now.alpha.to(clean) * clean + step.now.sigma.to(clean) * noise)
    return found


def collected(
    process: "ForwardProcess",
    part: Trajectory,
    taken: Sequence[int],
    states: Sequence[Tensor],
    grid: Mapping[str, object] | None = None,
) -> list[DenoiserCall]:
    """The denoiser's calls at the taken entries of a schedule, none of which is made; N of them."""
    engine = process.engine

    def state(step: int, like: Tensor) -> Tensor:
        return states[step].reshape(like.shape).to(like, copy=True)

    collector = Collector(engine.layout.denoisers, engine.memo, engine.stub, len(taken), state)
    with torch.no_grad():
        changed = process.call() if grid is None else grid
        engine.run(collector, part.batch, changed=changed, reschedule=thinner([0, *taken]))
    if len(collector.calls) != len(taken):
        raise Unbatchable(f"the pipeline's loop made {len(collector.calls)} calls at {len(taken)} levels")
    return collector.calls


def predicted(
    process: "ForwardProcess",
    part: Trajectory,
    calls: Sequence[DenoiserCall],
    states: Sequence[Tensor],
    which: Tensor,
    steps: Sequence[Levels],
    taken: Sequence[int],
    grid: Mapping[str, object] | None = None,
) -> Matched:
    """What row r predicts in its state at level which[r], (b,), and should have predicted."""
    engine = process.engine
    with autocast(engine.pipeline, engine.options.autocast):
        output = forward(calls, which)
    supplied = Supplied(engine.layout.denoisers, engine.memo, engine.stub, output, states[0])
    changed = process.call() if grid is None else grid
    engine.run(supplied, part.batch, changed=changed, reschedule=thinner([0, taken[0]]))
    sample = supplied.arguments["sample"]
    if len(sample) != len(part):
        raise Unbatchable(f"a step has {len(sample)} latents for {len(part)} samples")
    state = torch.stack(list(states))[which, torch.arange(len(part))]
    weights = [torch.stack([step.prediction.clean[side] for step in steps])[which] for side in (0, 1)]
    skip, scale = (weight.view(-1, *[1] * (sample.dim() - 1)).to(sample.device) for weight in weights)
    clean = cleans(part.record)[0].to(sample).reshape(sample.shape)
    return matched((skip, scale), {**supplied.arguments, "sample": state.reshape(sample.shape).to(sample)}, clean)
