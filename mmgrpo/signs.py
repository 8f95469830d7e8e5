"""What metrics show when training goes wrong: each sign is a function of a run's history -> a sentence, or None.

A collapse was seen to begin with the gradient, then the rollouts fall, then, many updates later, averaged weights. Rewards have
any scale, so changes of them are told in standard errors, or in units of the spread that they had at first. N is iterations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import NamedTuple

from mmgrpo.recipe import Watch

MEMORY = 100  # iterations whose gradient norms are remembered
WINDOW = 5  # iterations whose rollouts are averaged
ERRORS = (
    5.0  # standard errors: the best of many means is above them all by chance, and scores are looked at again and again
)
SLOWER = 0.5  # what slowing a run multiplies its learning rate by
SATURATED = 0.7  # share of groups without spread that is told
KEPT = ("reward/", "held_out/")  # beginnings of the metrics that are remembered, of those that `ENDS` names
ENDS = ("/mean", "/groups_without_spread", "/standard_errors", "total/std")

WHILE = " while the reward rose"  # said where there are rollouts

Series = Sequence[float]  # (N,) one value an iteration, NaN where it was not measured


@dataclass(frozen=True)
class History:
    """What the watch has read and done so far; a part of every checkpoint, so that a resumed run sees the same."""

    iterations: int = 0  # that were read
    norms: tuple[tuple[float, ...], ...] = ()  # of the gradient before it is clipped, at the updates of each iteration
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # (N,) by name
    silent: int = 0  # iterations from now in which no sign acts
    slowed: int = 0  # times that the learning rate was lowered
    said: tuple[str, ...] = ()  # lines
    told: tuple[str, ...] = ()  # signs that were told without acting, once each
    stopped: str = ""  # what the run was stopped for


class Sign(NamedTuple):
    """Something that was seen."""

    name: str
    sentence: str
    acts: bool  # or is only told


def read(history: History, norms: Series, metrics: Mapping[str, float]) -> History:
    """The history with one more iteration: the gradient norms of its updates, and its metrics."""
    names = [name for name in metrics if name.startswith(KEPT) and name.endswith(ENDS)]
    empty = (math.nan,) * history.iterations
    columns = {
        name: (*history.metrics.get(name, empty), float(metrics.get(name, math.nan)))
        for name in dict.fromkeys([*history.metrics, *names])
    }
    return replace(
        history,
        iterations=history.iterations + 1,
        norms=(*history.norms, *([tuple(norms)] if norms else ()))[-MEMORY:],
        metrics=columns,
        silent=max(0, history.silent - 1),
    )


def signs(history: History, options: Watch, weights: Mapping[str, float], rolls: bool = True) -> list[Sign]:
    """All that a history shows; `weights` are those of the rewards in the total, by name.

    `rolls`: there are rollouts, whose rewards held-out scores are read beside.
    """
    share = groups_alike(history)
    found = {
        "gradient": (gradient_grew(history, options), True),
        "reward": (reward_fell(history, options), True),
        "sampler": (held_out_left_behind(history, weights, rolls), True),
        "guard": (guarded_got_worse(history, options.guard, rolls), True),
        "saturation": (saturated(history), share > options.saturated),
        "unguarded": (unguarded_moved(history, options.guard, weights, rolls), False),
    }
    return [Sign(name, sentence, acts) for name, (sentence, acts) in found.items() if sentence is not None]


# ---- the gradient


def usual_norm(history: History, newest: int) -> float:
    """Median of the largest norm of an iteration, the newest iterations left out; NaN before there are enough.

    The largest, as later passes over a rollout are clipped more and more, down to a gradient of 0.
    """
    before = history.norms[:-newest]
    return median(map(max, before)) if len(before) >= WINDOW else math.nan


def gradient_grew(history: History, options: Watch) -> str | None:
    """Whether `norm_updates` updates, of iterations on end with at least one each, were over `norm_factor` times the usual."""
    usual = usual_norm(history, options.norm_updates)
    over: list[float] = []
    for norms in reversed(history.norms):
        found = [norm for norm in norms if norm > options.norm_factor * usual]
        if not found:
            break
        over = [*found, *over]
    if len(over) < options.norm_updates or not usual:
        return None
    shown = ", ".join(f"{norm:.3g}" for norm in over[-options.norm_updates :])
    return f"the gradient norm was over {options.norm_factor:g} times its running median, {usual:.3g}: {shown}"


# ---- the rewards of rollouts


class Fall(NamedTuple):
    """How far the newest mean of rollouts is below the best one."""

    best: float
    now: float
    error: float  # standard error of the difference of two such means
    unit: float  # standard deviation of the samples' total rewards at first


def measured(values: Series) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def means(values: Series) -> list[float]:
    """Means over every `WINDOW` neighbours; (N,) -> (N - WINDOW + 1,)."""
    return [fmean(values[start : start + WINDOW]) for start in range(len(values) - WINDOW + 1)]


def error(values: Series) -> float:
    """Standard error of the difference of two means over `WINDOW` iterations; (N,) -> ().

    From the changes between neighbours, which a slow rise or a late collapse hardly touches: their median absolute value is
    0.954 times the standard deviation of normal values (0.6745 times the square root of 2).
    """
    changes = [abs(later - earlier) for earlier, later in zip(values, values[1:], strict=False)]
    return median(changes) / 0.954 * math.sqrt(2 / WINDOW) if changes else 0.0


def fall(history: History) -> Fall | None:
    """Of the total reward; None before there are two windows."""
    values = measured(history.metrics.get("reward/total/mean", ()))
    if len(values) < 2 * WINDOW:
        return None
    over, spread = means(values), measured(history.metrics.get("reward/total/std", ()))
    return Fall(max(over), over[-1], error(values), median(spread[:WINDOW]))


def reward_fell(history: History, options: Watch) -> str | None:
    """Whether the mean of the newest rollouts is below the best such mean, by more than `fall` units and than chance.

    The unit is the standard deviation of the samples' rewards in the first iterations. A rule that served for rewards in [0, 1],
    0.05 below the best, is 0.15 units where samples score 0 or 1 nearly by the prompt alone (a deviation of about 0.33).
    """
    found = fall(history)
    if found is None or found.best - found.now <= max(options.fall * found.unit, ERRORS * found.error):
        return None
    return f"the reward of rollouts fell from {found.best:.4g} at best to {found.now:.4g}, means of {WINDOW} iterations"


def groups_alike(history: History) -> float:
    """Mean share of groups whose samples all have one total reward, over the newest iterations; 0 before there are enough."""
    values = measured(history.metrics.get("reward/total/groups_without_spread", ()))
    return fmean(values[-WINDOW:]) if len(values) >= WINDOW else 0.0


def saturated(history: History) -> str | None:
    """Whether most groups teach nothing; told, as a task that is solved looks the same."""
    share = groups_alike(history)
    if share <= SATURATED:
        return None
    return f"{share:.0%} of the groups have samples of one reward alone: solved, hopeless, or about to collapse"


# ---- held-out scores


def newest_errors(history: History) -> dict[str, list[tuple[int, float]]]:
    """Held-out scores of this iteration by name: the iterations of their evaluations, and the change since the start.

    In standard errors of the paired change; none where this iteration has no evaluation.
    """
    found = {}
    for metric, values in history.metrics.items():
        if metric.startswith("held_out/") and metric.endswith("/standard_errors") and not math.isnan(values[-1]):
            name = metric.removeprefix("held_out/").removesuffix("/standard_errors")
            found[name] = [(at, value) for at, value in enumerate(values) if not math.isnan(value)]
    return found


def weight_of(name: str, weights: Mapping[str, float]) -> float:
    """The weight of a reward, or of the reward that it is a component of."""
    return weights.get(name, weights.get(name.partition(".")[0], 0.0))


def held_out_left_behind(history: History, weights: Mapping[str, float], rolls: bool = True) -> str | None:
    """Whether a reward that is trained on falls on held-out samples, which are made without exploration, but not in rollouts."""
    for name, changes in newest_errors(history).items():
        good = math.copysign(1.0, weight_of(name, weights)) if weight_of(name, weights) else 0.0
        at, best = max([(0, 0.0), *changes], key=lambda change: good * change[1])
        lost = good * (best - changes[-1][1])
        if lost >= ERRORS and not rolls:
            return f"{name} fell on held-out samples by {lost:.1f} standard errors since iteration {at}"
        rollouts = history.metrics.get(f"reward/{name}/mean", ())
        then, now = (measured(rollouts[: max(at + 1, WINDOW)])[-WINDOW:], measured(rollouts)[-WINDOW:])
        if lost >= ERRORS and then and good * (fmean(now) - fmean(then)) >= 0:
            return (
                f"{name} fell on held-out samples by {lost:.1f} standard errors since iteration {at}, and not in rollouts "
                f"({fmean(then):.4g} -> {fmean(now):.4g}): over-fitted, or good only with the sampler's noise"
            )
    return None


def reward_rose(history: History) -> bool:
    """Whether the rollouts of today have at least the reward of the first ones."""
    over = means(measured(history.metrics.get("reward/total/mean", ())))
    return bool(over) and over[-1] >= over[0]


def guarded_got_worse(history: History, guard: Mapping[str, str], rolls: bool = True) -> str | None:
    """Whether a held-out score that `guard` names moved away from the way that is good, while the reward of rollouts rose."""
    for name, changes in newest_errors(history).items():
        moved = changes[-1][1]
        worse = {"higher": -moved, "lower": moved}.get(guard.get(name, ""), 0.0)
        if worse >= ERRORS and (not rolls or reward_rose(history)):
            return f"{name} got worse by {worse:.1f} standard errors on held-out samples{WHILE if rolls else ''}"
    return None


def unguarded_moved(
    history: History, guard: Mapping[str, str], weights: Mapping[str, float], rolls: bool = True
) -> str | None:
    """Which held-out scores, neither trained on nor guarded, moved while the reward rose: whether that is bad is not known."""
    others = {
        name: changes[-1][1]
        for name, changes in newest_errors(history).items()
        if name not in guard and not weight_of(name, weights) and abs(changes[-1][1]) >= ERRORS
    }
    if not others or (rolls and not reward_rose(history)):
        return None
    moved = ", ".join(f"{name} by {change:+.1f} standard errors" for name, change in others.items())
    asked = ", ".join(f'{name} = "{"lower" if change > 0 else "higher"}"' for name, change in others.items())
    return f"not trained on, moved{WHILE if rolls else ''}: {moved}; to stop where that is worse: watch.guard = {{ {asked} }}"
