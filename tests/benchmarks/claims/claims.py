"""What a claim is, how it is measured and judged. Axes: R runs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmgrpo.seeds import derive

from .tables import Tables, World
from .training import GRPO, Effort, Side, Trained, judged, train
from .worlds import Seeds

RATES = (2.0, 6.0, 20.0, 60.0, 150.0, 400.0, 1000.0)  # of plain gradient descent
TUNING = (1000, 1001, 1002, 1003)  # seeds of the choice of a rate
REPORTED = 2000  # the first of those that are reported; the tasks were made while looking at others, from 0 on
CLEAR = 3.0  # standard errors
LEAST = 0.01  # of what the other side has
SMALLEST = 1e-9  # standard error that is divided by
Verdict = Literal["shows", "does not show", "opposite"]


class Metric(NamedTuple):
    """A number of every run."""

    name: str
    of: Callable[[Trained], Tensor]  # -> (R,)
    higher: bool = True  # is better


def reached(trained: Trained) -> Tensor:
    return trained.world.chance(trained.policy).mean(1)


REWARD = Metric("expected reward", reached)


def entropy_of(policy: Tables) -> Tensor:
    """The mean over states, nats; (R,)."""
    table = policy.log_probs()
    return -(table.exp() * table).sum(-1).mean(1)


@dataclass(frozen=True)
class Claim:
    """A method against GRPO, or another method, on one world."""

    name: str
    says: str
    method: Side
    world: Callable[[Seeds], World]
    effort: Effort = Effort()
    metric: Metric = REWARD
    tuned: Metric | None = REWARD  # chooses the learning rate; None: the same fixed one for both
    against: Side = GRPO
    tolerance: float | None = None  # the claim is that the method is not worse by more than this
    rate: float = 4.0  # where it is not chosen

    @property
    def setting(self) -> str:
        """The first line of what the world says of itself."""
        world = self.world.func if isinstance(self.world, partial) else self.world
        return (world.__doc__ or "").split("\n")[0]


class Outcome(NamedTuple):
    """What a side measured, and the learning rate it had."""

    values: Tensor  # (R,)
    reward: Tensor  # (R,)
    rate: float


@cache
def prepared(
    world: Callable[[Seeds], World],
    side: Side,
    effort: Effort,
    tuned: Metric | None,
    rate: float,
    seeds: Seeds,
    tuning: Seeds,
) -> tuple[Trained, float]:
    """A side trained on a world, which several claims may share, at the rate of the grid that is best on the tuning seeds."""
    if tuned is not None:
        every = tuple(tuning) * len(RATES)
        rates = torch.tensor(RATES).repeat_interleave(len(tuning))
        found = tuned.of(train(world(every), side, effort, every, rates)).view(len(RATES), -1).mean(1)
        rate = RATES[int(found.argmax() if tuned.higher else found.argmin())]
    return train(world(seeds), side, effort, seeds, torch.full((len(seeds),), rate)), rate


def outcome(claim: Claim, side: Side, seeds: Seeds, tuning: Seeds) -> Outcome:
    trained, rate = prepared(claim.world, side, claim.effort, claim.tuned, claim.rate, seeds, tuning)
    return Outcome(claim.metric.of(trained), reached(trained), rate)


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


def estimate(values: Tensor) -> Estimate:
    values = values.double()
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


def verdict(difference: Estimate, against: float, tolerance: float | None) -> Verdict:
    """Of a difference whose positive sign is better: 3 standard errors and a hundredth of what the other side has.

    With a tolerance the claim is that the difference is above -tolerance, by 3 standard errors.
    """
    margin = CLEAR * difference.error
    if tolerance is not None:
        shows, opposite = difference.mean - margin > -tolerance, difference.mean + margin < -tolerance
    else:
        margin = max(margin, LEAST * abs(against))
        shows, opposite = difference.mean > margin, difference.mean < -margin
    return "shows" if shows else "opposite" if opposite else "does not show"


def line(claim: Claim, method: Outcome, against: Outcome) -> dict[str, Any]:
    """What is printed of a claim; differences pair the seeds, their positive sign is better.

    Standard errors count from what is claimed: from 0, or from -tolerance.
    """
    sign = 1 if claim.metric.higher else -1
    difference = estimate(sign * (method.values - against.values))
    beside = estimate(method.reward - against.reward)
    effort = claim.effort
    return {
        "benchmark": "claims",
        "claim": claim.name,
        "says": claim.says,
        "metric": claim.metric.name,
        "higher_is_better": claim.metric.higher,
        "setting": f"{claim.setting} G {effort.samples}, {effort.updates} rollouts, {effort.passes} passes, {effort.stale} late"
        + ("" if claim.tuned else f", both at learning rate {claim.rate:g}")
        + ("" if effort.bound == 1 else ", steps of equal length"),
        "seeds": len(method.values),
        "method": {"name": claim.method.name} | estimate(method.values)._asdict() | {"learning_rate": method.rate},
        "against": {"name": claim.against.name} | estimate(against.values)._asdict() | {"learning_rate": against.rate},
        "difference": difference._asdict(),
        "tolerance": claim.tolerance,
        "standard_errors": (difference.mean + (claim.tolerance or 0.0)) / max(difference.error, SMALLEST),
        "reward_difference": beside._asdict(),
        "verdict": verdict(difference, float(against.values.mean()), claim.tolerance),
    }


# ---- further metrics


def pass_at(count: int) -> Metric:
    """The chance that one of so many answers to a prompt is right, in worlds whose answers are right or wrong."""

    def of(trained: Trained) -> Tensor:
        return (1 - (1 - trained.world.chance(trained.policy)) ** count).mean(1)

    return Metric(f"pass@{count}", of)


@torch.no_grad()
def greedy(trained: Trained) -> Tensor:
    """The expected reward of the likeliest actions."""
    sharp = Tables(trained.world)
    sharp.weight.data = 1e4 * trained.policy.weight.data
    return trained.world.chance(sharp).mean(1)


GREEDY = Metric("expected reward of the likeliest answer", greedy)
ENTROPY = Metric("entropy, nats", lambda trained: entropy_of(trained.policy))
SPIKE = Metric("largest gradient norm over the median", lambda t: t.norms.amax(0) / t.norms.median(0).values, False)


def away_from(target: float) -> Metric:
    return Metric(f"distance of the entropy from {target}", lambda t: (entropy_of(t.policy) - target).abs(), False)


@torch.no_grad()
def flips(trained: Trained) -> Tensor:
    """Share of trained samples whose advantage has the wrong sign, over 20 rollouts of the start."""
    world, policy = trained.world, Tables(trained.world)
    assert world.gain is not None
    better = world.gain - (policy.log_probs().exp() * world.gain).sum(-1, keepdim=True)  # (R, P, K)
    streams = [torch.Generator().manual_seed(derive(seed, "flips")) for seed in trained.seeds]
    wrong, counted = torch.zeros(len(streams)), torch.zeros(len(streams))
    for _ in range(20):
        lesson = judged(policy, world, trained.side, trained.effort.samples, streams, [trained.side.compare()])
        record, kept = lesson.trajectory.record, lesson.given.weights[:, 0] > 0
        prompt = lesson.trajectory.group % better.shape[1]
        true = better[record["run"], prompt, record["action"][:, 0]]
        differ = kept & (true.sign() * lesson.advantages.values[:, 0].sign() < 0)
        wrong += differ.view(len(streams), -1).sum(1)
        counted += kept.view(len(streams), -1).sum(1)
    return wrong / counted


FLIPS = Metric("share of advantages of the wrong sign", flips, False)
