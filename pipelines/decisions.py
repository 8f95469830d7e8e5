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

Sampler = Callable[[Step], Gaussian]
Reduction = str  # "mean" or "sum" over the elements of a decision


class Transition(NamedTuple):
    """A step's distribution and the clean sample that it predicts."""

    gaussian: Gaussian
    clean: Tensor  # (B, ...)
    dt: Tensor  # () positive length of the step in noise level


def transition(
    scheduler: SchedulerMixin, levels: Levels, sample: Tensor, output: Tensor, sampler: Sampler | None
) -> Transition:
    """The distribution of the next state given a model output; without a sampler the step is deterministic."""
    clean, noise = clean_and_noise(scheduler, levels, output, sample)
    step = Step(sample, clean, noise, levels.now, levels.next, levels.second)
    gaussian = ode(step) if sampler is None else sampler(step)
    dt = (levels.now.sigma - levels.next.sigma).amax()
    return Transition(gaussian, clean, dt)


def levels_of(scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> Levels:
    """The noise levels of a step that a pipeline is about to take."""
    return read(scheduler, arguments)


def checksum(state: Tensor) -> Tensor:
    """A position-weighted sum of each row's bits; equal states have equal sums; (B, ...) -> (B,) int64."""
    bits = state.detach().contiguous().view(torch.uint8).flatten(1)
    weight = torch.arange(bits.shape[1], device=bits.device) % 8191 + 1
    return (bits.to(torch.int64) * weight).sum(1).cpu()


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

    references = [(part.new, part.reference) for part in parts if part.reference is not None]
    return Evaluation(
        log_ratio=reduce([log_ratio(part.state, part.new, part.old, "sum") for part in parts]),
        drift=reduce([kl(part.new, part.old, "sum") for part in parts]),
        kl=reduce([kl(new, reference, "sum") for new, reference in references]) if references else None,
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
