"""What a hybrid policy must show before it is trained, on a few of the run's prompts. Axes: B samples, J images, K steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.data import requests
from mmgrpo.types import KINDS, Batch, Chunk, Finding, Prompt, Trajectory
from pipelines import replays
from pipelines.hybrid_evaluation import found_of
from pipelines.hybrid_layout import Pair
from pipelines.hybrid_writing import Written

if TYPE_CHECKING:
    from pipelines.interleaved_hybrid import HybridPolicy

NEAR = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.05}  # of an image's size


def findings(policy: "HybridPolicy", prompts: Sequence[Prompt]) -> list[Finding]:
    """Replays agree to the last bit, have a true gradient, follow the weights; images are Euler's without the sampler's noise."""
    batch = requests(prompts[:2], range(len(prompts[:2])), group_size=2, seed=0, iteration=0)
    trajectory, _ = policy.walked(batch, policy.decided.probed())
    anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
    slope = replays.gradient(policy, trajectory)
    found = [replays.exact(policy, anchored), replays.reached(slope), drawn(trajectory), noise_off(policy, batch)]
    found += missed(policy, trajectory)
    if not found[1].ok:
        return found
    follows = replays.follows_the_weights(policy, anchored, slope)
    return [*found, replays.straight(policy, anchored, slope, precision(policy)), follows]


def precision(policy: "HybridPolicy") -> torch.dtype:
    """In which the model computes."""
    return policy.options.autocast or next(policy.model.parameters()).dtype


def drawn(trajectory: Trajectory) -> Finding:
    """How many images the start draws by itself; without any its images cannot be trained."""
    there = trajectory.record["drawn"]
    said = f"{int(there.sum())} in {len(there)} answers; room for {there.shape[1]} in each"
    return Finding(True, "images", said)


@torch.no_grad()
def missed(policy: "HybridPolicy", trajectory: Trajectory) -> list[Finding]:
    """How far the velocities of draws are from their targets, and how far outputs of 0 would be; of steps nothing."""
    trained = trajectory.mask & (trajectory.kind == KINDS["draw"])
    errors: list[Tensor] = []

    def consume(chunk: Chunk) -> None:
        where, found = trained[chunk.rows.unsqueeze(1), chunk.steps], chunk.evaluation
        if found.error is not None and found.target is not None:
            both = torch.stack([found.error, found.target.square().mean(2)], 2)  # (b, s, 2)
            errors.append(both[where.to(both.device)].double().cpu())

    if not trained.any():
        return []
    policy.replay(trajectory, consume)
    own, zero = torch.cat(errors).mean(0).tolist()
    said = f"mean squared error of the velocities {own:.3g}, of outputs of 0 {zero:.3g}; a trained model's is below"
    return [Finding(True, "draws", said)]


@torch.no_grad()
def noise_off(policy: "HybridPolicy", batch: Batch) -> Finding:
    """Without the sampler's noise an image is what Euler's method makes of whole answers read anew in every step."""
    written = policy.written(batch, None)
    drawn = written.answers.shape.drawn
    if not drawn.any():
        return Finding(True, "noise off", "not measured: the answers hold no image")
    plain = euler(policy, batch, written)
    error = float((written.state[:, :, -1] - plain)[drawn].norm() / plain[drawn].norm().clamp_min(1e-30))
    said = f"images differ from Euler's method on whole answers by {error:.1e}, relative"
    return Finding(error < NEAR[precision(policy)], "noise off", said)


def euler(policy: "HybridPolicy", batch: Batch, written: Written) -> Tensor:
    """The images of given answers again, from the same noise, by x + (t' - t) v, nothing remembered; (B, J, C, H, W)."""
    state, levels = written.state.clone(), policy.steps.levels
    answers = written.answers.to(policy.device)
    for step in range(policy.steps.count):
        pairs = [Pair(image, step) for image in range(int(written.answers.shape.drawn.any(0).sum()))]
        noisy = policy.steps.noisy(state, pairs, answers.clean)
        with policy.precision():
            found = found_of(
                policy.model, policy.room, policy.prompts(batch), answers, noisy, pairs, False, policy.marks, 1.0
            )
        for place, (image, _) in enumerate(pairs):
            length = float(levels[step + 1].sigma - levels[step].sigma)
            state[:, image, step + 1] = state[:, image, step] + length * found.velocity[:, place].to(state)
    return state[:, :, -1]
