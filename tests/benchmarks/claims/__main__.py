"""Train every method and GRPO on the small task on which its paper's claim can be seen; one JSON line a claim.

OMP_NUM_THREADS=1 python -m tests.benchmarks.claims --output assets
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import on_advantages, on_losses
from .claims import REPORTED, TUNING, line, outcome
from .report import picture, table

CLAIMS = {claim.name: claim for claim in [*on_advantages.CLAIMS, *on_losses.CLAIMS]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=sorted(CLAIMS), default=list(CLAIMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=40, help="runs of each side, at least 2")
    parser.add_argument("--tuning", type=int, default=len(TUNING), help="further runs of each learning rate")
    parser.add_argument("--output", type=Path, help="folder for claims.md and claims.png")
    asked = parser.parse_args(argv)
    seeds, tuning = tuple(range(REPORTED, REPORTED + asked.seeds)), TUNING[: asked.tuning]
    lines = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("claims", total=len(asked.only))
        for name in asked.only:
            bar.update(task, description=name)
            claim = CLAIMS[name]
            sides = [outcome(claim, side, seeds, tuning) for side in (claim.method, claim.against)]
            lines.append(line(claim, *sides))
            print(json.dumps(lines[-1]), flush=True)
            bar.update(task, advance=1)
    if asked.output is not None:
        (asked.output / "claims.md").write_text(table(lines), encoding="utf-8")
        picture(lines, asked.output / "claims.png")


if __name__ == "__main__":
    main()
