"""A scheduler's own noisy step as a distribution, found by asking it with chosen noise.

Schedulers that are noisy by design (DDPM, ancestral Euler, LCM, DDIM with the pipeline's `eta`, ...) draw once in a step, and
their next sample is affine in that draw. Stepping with no noise gives the mean; stepping with noise of one size everywhere
gives the standard deviation; a learned variance keeps its gradient. Multistep solvers take their first-order form.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.transitions import Gaussian
from pipelines.decisions import Transition, levels_of, prediction, transition

SIZE = 256.0  # of the noise that is asked with: large beside the mean, whose rounding would blur the deviation


def native(scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> Callable[[Tensor], Transition]:
    """The scheduler's own next step as a function of the model's output; raises ValueError if it is not one affine draw."""
    levels, predicted = levels_of(scheduler, arguments), prediction(arguments)
    name = "pred_original_sample" if predicted.clean else "model_output"
    before = snapshot(scheduler)

    def at(value: Tensor) -> Transition:
        given = dict(arguments) | {name: value.double(), "sample": arguments["sample"].double(), "return_dict": False}
        given.pop("self")
        mean, above, below = (stepped(before, given, size) for size in (0.0, SIZE, -SIZE))
        bend = bent(mean.detach(), above.detach(), below.detach())
        if bend > 1e-3:
            raise ValueError(
                f"the next sample of {type(scheduler).__name__} is not affine in its noise: bent by {bend:.1e}"
            )
        kind = torch.promote_types(arguments["sample"].dtype, torch.float32)
        gaussian = Gaussian(mean.to(kind), ((above - below).abs() / (2 * SIZE)).to(kind))
        return transition(levels, arguments["sample"], predicted._replace(value=value), None)._replace(
            gaussian=gaussian
        )

    return at


def bent(mean: Tensor, above: Tensor, below: Tensor) -> float:
    """How far three samples are from a straight line in the noise, as a share of its length."""
    return float((above + below - 2 * mean).abs().amax() / (above - below).abs().amax().clamp(min=1e-30))


def snapshot(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A scheduler in the same state, whose steps leave the first one as it is."""
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
    return twin


def stepped(scheduler: SchedulerMixin, given: Mapping[str, Any], size: float) -> Tensor:
    """The stock step's next sample with noise of one size everywhere."""
    with noise_of(scheduler, size) as draws:
        state, *_ = type(scheduler).step(snapshot(scheduler), **given)
    if len(draws) > 1:
        raise ValueError(f"{type(scheduler).__name__} draws noise {len(draws)} times in a step; expected once")
    return state.double()


@contextmanager
def noise_of(scheduler: SchedulerMixin, size: float) -> Iterator[list[tuple[int, ...]]]:
    """Within the context the scheduler's module draws constant noise; yields the shapes drawn."""
    module = inspect.getmodule(type(scheduler).step)
    draws: list[tuple[int, ...]] = []
    stock = vars(module).get("randn_tensor")

    def constant(
        shape: tuple[int, ...],
        generator: object = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
    ) -> Tensor:
        draws.append(tuple(shape))
        return torch.full(tuple(shape), size, device=device, dtype=dtype)

    if stock is not None:
        vars(module)["randn_tensor"] = constant
    try:
        yield draws
    finally:
        if stock is not None:
            vars(module)["randn_tensor"] = stock
