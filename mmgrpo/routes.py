"""Routes: how a sample goes through a noise schedule; which steps it takes, which are stochastic and trained, where a fast tail begins.

Routes are (sigma, iteration, seed, *, options) -> one or more, a pure function of the schedule's levels, so that a resumed run
goes on exactly and all ranks agree. The G samples of a group are shared out over them by `shared_out`.
Axes: N steps of the schedule, N + 1 levels sigma (1 = noise, 0 = data), G samples of a group.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.schedules import Plan, all_but_last, window
from mmgrpo.transitions import flow_sde_diffusion


class Route(NamedTuple):
    """Step k goes from level taken[k] to level taken[k + 1], the last one to the schedule's end."""

    taken: tuple[int, ...]  # levels at which a step starts, from 0, ascending
    trained: tuple[int, ...]  # positions in `taken` whose step is stochastic and trained
    fast_from: int | None = (
        None  # position from which the deterministic steps are of second order (mmgrpo/multistep.py)
    )


Routes = Callable[[Tensor, int, int], tuple[Route, ...]]


def along(sigma: Tensor, iteration: int, seed: int, *, plan: Plan = all_but_last) -> tuple[Route, ...]:
    """One route that takes every step, those of the plan stochastic."""
    steps = _steps(sigma)
    return (Route(tuple(range(steps)), _planned(plan, steps, iteration, seed)),)


def branched(sigma: Tensor, iteration: int, seed: int, *, plan: Plan = all_but_last) -> tuple[Route, ...]:
    """TempFlow-GRPO's branches (arXiv 2508.04324): a route for each step of the plan, with that step alone stochastic.

    With noise shared in the group, routes have one deterministic trunk and leave it at their steps. Which steps branch, and how
    many samples do, is RECONSTRUCTED: the plan, and the group's size over the number of routes.
    """
    steps = _steps(sigma)
    return tuple(Route(tuple(range(steps)), (step,)) for step in _planned(plan, steps, iteration, seed))


def merged(
    sigma: Tensor, iteration: int, seed: int, *, noise: float = 0.7, threshold: float = 2.2, share: float = 0.5
) -> tuple[Route, ...]:
    """E-GRPO's merged steps (arXiv 2601.00423): a route for each of the first int(share * N) steps, that step alone stochastic.

    It is made so long, in steps of the schedule, that `step_entropy` under Flow-SDE of this `noise` reaches the threshold; a
    step that cannot before the data is left out. The scale of the threshold is RECONSTRUCTED. The authors' code goes on at the next level
    and not where the merged step ends, and never merges; the paper is followed.
    """
    steps = _steps(sigma)
    active = min(int(share * steps), steps - 1)  # the last step is deterministic
    if not 0 < share <= 1 or active == 0:
        raise ValueError(f"share is {share}; expected from 1 / steps = {1 / steps:.4g} to 1")
    entropies = [step_entropy(sigma, start, noise) for start in range(active)]  # (N - 1 - start,) each
    reached = [(entropy >= threshold).nonzero().flatten() for entropy in entropies]
    found = tuple(_merged(start, start + 1 + int(long[0]), steps) for start, long in enumerate(reached) if len(long))
    if not found:
        longest = float(torch.cat(entropies).max())
        raise ValueError(f"threshold is {threshold}; expected at most {longest:.4g}, what the longest step reaches")
    return found


def step_entropy(sigma: Tensor, start: int, noise: float) -> Tensor:
    """exp of the entropy of an element, sqrt(2 pi e) times its std, of a Flow-SDE step from level `start` to each later one.

    The last one is left out: a step to it is deterministic; (N + 1,) -> (N - 1 - start,).
    """
    if ((sigma < 0) | (sigma > 1)).any():
        raise ValueError(
            f"sigma goes from {float(sigma[0]):.4g} to {float(sigma[-1]):.4g}; expected a flow's, in [0, 1]"
        )
    now, later = sigma[start], sigma[start + 1 : -1]
    g = flow_sde_diffusion(now, sigma[1], noise)
    return math.sqrt(2 * math.pi * math.e) * g * (now - later).sqrt()


def flash(sigma: Tensor, iteration: int, seed: int, *, plan: Plan = window, share: float = 0.4) -> tuple[Route, ...]:
    """MixGRPO-Flash (arXiv 2507.21802): behind the plan's last step, max(1, int(share * remaining)) steps of second order.

    Flash* is a plan that stays at the start. Re-spaced evenly in the number of the schedule's levels, rounded, so that a shift of the
    schedule stays: RECONSTRUCTED. A plan without a step, as at the end of the authors' sweep, makes all of it a tail.
    """
    steps = _steps(sigma)
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a share of the remaining steps in (0, 1]")
    trained = _planned(plan, steps, iteration, seed)
    head = trained[-1] + 1 if trained else 0
    left = steps - head
    count = max(1, int(share * left))
    tail = (head + (2 * step * left + count) // (2 * count) for step in range(count))  # rounded step * left / count
    return (Route((*range(head), *tail), trained, head),)


def shared_out(routes: int, samples: int) -> tuple[int, ...]:
    """Which route each of a group's samples takes: evenly and in order, as 0, 0, 1, 1; raises ValueError if they do not divide."""
    if routes < 1 or samples < routes or samples % routes:
        raise ValueError(f"a group has {samples} samples for {routes} routes; expected a multiple in train.group_size")
    return tuple(sample * routes // samples for sample in range(samples))


def _merged(start: int, end: int, steps: int) -> Route:
    return Route((*range(start + 1), *range(end, steps)), (start,))


def _planned(plan: Plan, steps: int, iteration: int, seed: int) -> tuple[int, ...]:
    return tuple(plan(steps, iteration, seed).nonzero().flatten().tolist())


def _steps(sigma: Tensor) -> int:
    if sigma.dim() != 1 or len(sigma) < 2 or (sigma.diff() > 0).any():
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; expected two or more levels that fall, (N + 1,)")
    return len(sigma) - 1
