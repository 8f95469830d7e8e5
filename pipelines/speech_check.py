"""What a speech policy must show before it is trained, on a few of the run's recordings.

Axes: B samples, S steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo import seeds
from mmgrpo.data import requests
from mmgrpo.draws import Draws
from mmgrpo.types import Batch, Finding, Prompt, Trajectory
from pipelines import recordings, replays
from pipelines.speech_flow import enhance

if TYPE_CHECKING:
    from pipelines.speech import SpeechPolicy

NEAR = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.05}  # of a recording's size


def findings(policy: "SpeechPolicy", prompts: Sequence[Prompt]) -> list[Finding]:
    """Replays agree to the last bit, have a true gradient, follow the weights; no recording depends on its neighbours."""
    batch = probe(policy, prompts)
    trajectory = probed(policy, batch)
    anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
    slope = replays.gradient(policy, trajectory)
    found = [replays.exact(policy, anchored), replays.reached(slope), noise_off(policy, batch)]
    found.append(other_rows(policy, batch, anchored))
    if not found[1].ok:
        return found
    follows = replays.follows_the_weights(policy, anchored, slope)
    return [*found, replays.straight(policy, anchored, slope, precision(policy)), follows]


def probe(policy: "SpeechPolicy", prompts: Sequence[Prompt]) -> Batch:
    """Two samples of the shortest and of the longest recording among the prompts."""
    order = sorted(range(len(prompts)), key=lambda index: recordings.length(prompts[index], policy.mixing))
    chosen = list(dict.fromkeys((order[0], order[-1])))
    return requests(prompts, chosen, group_size=2, seed=0, iteration=0)


def probed(policy: "SpeechPolicy", batch: Batch) -> Trajectory:
    """The draws of a rollout, or some of its steps, whichever are decisions."""
    if isinstance(policy.decided, Draws):
        return policy.rollout(batch)[0]
    return policy.walked(batch, policy.mixing, probed_steps(policy.options.steps))[0]


def probed_steps(steps: int) -> Tensor:
    """The first, the middle and the last step that can be trained; (S,) bool."""
    planned = torch.zeros(steps, dtype=torch.bool)
    planned[[0, (steps - 1) // 2, max(0, steps - 2)]] = True
    return planned


def precision(policy: "SpeechPolicy") -> torch.dtype:
    """In which the network computes."""
    return policy.options.autocast or next(policy.model.network.parameters()).dtype


def noise_off(policy: "SpeechPolicy", batch: Batch) -> Finding:
    """With the noise off a recording is what the plain Euler sampler makes of it from the same seed."""
    if precision(policy) is not torch.float32:
        return Finding(True, "noise off", f"not measured: the plain sampler does not compute in {precision(policy)}")
    alone = batch.take(torch.tensor([0]))
    ours = policy.walked(alone, policy.mixing, torch.zeros(policy.options.steps, dtype=torch.bool))[1].audio
    assert ours is not None
    start = seeds.derive(batch.seed, policy.starts(alone)[0], "start")
    noisy = recordings.hear(alone, policy.mixing).noisy.to(policy.steps.device)
    plain = enhance(policy.model, noisy, policy.options.steps, [start], policy.options.power).clamp(-1, 1).cpu()
    error = relative(ours[:, 0], plain)
    said = f"differs from the plain Euler sampler by {error:.1e}, relative"
    return Finding(error < NEAR[torch.float32], "noise off", said)


def other_rows(policy: "SpeechPolicy", batch: Batch, anchored: Trajectory) -> Finding:
    """A recording is enhanced and evaluated alone as it is beside others, up to the rounding of another batch shape."""
    alone = torch.tensor([len(batch) - 1])
    together, single = policy.generate(batch), policy.generate(batch.take(alone))
    assert together.audio is not None and single.audio is not None and single.audio_length is not None
    length = int(single.audio_length)
    error = relative(single.audio[0, 0, :length], together.audio[alone[0], 0, :length])
    worst = replays.largest(policy, anchored.take(alone))
    said = f"alone a recording differs by {error:.1e}, relative, and its log-ratio by {worst:.1e}"
    return Finding(error < NEAR[precision(policy)], "other rows", said)


def relative(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).norm() / other.norm().clamp_min(1e-30))
