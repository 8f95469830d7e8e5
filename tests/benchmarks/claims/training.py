"""One side of a claim: a method's advantage, loss and reduction, trained by the project's own arithmetic on a world.

Plain gradient descent, the gradient's norm bounded to 1 as in recipes if nothing else is said. Axes: R runs, B samples, S decisions.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmgrpo.advantages import standardized
from mmgrpo.aggregations import Aggregation, seq_mean, token_mean
from mmgrpo.comparing import facts_of, needed
from mmgrpo.entropy import Adaptation, Bonus, adapted, applied
from mmgrpo.improve import Given, Loss, accumulate
from mmgrpo.objectives import Objective, clipped
from mmgrpo.seeds import derive
from mmgrpo.types import Advantage, AdvantageFunction, Feedback, Trajectory

from .tables import Tables, World, roll


@dataclass(frozen=True)
class Side:
    """A method as it is run."""

    name: str
    compare: Callable[[], AdvantageFunction] = lambda: standardized  # one for each run
    objective: Objective = clipped
    aggregate: Aggregation = seq_mean
    compare_apart: bool = False  # the advantage joins prompts, or remembers: each run has its own
    lose_apart: bool = False  # the loss joins prompts
    entropy_weight: float | None = None
    adaptation: Adaptation | None = None


@dataclass(frozen=True)
class Effort:
    """What both sides of a claim may use."""

    samples: int = 8  # G
    updates: int = 60  # rollouts that are trained on
    stale: int = 0  # rollouts between sampling and training
    passes: int = 1  # over each rollout
    bound: float = 1.0  # of the gradient's norm


@dataclass
class Trained:
    """What a side led to."""

    policy: Tables
    world: World
    side: Side
    effort: Effort
    seeds: Sequence[int]
    norms: Tensor  # (updates * passes, R) of the gradient, before it was bounded


@dataclass(frozen=True)
class Lesson:
    """A rollout with what the loss is given."""

    trajectory: Trajectory
    given: Given
    advantages: Advantage


def train(world: World, side: Side, effort: Effort, seeds: Sequence[int], rates: Tensor) -> Trained:
    """All runs beside each other, (R,) learning rates."""
    policy, streams = Tables(world), [torch.Generator().manual_seed(derive(seed, "rollouts")) for seed in seeds]
    compares = [side.compare() for _ in (seeds if side.compare_apart else seeds[:1])]
    bonuses = [Bonus(side.entropy_weight or 0.0) for _ in seeds]
    waiting: deque[Lesson] = deque()
    norms = []
    for number in range(effort.updates + effort.stale):
        waiting.append(judged(policy, world, side, effort.samples, streams, compares))
        if number >= effort.stale:
            lesson = waiting.popleft()
            for _ in range(effort.passes):
                norms.append(improve(policy, side, lesson, bonuses, len(seeds)))
                descend(policy, norms[-1], rates, effort.bound)
    policy.weight.requires_grad_(False)
    return Trained(policy, world, side, effort, seeds, torch.stack(norms))


def judged(
    policy: Tables,
    world: World,
    side: Side,
    samples: int,
    streams: Sequence[torch.Generator],
    compares: Sequence[AdvantageFunction],
) -> Lesson:
    """A rollout, its rewards and advantages; a part of the rows for each advantage function, one or R."""
    trajectory, drawn = roll(policy, world, samples, streams)
    scores = {name: values.flatten() for name, values in world.reward(drawn).items()}
    known = facts_of(policy, trajectory, needed(compares[0]))
    parts, prompts = [], trajectory.batch.prompts
    for compare, rows in zip(compares, torch.arange(len(trajectory)).tensor_split(len(compares)), strict=True):
        feedback = Feedback(
            {name: values[rows] for name, values in scores.items()},
            world.weights,
            trajectory.group[rows],
            prompts=prompts[int(rows[0]) : int(rows[-1]) + 1],
            mask=trajectory.mask[rows],
            facts={name: values[rows] for name, values in known.items()},
        )
        parts.append(compare(feedback))
    found = joined(parts, trajectory.mask)
    total = Feedback(scores, world.weights, trajectory.group).total()
    mask = trajectory.mask if found.decisions is None else trajectory.mask & found.decisions
    trajectory = replace(trajectory, mask=mask)
    return Lesson(trajectory, given(found, mask, total, side, len(streams)), found)


def joined(parts: Sequence[Advantage], mask: Tensor) -> Advantage:
    """The advantages of all runs, their values (B, S)."""
    values = torch.cat([part.values if part.values.dim() == 2 else part.values.unsqueeze(1) for part in parts])
    chosen = [part.decisions for part in parts if part.decisions is not None]
    keep = torch.cat([part.keep for part in parts])
    return Advantage(values.expand(mask.shape), keep, decisions=torch.cat(chosen) if chosen else None)


def given(found: Advantage, mask: Tensor, total: Tensor, side: Side, runs: int) -> Given:
    """As the trainer weighs a rollout, with the denominators of each run."""
    keep = found.keep & mask.any(1)

    def reduced(aggregate: Aggregation) -> Tensor:
        cut = zip(mask.tensor_split(runs), keep.tensor_split(runs), strict=True)
        return torch.cat([aggregate(part, keep=kept) for part, kept in cut])

    evenly = None if side.entropy_weight is None else reduced(token_mean)
    reward = total.unsqueeze(1).expand(mask.shape)
    return Given(found.values, reduced(side.aggregate), reward=reward, evenly=evenly)


def improve(policy: Tables, side: Side, lesson: Lesson, bonuses: list[Bonus], runs: int) -> Tensor:
    """The gradient of every run's loss; -> (R,) its norms."""
    policy.weight.grad, rows = None, torch.arange(len(lesson.trajectory))
    for number, part in enumerate(rows.tensor_split(runs) if side.lose_apart else [rows]):
        weight = None if side.entropy_weight is None else applied(bonuses[number], side.adaptation)
        loss = Loss(side.objective, entropy_weight=weight)
        own = lesson.given.each(lambda value, part=part: value[part])
        measured = accumulate(policy, lesson.trajectory.take(part), own, loss)
        if side.adaptation is not None and own.evenly is not None:
            entropy = float((measured.values["entropy"] * own.evenly).sum())
            bonuses[number] = adapted(bonuses[number], entropy, side.adaptation)
    assert policy.weight.grad is not None
    return policy.weight.grad.flatten(1).norm(dim=1)


@torch.no_grad()
def descend(policy: Tables, norms: Tensor, rates: Tensor, bound: float) -> None:
    """Gradient descent with a bounded gradient in each run."""
    assert policy.weight.grad is not None
    policy.weight -= (rates * (bound / norms.clamp(min=bound))).view(-1, 1, 1) * policy.weight.grad


GRPO = Side("GRPO")
