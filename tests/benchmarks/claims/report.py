"""The claims as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .claims import CLEAR

Line = Mapping[str, Any]
FARTHEST = 50.0  # standard errors that are drawn
COLOURS = {"shows": "#1b7837", "does not show": "#878787", "opposite": "#b2182b"}
COMMAND = "OMP_NUM_THREADS=1 python -m tests.benchmarks.claims --output assets"
ABOUT = f"""Each method against GRPO or another, trained on the same small task with equal samples: mean and standard error over
seeds, the difference of paired seeds in standard errors, positive where the method is better. "Shows" and "opposite" are beyond
{CLEAR:g} of them and a hundredth of the other side. Claims of not being worse count from the loss that they allow. Learning rates
were chosen for each side on other seeds, or are equal; the JSON lines hold them. `{COMMAND}`

"""
HEAD = "| claim | method | against | metric | method's | other's | in standard errors | verdict |\n|---|---|---|---|---|---|---|---|\n"


def table(lines: Sequence[Line]) -> str:
    """Markdown, a row for each claim."""
    return ABOUT + HEAD + "".join(row(line) for line in lines)


def row(line: Line) -> str:
    method, other = line["method"], line["against"]
    cells = [
        f"{line['claim']}: {line['says']}",
        method["name"],
        other["name"],
        line["metric"],
        f"{method['mean']:.3f} ± {method['error']:.3f}",
        f"{other['mean']:.3f} ± {other['error']:.3f}",
        f"{line['standard_errors']:+.1f}" + ("" if line["tolerance"] is None else f" from -{line['tolerance']:g}"),
        line["verdict"],
    ]
    return "| " + " | ".join(cells) + " |\n"


def picture(lines: Sequence[Line], path: Path) -> None:
    """A dot for each claim, how many standard errors the method is better; two columns of claims."""
    half = (len(lines) + 1) // 2
    parts = [part for part in (lines[:half], lines[half:]) if part]
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(7.2 * len(parts), 0.31 * half + 1.3), layout="constrained")
        for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw(axes, part)
        figure.suptitle(
            "How much better than GRPO, or than what is named, in standard errors of paired seeds "
            f"(n = {lines[0]['seeds']}); right: the method's value, the other's"
        )
        figure.savefig(path, dpi=80)


def draw(axes: Axes, lines: Sequence[Line]) -> None:
    """The claims of one column; the band is what is not clear."""
    places = range(len(lines))
    axes.axvspan(-CLEAR, CLEAR, color="#eeeeee", zorder=0)
    axes.axvline(0, color="black", linewidth=0.6)
    for place, line in zip(places, lines, strict=True):
        colour = COLOURS[line["verdict"]]
        distance = min(max(line["standard_errors"], -FARTHEST), FARTHEST)
        axes.errorbar(distance, place, xerr=1, fmt="o", markersize=4, color=colour, linewidth=1)
        values = f"{line['method']['mean']:.3g}, {line['against']['mean']:.3g}"
        axes.annotate(values, (1.03, place), xycoords=("axes fraction", "data"), va="center", color=colour)
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xlim(-1.5 * FARTHEST, 1.5 * FARTHEST)
    ticks = [-50, -10, -3, 0, 3, 10, 50]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks(places, [label(line) for line in lines])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def label(line: Line) -> str:
    """The method, the metric, and what it is compared with where that is not GRPO."""
    other = "" if line["against"]["name"] == "GRPO" else f" against {line['against']['name']}"
    other += "" if line["tolerance"] is None else f", at most {line['tolerance']:g} worse"
    return f"{line['claim']} ({line['method']['name']}{other})\n{line['metric']}"
