"""The draws of rows at different levels, of each row one in a forward. Axes: b rows, K draws, N levels of them, D elements."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmgrpo.types import Trajectory
from pipelines.batching import Unbatchable
from pipelines.levels import Levels
from pipelines.matching import Emit, Matched, cleans, evaluation, matched, noise_of, olds
from pipelines.mixing import Mixing
from pipelines.thinning import thinner

if TYPE_CHECKING:
    from pipelines.forward_process import ForwardProcess


def evaluated(
    process: "ForwardProcess", part: Trajectory, emit: Emit, references: Mapping[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """Evaluate all draws of some rows; -> the outputs of each, (b, D)."""
    levels, which = part.record["entry"].unique(return_inverse=True)  # (N,) rising, (b, K)
    taken = levels.tolist()
    steps = [process.levels[entry] for entry in taken]
    known, outputs = olds(part.record), dict[int, Tensor]()

    def show(draw: int, found: Matched) -> None:
        output, target = found.output.flatten(1), found.target.flatten(1)
        outputs[draw] = output.detach()
        reference = None if references is None else references[draw].to(output)
        emit(draw, evaluation(output, target, known.get(draw), reference, found.scale))

    predicted(process, part, noised(part, steps, which), which, steps, taken, show)
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


def predicted(
    process: "ForwardProcess",
    part: Trajectory,
    states: Sequence[Tensor],
    which: Tensor,
    steps: Sequence[Levels],
    taken: Sequence[int],
    show: Callable[[int, Matched], None],
    changed: Mapping[str, object] | None = None,
) -> None:
    """What row r predicts in its state at level which[r, k], (b, K), and should have predicted, one draw after the other.

    The levels are the taken entries of the fine schedule, or of that of changed arguments. Raises Unbatchable.
    """
    engine, rows, draws = process.engine, torch.arange(len(part)), which.shape[1]
    clean, at_levels = cleans(part.record)[0], torch.stack(list(states))
    weights = [torch.stack([step.prediction.clean[side] for step in steps]) for side in (0, 1)]
    shown: list[int] = []

    def match(draw: int, arguments: Mapping[str, Any]) -> None:
        sample, level = arguments["sample"], which[:, draw]
        if len(sample) != len(part):
            raise Unbatchable(f"a step has {len(sample)} latents for {len(part)} samples")
        state = at_levels[level, rows].reshape(sample.shape).to(sample)
        skip, scale = (side[level].view(-1, *[1] * (sample.dim() - 1)).to(sample.device) for side in weights)
        shown.append(draw)
        show(draw, matched((skip, scale), {**arguments, "sample": state}, clean.to(sample).reshape(sample.shape)))

    mixing = Mixing(engine.layout.denoisers, engine.memo, engine.stub, states, which, match)
    asked = process.call() if changed is None else changed
    engine.run(mixing, part.batch, changed=asked, reschedule=thinner([0, *taken, *[taken[-1]] * draws]))
    if len(shown) != draws:
        raise Unbatchable(f"the pipeline's loop evaluated {len(shown)} of {draws} draws behind {len(taken)} levels")
