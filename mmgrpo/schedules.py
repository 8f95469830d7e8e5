"""Plans: which denoising steps are stochastic and trained; the others are deterministic and enter no loss.

A plan is (steps, iteration, seed, *, options) -> (steps,) bool, a pure function, so that a resumed run goes on exactly and all
ranks agree. The last step, which ends at the data, is never planned: an option that asks for it raises ValueError.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from mmgrpo.seeds import derive

Plan = Callable[[int, int, int], Tensor]
Order = Literal["progressive", "decay", "exp_decay", "random"]


def all_but_last(steps: int, iteration: int, seed: int) -> Tensor:
    """Every step that can be trained."""
    return _planned(steps, range(_trainable(steps)))


def first_fraction(steps: int, iteration: int, seed: int, *, fraction: float = 0.99) -> Tensor:
    """The first int(fraction * steps) steps, as Flow-GRPO's timestep_fraction; fraction in (0, 1)."""
    _trainable(steps)
    if not 0 < fraction < 1 or int(fraction * steps) == 0:
        raise ValueError(f"fraction is {fraction}; expected from 1 / steps = {1 / steps:.4g} to below 1")
    return _planned(steps, range(int(fraction * steps)))


def listed(steps: int, iteration: int, seed: int, *, indices: Sequence[int]) -> Tensor:
    """The steps of the given indices, from 0."""
    last = _trainable(steps)
    wrong = [index for index in indices if not 0 <= index < last]
    if wrong or not indices:
        raise ValueError(f"indices are {list(indices)}; expected some from 0 to {last - 1} of {steps} steps")
    return _planned(steps, indices)


def window(
    steps: int,
    iteration: int,
    seed: int,
    *,
    size: int = 4,
    stride: int = 1,
    every: int = 25,
    order: Order = "progressive",
    clamp: bool = True,
    shortest: int | None = None,
    threshold: int = 13,
    rate: float = 0.1,
) -> Tensor:
    """MixGRPO's window (arXiv 2507.21802, sec. 3.2): `size` steps that move on by `stride`, from the noise to the data and again.

    It stays `every` iterations at a place ("progressive"), fewer towards the data down to `shortest` (default every // 4;
    "decay"), ceil(every * exp(-rate * (start - threshold))) past `threshold` ("exp_decay"), or starts anywhere in each iteration
    ("random"). With `clamp` the window is always full and ends at the last trainable step. Without it the authors' schedule is
    kept: the window runs over its end, shrinks and is empty at the end of a sweep, and never trains the step before the last.
    """
    _require_count("size", size, _trainable(steps))
    _require_count("stride", stride)
    _require_count("every", every)
    end = _trainable(steps) if clamp else steps - 2  # one past the last step of any window
    if order == "random":
        return random_window(steps, iteration, seed, size=size, high=end)
    starts = [*range(0, end - size, stride), end - size] if clamp else list(range(0, end + 1, stride))
    stays = [_stay(order, start, starts[-1] if clamp else end, every, shortest, threshold, rate) for start in starts]
    passed = list(accumulate(stays))
    start = starts[bisect_right(passed, iteration % passed[-1])]
    return _planned(steps, range(start, min(start + size, end)))


def random_window(
    steps: int, iteration: int, seed: int, *, size: int = 3, low: int = 0, high: int | None = None
) -> Tensor:
    """`size` steps in [low, high), the start drawn uniformly in each iteration; high defaults to steps // 2.

    Flow-GRPO-Fast's sde_window_size and sde_window_range (arXiv 2505.05470, authors' code).
    """
    last, high = _trainable(steps), steps // 2 if high is None else high
    if not 0 <= low < high <= last:
        raise ValueError(f"low and high are {low} and {high}; expected 0 <= low < high <= {last} of {steps} steps")
    _require_count("size", size, high - low)
    start = low + int(torch.randint(high - low - size + 1, (), generator=_generator(seed, "window", iteration)))
    return _planned(steps, range(start, start + size))


def random_subset(steps: int, iteration: int, seed: int, *, count: int, high: int | None = None) -> Tensor:
    """`count` different steps below `high` (default: all that can be trained), drawn uniformly in each iteration.

    Flow-DPPO (arXiv 2606.11025) trains 3 of the first half: count 3, high steps // 2.
    """
    last = _trainable(steps)
    high = last if high is None else high
    _require_count("high", high, last)
    _require_count("count", count, high)
    return _planned(steps, torch.randperm(high, generator=_generator(seed, "subset", iteration))[:count].tolist())


def _stay(order: Order, start: int, end: int, every: int, shortest: int | None, threshold: int, rate: float) -> int:
    """How many iterations a window stays at its start."""
    match order:
        case "progressive":
            return every
        case "decay":
            least = max(1, every // 4) if shortest is None else shortest
            _require_count("shortest", least, every)
            progress = start / end if end else 0.0
            return max(least, int(every * (1 - progress) + least * progress))
        case "exp_decay":
            return math.ceil(every * math.exp(-rate * max(0, start - threshold)))
        case _:
            raise ValueError(f"order is {order!r}; expected 'progressive', 'decay', 'exp_decay' or 'random'")


def _planned(steps: int, chosen: Iterable[int]) -> Tensor:
    plan = torch.zeros(steps, dtype=torch.bool)
    plan[list(chosen)] = True
    return plan


def _trainable(steps: int) -> int:
    """How many steps can be trained."""
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2, as the last step is never trained")
    return steps - 1


def _require_count(name: str, value: int, high: int | None = None) -> None:
    if value < 1 or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; expected from 1" + (f" to {high}" if high is not None else ""))


def _generator(seed: int, name: str, iteration: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, "plan", name, iteration))
