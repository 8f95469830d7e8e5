"""What the replays of any policy must show before it is trained: exactness, a true gradient, a ratio that follows the weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from mmgrpo.types import Consumer, Finding, Trajectory

STRAIGHT = 0.05  # by which a finite difference may miss the gradient
LENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of the moves that are tried: a long one bends, a short one rounds


class Replayed(Protocol):
    """What of a policy is examined here."""

    def replay(self, trajectory: Trajectory, consume: Consumer) -> None: ...

    def trainable(self) -> dict[str, Parameter]: ...


def largest(policy: Replayed, trajectory: Trajectory) -> float:
    """The largest |log-ratio| of a replay, over the decisions that it evaluates."""
    worst: list[Tensor] = []
    with torch.no_grad():
        policy.replay(trajectory, lambda chunk: worst.append(chunk.evaluation.log_ratio.abs().max()))
    return float(torch.stack(worst).max())


def total(policy: Replayed, trajectory: Trajectory) -> Tensor:
    """The sum of all log-ratios of a replay, float64; ()."""
    parts: list[Tensor] = []
    with torch.no_grad():
        policy.replay(trajectory, lambda chunk: parts.append(chunk.evaluation.log_ratio.double().sum()))
    return torch.stack(parts).sum()


def gradient(policy: Replayed, trajectory: Trajectory) -> dict[str, Tensor]:
    """Of the sum of all log-ratios, by parameter, at least float32; leaves no gradient behind."""
    policy.replay(trajectory, lambda chunk: chunk.evaluation.log_ratio.sum().backward())
    trained = policy.trainable()
    found = {
        name: value.grad.to(torch.promote_types(value.grad.dtype, torch.float32))
        for name, value in trained.items()
        if value.grad is not None
    }
    for value in trained.values():
        value.grad = None
    return found


def norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm over all parameters; ()."""
    return torch.stack([value.norm() for value in gradients.values()]).norm() if gradients else torch.zeros(())


def exact(policy: Replayed, anchored: Trajectory) -> Finding:
    """Two replays under the same weights agree to the last bit."""
    worst = largest(policy, anchored)
    return Finding(worst == 0, "replay", f"largest |log-ratio| between two replays {worst:.1e}; expected exactly 0")


def reached(gradients: Mapping[str, Tensor]) -> Finding:
    """The gradient is there."""
    size = norm(gradients)
    return Finding(bool(size > 0 and size.isfinite()), "gradient", f"norm {float(size):.3e} of the log-probs")


def follows_the_weights(policy: Replayed, anchored: Trajectory, slope: Mapping[str, Tensor]) -> Finding:
    """A step along the gradient changes the log-ratio: it is not identically 0."""
    trained = policy.trainable()
    length = 1e-2 * torch.stack([trained[name].detach().float().norm() for name in slope]).norm() / norm(slope)
    with moved(policy, slope, float(length)):
        worst = largest(policy, anchored)
    said = f"largest |log-ratio| {worst:.1e} after a step along the gradient; expected above 0"
    return Finding(worst > 0, "ratio", said)


def straight(policy: Replayed, anchored: Trajectory, slope: Mapping[str, Tensor], dtype: torch.dtype) -> Finding:
    """The slope of the log-ratio along its gradient, measured from both sides; `dtype` is that of the computation."""
    if dtype not in (torch.float32, torch.float64):
        return Finding(True, "finite difference", f"not measured: {dtype} rounds a small move of the weights away")
    trained, size = policy.trainable(), float(norm(slope))
    spread = torch.stack([trained[name].detach().double().square().mean() for name in slope]).mean().sqrt()
    reach = 1e-2 * float(spread) / size * len(slope) ** 0.5
    error = math.inf
    for factor in LENGTHS:  # the first at which the log-ratio is straight enough
        if error >= STRAIGHT:
            above, below = (difference(policy, anchored, slope, sign * factor * reach) for sign in (1, -1))
            error = min(error, abs((above - below) / (2 * factor * reach) / size**2 - 1))
    said = f"slope along the gradient differs by {error:.1%} from the gradient's"
    return Finding(error < STRAIGHT, "finite difference", said)


def difference(policy: Replayed, anchored: Trajectory, direction: Mapping[str, Tensor], by: float) -> float:
    """The sum of all log-ratios after a move of the weights."""
    with moved(policy, direction, by):
        return float(total(policy, anchored))


@contextmanager
def moved(policy: Replayed, direction: Mapping[str, Tensor], by: float) -> Iterator[None]:
    """Within the context the trained weights are moved along a direction; they come back bit for bit."""
    trained = policy.trainable()
    originals = {name: trained[name].data for name in direction}
    for name, value in originals.items():
        trained[name].data = value + (by * direction[name]).to(value)
    try:
        yield
    finally:
        for name, value in originals.items():
            trained[name].data = value
