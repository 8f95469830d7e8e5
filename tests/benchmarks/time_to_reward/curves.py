"""From curves to times: when a running mean first reaches a level, and what the runs of a method have in common."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]  # of one run, as `measuring.measured` makes it
LEVELS = (0.80, 0.85, 0.90)  # of the share of exact images
LAST = 3  # evaluations at the end of a run that its final value is the mean of


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours; the first and the last have one."""
    return [statistics.fmean(values[max(0, at - 1) : at + 2]) for at in range(len(values))]


def crossing(places: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Where straight lines through the points first reach a level; None if they do not."""
    if values[0] >= level:
        return places[0]
    for at in range(1, len(values)):
        low, high = values[at - 1], values[at]
        if high >= level:
            return places[at - 1] + (level - low) / (high - low) * (places[at] - places[at - 1])
    return None


def reached(line: Line, level: float, cost: str) -> float | None:
    """What a run cost ("seconds", "evaluations") up to a level of exactness."""
    return crossing(line["curve"][cost], running_mean(line["curve"]["exact"]), level)


def middle(costs: Sequence[float | None]) -> float | None:
    """The median, in which what was never reached is later than everything; None if that is where it falls."""
    found = statistics.median([math.inf if cost is None else cost for cost in costs])
    return None if math.isinf(found) else found


def ratio(baseline: float | None, own: float | None) -> float | None:
    """How many times less something cost than the baseline; None where either did not get there."""
    return baseline / own if baseline is not None and own else None


@dataclass(frozen=True)
class Summary:
    """The runs of a method."""

    method: str
    seeds: int
    iteration: float  # processor seconds, median
    costs: Mapping[tuple[str, float], float | None]  # (cost, level) -> median
    start: float  # exactness before training
    finals: Sequence[float]  # exactness of each seed, the mean of its last evaluations
    peak: float  # median over seeds of the highest point of the running mean
    quality: tuple[float, float]  # distance to a true rendering before and at the end, means over seeds
    stopped: int  # runs that broke off


def summary(lines: Sequence[Line]) -> Summary:
    """What the runs of one method show."""
    curves = [line["curve"] for line in lines]
    return Summary(
        method=lines[0]["method"],
        seeds=len(lines),
        iteration=statistics.median(curve["seconds"][-1] / max(1, curve["iterations"][-1]) for curve in curves),
        costs={
            (cost, level): middle([reached(line, level, cost) for line in lines])
            for cost in ("seconds", "evaluations")
            for level in LEVELS
        },
        start=statistics.fmean(curve["exact"][0] for curve in curves),
        finals=[statistics.fmean(curve["exact"][-LAST:]) for curve in curves],
        peak=statistics.median(max(running_mean(curve["exact"])) for curve in curves),
        quality=(
            statistics.fmean(curve["distance"][0] for curve in curves),
            statistics.fmean(statistics.fmean(curve["distance"][-LAST:]) for curve in curves),
        ),
        stopped=sum(bool(line["stopped"]) for line in lines),
    )


def common(lines: Sequence[Line], name: str, points: int = 200) -> tuple[list[float], list[float]]:
    """Seconds up to the end of the shortest run, and the median over runs of one of their values there."""
    end = min(line["curve"]["seconds"][-1] for line in lines)
    places = [end * number / points for number in range(points + 1)]
    return places, [statistics.median(value_at(line["curve"], name, place) for line in lines) for place in places]


def value_at(curve: Mapping[str, Sequence[float]], name: str, place: float) -> float:
    """On the straight line between two evaluations."""
    at, values = curve["seconds"], curve[name]
    for after in range(1, len(at)):
        if at[after] >= place:
            share = (place - at[after - 1]) / (at[after] - at[after - 1])
            return values[after - 1] + share * (values[after] - values[after - 1])
    return values[-1]
