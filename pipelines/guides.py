"""Steers the steps of a rollout by a model of the reward that reads noisy latents, and keeps its scores as process rewards.

What a guide is shown lies on the flow's path whatever the scheduler's: x / (alpha + sigma) at level sigma / (alpha + sigma).
A replay knows nothing of it: the recorded outputs give the unguided step, of which the recorded state is a draw off centre.
Axes: B samples, S decisions, K directions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo import seeds
from mmgrpo.steering import Strength, absorbed, estimated, shift, size
from mmgrpo.transitions import Gaussian, Level
from mmgrpo.types import Finding, Prompt, Trajectory, require_shape, same_shape
from pipelines.decisions import Transition, levels_of, prediction
from pipelines.levels import Levels


class Seen(NamedTuple):
    """What a guide is shown before a step."""

    state: Tensor  # (B, ...) float32, (1 - level) data + level noise
    clean: Tensor  # (B, ...) float32, the data that the denoiser predicts from it
    level: Tensor  # (B,) float32 in [0, 1], 1 = noise; the highest where tokens differ
    prompts: Sequence[Prompt]  # B
    seeds: Sequence[int]  # B, of this step


# -> how good the sample will be (B,), and the direction in which the state gets better (B, ...), both without gradient
Guide = Callable[[Seen], tuple[Tensor, Tensor]]
# (state (B, ...), level (B,), prompts) -> (B,) with gradient
Value = Callable[[Tensor, Tensor, Sequence[Prompt]], Tensor]


def by_gradient(value: Value) -> Guide:
    """A guide that follows the gradient of a value through the value alone: the state is a leaf."""

    def guide(seen: Seen) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            state = seen.state.detach().requires_grad_()
            scores = value(state, seen.level, seen.prompts)
            (gradient,) = torch.autograd.grad(scores.sum(), state)
        return scores.detach(), gradient

    return guide


def by_differences(value: Value, directions: int, width: float) -> Guide:
    """A guide for values without derivatives: how the value of the predicted data changes along random directions."""

    @torch.no_grad()
    def guide(seen: Seen) -> tuple[Tensor, Tensor]:
        shape = seen.state.shape[1:]
        drawn = [[seeds.derive(seed, "direction", one) for seed in seen.seeds] for one in range(directions)]
        u = torch.stack([seeds.normal(row, shape) for row in drawn]).to(seen.state)  # (K, B, ...)
        ended = torch.zeros_like(seen.level)
        gradient = estimated(lambda clean: value(clean, ended, seen.prompts), seen.clean, u, width)
        return value(seen.state, seen.level, seen.prompts), gradient

    return guide


@dataclass(frozen=True)
class Steering:
    """A guide, how far it may move a step, and at which steps."""

    guide: Guide
    strength: Strength
    first: int = 0  # step that is guided, of those that are stochastic
    last: int | None = None  # by default the last one of the run
    absorbs: bool = False  # record the model outputs that would need no guide, "absorbed.{step}.0"

    def require_usable(self, steps: int, parts: Mapping[int, int]) -> None:
        """Raise ValueError for a window outside of the run, or decisions made of several steps."""
        last = steps - 1 if self.last is None else self.last
        if not 0 <= self.first <= last < steps:
            raise ValueError(
                f"policy.guide: first is {self.first} and last is {last}; expected 0 <= first <= last < {steps}"
            )
        if several := {group: count for group, count in parts.items() if count != 1}:
            raise ValueError(f"policy.guide: decision {min(several)} has {several[min(several)]} steps; expected 1")

    def covers(self, step: int) -> bool:
        return self.first <= step and (self.last is None or step <= self.last)


class Steered:
    """The guided steps of one call of a pipeline."""

    def __init__(self, steering: Steering, prompts: Sequence[Prompt], row_seeds: Sequence[int], steps: int) -> None:
        self.steering = steering
        self.prompts = prompts
        self.row_seeds = row_seeds
        nowhere = torch.full((len(prompts), steps), torch.nan)
        self.record = {"process_scores": nowhere, "guide_shift": nowhere.clone()}  # (B, S), NaN where not guided

    def step(self, number: int, scheduler: SchedulerMixin, arguments: Mapping[str, Any], taken: Transition) -> Gaussian:
        """A step that the scheduler is about to take, as it is drawn; the score is of the state before it."""
        (mean, std), sample = taken.gaussian, arguments["sample"]
        if not self.steering.covers(number) or not (std > 0).any():
            return taken.gaussian
        if len(sample) != len(self.prompts):
            raise ValueError(
                f"policy.guide: a step has {len(sample)} latents for {len(self.prompts)} samples; expected one of each"
            )
        levels = levels_of(scheduler, arguments)
        level = levels.now
        total = (level.alpha + level.sigma).to(mean)
        with torch.autocast(mean.device.type, enabled=False):
            scores, gradient = self.steering.guide(self._seen(number, sample / total, taken.clean, level))
        require_shape("the guide's scores", scores, len(self.prompts))
        same_shape(sample=sample, gradient=gradient)
        moved = shift(std, taken.dt, (gradient / total).to(mean), self.steering.strength)
        self.record["process_scores"][:, number] = scores.float().cpu()
        self.record["guide_shift"][:, number] = size(moved, std).float().cpu()
        if self.steering.absorbs:
            output = prediction(arguments).value
            self.record[f"absorbed.{number}.0"] = absorbed(output.to(moved), moved, slope(levels)).to(output)
        return Gaussian(mean + moved, std)

    def _seen(self, number: int, state: Tensor, clean: Tensor, level: Level) -> Seen:
        noise = (level.sigma / (level.alpha + level.sigma)).amax().to(state.device, torch.float32)
        drawn = [seeds.derive(seed, "guide", number) for seed in self.row_seeds]
        return Seen(state.float(), clean.float(), noise.expand(len(drawn)), self.prompts, drawn)


def steered_steps(
    steering: Steering | None, prompts: Sequence[Prompt], row_seeds: Sequence[int], planned: Tensor
) -> Steered | None:
    """What moves the steps of a call, planned (S,) bool; None without a guide or without a stochastic step."""
    if steering is None or not planned.any():
        return None
    return Steered(steering, prompts, row_seeds, len(planned))


def slope(levels: Levels) -> Tensor:
    """By how much the mean of the deterministic step changes with the model's output, -D for a velocity; a scalar or (B, T, 1)."""
    return levels.next.alpha * levels.prediction.clean[1] + levels.next.sigma * levels.prediction.noise[1]


def findings(trajectory: Trajectory) -> list[Finding]:
    """How far a guide moved the steps of a rollout; none without one."""
    if "guide_shift" not in trajectory.record:
        return []
    moved, scores = trajectory.record["guide_shift"], trajectory.record["process_scores"]
    steps = (~moved.isnan()).any(0).nonzero().flatten().tolist()
    if not steps:
        return [Finding(False, "guide", "none of its steps is stochastic; expected a plan that holds one")]
    each = ", ".join(f"{float(moved[:, step].mean()):.2g}" for step in steps)
    detail = f"moves steps {steps} by {each} stds on average; scores {float(scores.nanmean()):.3g} on average"
    return [Finding(True, "guide", detail)]
