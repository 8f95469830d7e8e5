"""The watch over a run: it reads every iteration, says what it sees, and slows or stops the run as the recipe asks.

What it saw stands in watch.txt, in the metrics `watch/...`, and in every checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from mmgrpo import checkpoint
from mmgrpo.evaluation import look
from mmgrpo.recipe import Watch
from mmgrpo.run import Run, remembered
from mmgrpo.signs import SLOWER, WINDOW, History, Sign, fall, measured, read, signs, usual_norm

FILE = "watch.txt"
SLOWED = 3  # times at most; the next alarm stops the run


def attend(run: Run, metrics: Mapping[str, float], folder: Path) -> dict[str, float]:
    """Read an iteration and act on it; -> its metrics, with those of the watch, and held-out scores if it is the last."""
    rolls = run.recipe.train.stage != "offline"  # else rewards are those of samples that were made once
    seen = {name: value for name, value in metrics.items() if rolls or not name.startswith("reward/")}
    run.history, run.norms = read(run.history, run.norms, seen), []
    options = run.recipe.watch
    if options.action == "off":
        return dict(metrics)
    before = run.history
    if before.iterations >= options.after:
        run.history = judged(before, signs(before, options, run.weights, rolls), options, run.iteration)
    if run.history.said != before.said:
        write(folder, run.history.said)
    found = {**metrics, **numbers(run.history, options)}
    if run.history.stopped and run.held_out and run.recipe.train.evaluate_every and not evaluated(metrics):
        found |= look(run, folder)
    return found


def judged(history: History, seen: list[Sign], options: Watch, iteration: int) -> History:
    """The history after what was seen is told or acted on; a sign that is only told is told once."""
    acting = [sign for sign in seen if sign.acts and options.action != "tell"]
    fresh = [sign for sign in seen if sign not in acting and sign.name not in history.told]
    for sign in fresh:
        history = saying(history, f"iteration {iteration}: {sign.sentence}")
    history = replace(history, told=(*history.told, *(sign.name for sign in fresh)))
    if not acting or history.silent:
        return history
    what = "; ".join(sign.sentence for sign in acting)
    if options.action == "stop" or history.slowed == SLOWED:
        return saying(replace(history, stopped=what), f"iteration {iteration}: {what}; stopped")
    share = SLOWER ** (history.slowed + 1)
    slower = replace(history, slowed=history.slowed + 1, norms=(), silent=options.after)
    return saying(slower, f"iteration {iteration}: {what}; the learning rate is lowered to {share:.3g} of its own")


def saying(history: History, line: str) -> History:
    """The history with one more line."""
    return replace(history, said=(*history.said, line))


def numbers(history: History, options: Watch) -> dict[str, float]:
    """What is compared with the bounds, how often the run was slowed, and how much was said."""
    found = fall(history)
    usual, compared = usual_norm(history, options.norm_updates), {}
    if usual > 0:
        compared["watch/norm_over_median"] = max(history.norms[-1]) / usual
    if found is not None and found.unit:
        compared["watch/fall"] = (found.best - found.now) / found.unit
    counted = {"watch/slowed": float(history.slowed), "watch/lines": float(len(history.said))}
    return compared | counted


def evaluated(metrics: Mapping[str, float]) -> bool:
    return any(name.startswith("held_out/") for name in metrics)


def wants_checkpoint(run: Run) -> bool:
    """Whether one is due for the watch's sake: when the run has stopped, and before it can first stop."""
    options = run.recipe.watch
    return bool(run.history.stopped) or (options.action in ("stop", "slow") and run.iteration == options.after - 1)


def report(run: Run, folder: Path) -> None:
    """Say at the end what was seen and, of a run that was stopped, what its result is and how to go on."""
    lines = (*run.history.said, *(advice(run, folder) if run.history.stopped else ()))
    if lines:
        write(folder, lines)
        print("".join(f"watch: {line}\n" for line in lines), end="")


def advice(run: Run, folder: Path) -> tuple[str, ...]:
    """What a stopped run is worth, and two ways to go on."""
    done = f"stopped after {run.iteration} of {run.recipe.train.iterations} iterations"
    saved = checkpoint.saved(folder)
    newest = saved.pop(run.iteration)
    best = max(saved.values(), key=rating, default=None)
    if run.average is not None:
        result = f"the result is the average of the weights, in {newest / 'model'}"
    elif best is not None:
        result = f"there is no average of the weights ([ema] decay = 0); better than the newest are those in {best / 'model'}"
    else:
        result = "there is no average of the weights ([ema] decay = 0), and no earlier checkpoint: the start is better"
    slower = f"optimizer.learning_rate={run.recipe.optimizer.learning_rate / 2:g}"
    again = f"mmgrpo resume {best} {slower}" if best is not None else f"a new run with {slower}"
    return (
        f"{done}; {result}",
        f"go on with: {again}; or unwatched from here: mmgrpo resume {folder} watch.action=off",
    )


def rating(path: Path) -> float:
    """Mean reward of the newest rollouts before a checkpoint; the lowest of one that was stopped."""
    history = remembered(checkpoint.facts(path))
    values = measured(history.metrics.get("reward/total/mean", ()))[-WINDOW:]
    return fmean(values) if values and not history.stopped else -math.inf


def write(folder: Path, lines: tuple[str, ...]) -> None:
    """Write watch.txt anew: a run that goes on from an earlier checkpoint says again what it sees."""
    (folder / FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
