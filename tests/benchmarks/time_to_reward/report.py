"""The runs as a table and as a picture."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import LEVELS, Line, Summary, common, ratio, summary
from .methods import BASELINE, METHODS

COMMAND = "python -m tests.benchmarks.time_to_reward --output assets"
ABOUT = f"""Processor seconds of training on the image demo, one thread, evaluations left out, to levels of the share of exact images
among {{judged}}; medians over seeds, "-" where fewer than half of the runs got there. Evaluated every 5 seconds, or 2 where training takes
30. A level is reached where the running mean over 3 evaluations crosses it. Ratios: what Flow-GRPO needed over what the method needed, in seconds and in network
evaluations, a backward pass counted as two. At the end: the mean of the last 3 evaluations. Distance: to the nearest true
rendering, which training does not see; lower is better. `{COMMAND}`

"""
COLUMNS = (
    "method",
    "seconds per iteration",
    "seconds to {}",
    "ratio of seconds",
    "ratio of evaluations",
    "exact at the end, each seed",
)
HEAD = (*COLUMNS, "its mean", "distance before, after", "seeds")
LONG = (
    "method, left running longer",
    "times",
    "highest exact",
    "exact at the end, each seed",
    "its mean",
    "distance before, after",
)
JUDGED = {"held_out": "held-out prompts", "validation": "validation prompts"}


def grouped(lines: Sequence[Line], longer: bool) -> dict[tuple[str, int], list[Line]]:
    """The runs of each method that were left running longer, or that were not, in the order of the methods."""
    found: dict[tuple[str, int], list[Line]] = {}
    order = [method.name for method in METHODS]
    for line in sorted(lines, key=lambda line: (order.index(line["method"]), line["longer"], line["seed"])):
        if (line["longer"] > 1) == longer:
            found.setdefault((line["method"], line["longer"]), []).append(line)
    return found


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row for each method, then one for each that was left running longer."""
    plain = [summary(part) for part in grouped(lines, longer=False).values()]
    baseline = next((one for one in plain if one.method == BASELINE.name), None)
    text = ABOUT.format(judged=JUDGED[lines[0]["split"]])
    levels = " / ".join(f"{level:.2f}" for level in LEVELS)
    text += markdown(tuple(name.format(levels) for name in HEAD), [row(one, baseline) for one in plain])
    long = [(times, summary(part)) for (_, times), part in grouped(lines, longer=True).items()]
    return text + ("\n" + markdown(LONG, [long_row(times, one) for times, one in long]) if long else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def row(one: Summary, baseline: Summary | None) -> list[str]:
    """The cells of a method."""
    ratios = [
        joined(ratio(baseline.costs[cost, level] if baseline else None, one.costs[cost, level]) for level in LEVELS)
        for cost in ("seconds", "evaluations")
    ]
    times = " / ".join("-" if (cost := one.costs["seconds", level]) is None else f"{cost:.0f}" for level in LEVELS)
    return [named(one), f"{one.iteration:.2f}", times, *ratios, *ending(one), str(one.seeds)]


def long_row(times: int, one: Summary) -> list[str]:
    return [named(one), str(times), f"{one.peak:.2f}", *ending(one)]


def joined(values: Iterable[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)


def named(one: Summary) -> str:
    method = next(method for method in METHODS if method.name == one.method)
    broke = f"; {one.stopped} of {one.seeds} stopped early" if one.stopped else ""
    return f"{method.title} ({method.paper}){broke}"


def ending(one: Summary) -> list[str]:
    finals = ", ".join(f"{value:.2f}" for value in one.finals)
    return [finals, f"{statistics.fmean(one.finals):.3f}", f"{one.quality[0]:.3f}, {one.quality[1]:.3f}"]


def picture(lines: Sequence[Line], path: Path) -> None:
    """Exactness and distance against processor seconds, medians over seeds."""
    parts = {name: part for (name, _), part in grouped(lines, longer=False).items()}
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        exact, distance = figure.subplots(1, 2)
        draw(exact, parts, "exact", "share of exact images")
        draw(distance, parts, "distance", "distance to a true rendering")
        for level in LEVELS:
            exact.axhline(level, color="#d0d0d0", linewidth=0.8, zorder=0)
        figure.legend(*exact.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=110)


def draw(axes: Axes, parts: Mapping[str, Sequence[Line]], name: str, label: str) -> None:
    """A line for each method, in its own colour whatever else is drawn."""
    for number, method in enumerate(METHODS):
        if method.name in parts:
            places, values = common(parts[method.name], name)
            axes.plot(places[1:], values[1:], color=matplotlib.colormaps["tab20"](number % 20), label=method.title)
    before = statistics.fmean(line["curve"][name][0] for part in parts.values() for line in part)
    axes.axhline(before, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("processor seconds of training")
    axes.set_ylabel(f"{label}; dotted: before")
    axes.spines[["top", "right"]].set_visible(False)
