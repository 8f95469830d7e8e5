"""Train the image demo by every method and measure how long each takes to levels of its held-out reward.

python -m tests.benchmarks.time_to_reward --workers 2 --output assets

Finished runs are kept in the output folder: the same command goes on where it was stopped, adds what is new, and measures
again what has other settings.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .curves import LAST, Line
from .measuring import SEEDS, Conditions, measured, settings
from .methods import METHODS, Method
from .report import picture, table

BY_NAME = {method.name: method for method in METHODS}


class Task(NamedTuple):
    """A run to be made."""

    method: Method
    seed: int
    conditions: Conditions


def main(argv: Sequence[str] | None = None) -> None:
    asked = options().parse_args(argv)
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"time_to_reward{'' if asked.split == 'held_out' else '_' + asked.split}.jsonl"
    conditions = Conditions(asked.split, asked.samples, asked.every, asked.longer)
    lines = [line for line in kept(path) if current(line)]
    seeds = range(SEEDS[asked.split], SEEDS[asked.split] + asked.seeds)
    tasks = [Task(method, seed, conditions) for seed in seeds for method in asked.only]
    work([task for task in tasks if not any(fits(line, task) for line in lines)], asked.workers, lines, path)
    path.with_suffix(".md").write_text(table(lines), encoding="utf-8")
    picture(lines, path.with_suffix(".png"))
    print(table(lines))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=chosen, default=list(METHODS), metavar="NAME,NAME", help=", ".join(BY_NAME))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each of one thread")
    parser.add_argument("--split", choices=sorted(SEEDS), default="held_out", help="prompts that are judged")
    parser.add_argument("--samples", type=int, default=Conditions.samples, help="images of each judged prompt")
    parser.add_argument("--every", type=float, default=Conditions.every, help="processor seconds between evaluations")
    parser.add_argument("--longer", type=int, default=1, help="times the budget, to see whether a method collapses")
    parser.add_argument("--output", type=Path, default=Path("runs/time_to_reward"), help="folder of runs and report")
    return parser


def chosen(text: str) -> list[Method]:
    """The methods of names with commas between them."""
    for name in text.split(","):
        if name not in BY_NAME:
            raise argparse.ArgumentTypeError(f"no method {name!r}; expected some of {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in text.split(",")]


def kept(path: Path) -> list[Line]:
    """The runs that were finished."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def keep(path: Path, lines: Sequence[Line]) -> None:
    """Write all runs; a kill in between leaves the file as it was."""
    fresh = path.with_suffix(".fresh")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fresh.replace(path)


def current(line: Line) -> bool:
    """Whether a run is of a method with today's settings."""
    method = BY_NAME.get(line["method"])
    return method is not None and (line["budget"], line["settings"]) == (method.budget, settings(method, line["seed"]))


def fits(line: Line, task: Task) -> bool:
    """Whether a run is the one that is asked for."""
    where = ("method", "seed", "longer", "samples")
    wanted = task.method.name, task.seed, task.conditions.longer, task.conditions.samples
    return tuple(line[name] for name in where) == wanted


def work(tasks: Sequence[Task], workers: int, lines: list[Line], path: Path) -> None:
    """Make the runs, each in a process of its own, and keep each as soon as it is finished."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    total = sum(seconds(task) for task in tasks)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool, Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(f"{len(tasks)} runs", total=total)
        running = {pool.submit(measured, *task): task for task in tasks}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                lines.append(future.result())
                keep(path, lines)
                bar.update(shown, description=f"{done} of {len(tasks)} runs", advance=seconds(running[future]))
                bar.console.print(said(lines[-1]), markup=False, highlight=False)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def seconds(task: Task) -> float:
    return task.method.budget * task.conditions.longer


def said(line: Line) -> str:
    """A finished run in a few words."""
    curve = line["curve"]
    end = sum(curve["exact"][-LAST:]) / len(curve["exact"][-LAST:])
    took = f"{curve['iterations'][-1]} iterations in {curve['seconds'][-1]:.0f} s"
    return (
        f"{line['method']}, seed {line['seed']}: {took}, exact {curve['exact'][0]:.3f} to {end:.3f} {line['stopped']}"
    )


if __name__ == "__main__":
    main()
