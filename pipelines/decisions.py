"""One denoising step as a decision: its transition under given model outputs, and what two of them say about a sample.

Axes: B rows, then whatever the pipeline's latents have (channels and space, or tokens and features).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.transitions import Gaussian, Step, kl, log_ratio, ode
from mmgrpo.types import Evaluation
from pipelines.levels import Levels, clean_and_noise, read
from pipelines.schedulers import position

PERIOD = 8191  # of the weights in a checksum
Sampler = Callable[[Step], Gaussian]
Reduction = str  # "mean" or "sum" over the elements of a decision


class Transition(NamedTuple):
    """A step's distribution and the clean sample that it predicts."""

    gaussian: Gaussian
    clean: Tensor  # (B, ...)
    dt: Tensor  # () positive length of the step in noise level


# (scheduler, arguments of its step), before it counts the step -> (model output) -> distribution of the next state
Kernel = Callable[[SchedulerMixin, Mapping[str, Any]], Callable[[Tensor], Transition]]


class Prediction(NamedTuple):
    """What a pipeline gave to `step`: the model's output, or the clean sample where it formed that itself."""

    value: Tensor  # (B, ...)
    clean: bool


def prediction(arguments: Mapping[str, Any]) -> Prediction:
    """The prediction among the arguments of a step."""
    clean = arguments.get("pred_original_sample")
    return Prediction(arguments["model_output"], False) if clean is None else Prediction(clean, True)


def levels_of(scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> Levels:
    """The noise levels of the step that a pipeline is about to take."""
    timestep = arguments["timestep"]
    return read(scheduler, timestep, position(scheduler, timestep), arguments.get("per_token_timesteps"))


def transition(levels: Levels, sample: Tensor, predicted: Prediction, sampler: Sampler | None) -> Transition:
    """The distribution of the next state given a prediction; without a sampler the step is deterministic."""
    value = predicted.value
    clean, noise = clean_and_noise(levels, value, sample, value if predicted.clean else None)
    step = Step(sample, clean, noise, levels.now, levels.next, levels.second)
    gaussian = ode(step) if sampler is None else sampler(step)
    return Transition(gaussian, clean, (levels.now.sigma - levels.next.sigma).amax())


def from_levels(sampler: Sampler | None) -> Kernel:
    """Steps whose distribution a sampler makes of the noise levels."""

    def kernel(scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> Callable[[Tensor], Transition]:
        levels, predicted = levels_of(scheduler, arguments), prediction(arguments)
        return lambda value: transition(levels, arguments["sample"], predicted._replace(value=value), sampler)

    return kernel


def checksum(state: Tensor) -> Tensor:
    """A position-weighted sum of each row's bytes; equal states have equal sums; (B, ...) -> (B,) int64.

    Taken in blocks: as int64 the bytes of a long video's latents would be eight times their size, twice.
    """
    found = torch.zeros(len(state), dtype=torch.int64, device=state.device)
    weight = torch.arange(1, PERIOD + 1, device=state.device).repeat(64)
    for block in state.detach().contiguous().view(torch.uint8).flatten(1).split(len(weight), 1):
        found += (block.to(torch.int64) * weight[: block.shape[1]]).sum(1)
    return found.cpu()


class Part(NamedTuple):
    """What one scheduler step adds to a decision; a decision may hold several, for audio and video or for frames."""

    state: Tensor  # (B, ...) the recorded next state
    new: Gaussian  # today's weights, with gradient
    old: Gaussian  # the weights that sampled
    reference: Gaussian | None
    dt: Tensor  # ()


def evaluate(parts: Sequence[Part], reduction: Reduction) -> Evaluation:
    """Log-ratio, drift and KL of one decision from its parts; a mean counts stochastic elements once; -> (B, 1) each."""
    counts = torch.stack([stochastic_elements(part.new) for part in parts])  # (parts, B)
    total = counts.sum(0) if reduction == "mean" else torch.ones_like(counts[0])

    def reduce(values: list[Tensor]) -> Tensor:
        return (torch.stack(values).sum(0) / total).unsqueeze(1)

    held = [(part.state, part.new, part.reference) for part in parts if part.reference is not None]
    return Evaluation(
        log_ratio=reduce([log_ratio(part.state, part.new, part.old, "sum") for part in parts]),
        drift=reduce([kl(part.new, part.old, "sum") for part in parts]),
        kl=reduce([kl(new, reference, "sum") for _, new, reference in held]) if held else None,
        to_reference=reduce([log_ratio(*part, "sum") for part in held]) if held else None,
        step_std=step_std(parts, counts).unsqueeze(1),
        dt=torch.stack([part.dt for part in parts]).mean().to(total.dtype).expand(len(total), 1),
    )


def stochastic_elements(gaussian: Gaussian) -> Tensor:
    """How many elements of each row are random; (B,)."""
    return (gaussian.std > 0).expand_as(gaussian.mean).flatten(1).sum(1).to(gaussian.mean.dtype)


def step_std(parts: Sequence[Part], counts: Tensor) -> Tensor:
    """Mean standard deviation of the random elements of each row; (B,)."""
    sums = torch.stack([part.new.std.expand_as(part.new.mean).flatten(1).sum(1) for part in parts]).sum(0)
    return (sums / counts.sum(0)).detach()
