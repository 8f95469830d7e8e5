"""The loop: roll out, score, compare inside groups, improve, report. It knows no modality, reward or algorithm by name.

A run of the stage "pretrain" has a supervised lesson (mmgrpo/teaching.py) in the place of the first four, one of the stage "offline"
samples that were made and scored once (mmgrpo/offline.py) in the place of the first two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mmgrpo import checkpoint, diagnostics, watch
from mmgrpo.aggregations import token_mean
from mmgrpo.check import require_sound
from mmgrpo.descent import clip_gradient, follow_entropy, step, today
from mmgrpo.evaluation import look, newest, remember, report
from mmgrpo.gathering import Gathered, gather, held_back, recalled, store
from mmgrpo.improve import Given, Measured, NonFiniteError, accumulate
from mmgrpo.interrupt import Interrupted, Interrupts, listening
from mmgrpo.journal import Journal, Stopwatch, peak_memory
from mmgrpo.offline import collect, regrouped
from mmgrpo.recall import anchored
from mmgrpo.recipe import Recipe, load, resolved
from mmgrpo.run import Run, restore, save, start
from mmgrpo.selection import extremes, imitated, minibatches, of_decisions, separated
from mmgrpo.signs import History
from mmgrpo.teaching import lesson
from mmgrpo.types import Advantage, Trajectory


def train(recipe: Recipe, folder: Path) -> Run:
    """Train from the recipe's first state; writes recipe.toml, check.txt, metrics and checkpoints into the folder."""
    return begin(start(recipe), folder)


def begin(run: Run, folder: Path) -> Run:
    """Check a new run and train it; raises FileExistsError if the folder holds one already."""
    if checkpoint.latest(folder) is not None:
        raise FileExistsError(f"{folder} holds a run already; continue it with: mmgrpo resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(resolved(run.recipe), encoding="utf-8")
    require_sound(run, folder)
    return loop(run, folder)


def resume(place: Path, overrides: Sequence[str] = ()) -> Run:
    """Continue a run from its newest complete checkpoint, or from the one named, as if it had never stopped.

    Overrides become part of the run's recipe. With some, a run that its watch had stopped goes on, and is watched anew.
    """
    path = newest(place)
    folder = path.parents[1]
    recipe = load(folder / "recipe.toml", overrides)
    run = restore(start(recipe), path)
    if overrides:
        (folder / "recipe.toml").write_text(resolved(recipe), encoding="utf-8")
        run.history = History() if run.history.stopped else run.history
    return loop(run, folder)


def loop(run: Run, folder: Path) -> Run:
    """Iterate until the recipe's end, or the watch's stop, or an interrupt, which is saved and raised as Interrupted."""
    options = run.recipe.train
    written = Journal(folder, resume_at=run.iteration, trackers=options.trackers)
    with written as journal, listening() as interrupts, progress() as bar:
        if options.stage == "offline":
            collect(run, folder, bar, interrupts)
        if run.held_out and options.evaluate_every and run.iteration == 0:
            remember(run, folder)
        task = bar.add_task(options.stage, total=options.iterations, completed=run.iteration, note="")
        while run.iteration < options.iterations and not run.history.stopped:
            metrics = guarded_iteration(run, folder)
            if run.held_out and due(run, options.evaluate_every):
                metrics |= look(run, folder)
            metrics = watch.attend(run, metrics, folder)
            journal.write(run.iteration, metrics)
            bar.update(task, advance=1, note=note(metrics))
            run.iteration += 1
            stop_or_save(run, folder, interrupts)
    report(folder)
    watch.report(run, folder)
    return run


def due(run: Run, every: int) -> bool:
    """Whether something done every so many iterations is due after this one, the last included; 0 is never."""
    return every > 0 and ((run.iteration + 1) % every == 0 or run.iteration + 1 == run.recipe.train.iterations)


def stop_or_save(run: Run, folder: Path, interrupts: Interrupts) -> None:
    """Save at the recipe's intervals, at the end, for the watch, and before stopping on request."""
    options = run.recipe.train
    if interrupts.signal is not None:
        save(run, folder)
        done = f"stopped after iteration {run.iteration} of {options.iterations}, saved"
        raise Interrupted(f"{done}; continue with: mmgrpo resume {folder}", interrupts.signal)
    if run.iteration % options.save_every == 0 or run.iteration == options.iterations or watch.wants_checkpoint(run):
        save(run, folder)


def guarded_iteration(run: Run, folder: Path) -> dict[str, float]:
    """An iteration whose failure is saved beside the run's checkpoints, not as one of them."""
    try:
        return STAGES[run.recipe.train.stage](run)
    except NonFiniteError as error:
        path = save(run, folder / "failure")
        raise NonFiniteError(f"iteration {run.iteration}: {error}; the state is saved in {path}") from error


def iteration(run: Run, gathering: Callable[[Run, Stopwatch], Gathered] = gather) -> dict[str, float]:
    """One rollout, or several until enough groups differ inside, and the updates made from it; -> metrics."""
    phases = Stopwatch(run.device)
    with run.behaviour.applied():
        rolled = recalled(run, gathering(run, phases))
        with phases.measure("score"):
            feedback = held_back(run, rolled)
        advantage = run.compare(feedback)
        with phases.measure("update"):
            store(run, rolled, advantage)
    with phases.measure("update"):
        metrics = improve(run, rolled, advantage)
    run.reference.after_iteration()
    run.behaviour.after_iteration(run.iteration)
    judged = {f"reward/{name}": value for name, value in diagnostics.reward_summary(rolled.judged).items()}
    compared = {f"advantage/{name}": value for name, value in advantage.metrics.items()}
    seconds = phases.take()
    rollout = rolled.metrics | {"samples_per_second": len(rolled.judged.group) / sum(seconds.values())}
    return metrics | judged | compared | seconds | rollout | peak_memory(run.device)


def improve(run: Run, rolled: Gathered, advantage: Advantage) -> dict[str, float]:
    """Every optimizer update that a rollout is used for; metrics of the first and the last."""
    options, trajectory = run.recipe.train, rolled.trajectory
    if advantage.decisions is not None:
        trajectory = replace(trajectory, mask=trajectory.mask & advantage.decisions)
    values = of_decisions(advantage.values, trajectory.mask)
    among = trajectory.group if options.keep_among == "group" else torch.zeros_like(trajectory.group)
    keep = extremes(values.mean(1), among, advantage.keep, options.keep_share) & trajectory.mask.any(1)
    imitate = imitated(advantage, run.loss.anchor_weight)
    reward = of_decisions(rolled.feedback.total(), trajectory.mask)
    judged = Judged(values, keep, imitate, reward, separated(advantage, trajectory.mask))
    parts = [weighed(run, trajectory, judged, rows) for rows in minibatches(trajectory.group, options.updates)]
    lags = run.behaviour.lags
    later = parts if options.passes > 1 or lags else parts[1:]  # evaluated under other weights than those that sampled
    if later:
        with run.behaviour.applied():
            trajectory = anchored(run.policy, trajectory, [part.rows for part in later], rolled.past)
    seen: list[dict[str, float]] = []
    for part in parts * options.passes:
        fresh = not seen and not lags and not rolled.past[part.rows].any()
        seen.append(update(run, trajectory, part, fresh))
    return seen[-1] | {f"{name}/first": value for name, value in seen[0].items()}


class Part(NamedTuple):
    """The samples of one update that can move the loss."""

    rows: Tensor  # (b,) int64 of the trajectory
    given: Given  # (b, S) of their decisions; the denominators count every sample that is kept


class Judged(NamedTuple):
    """What is known of every sample of a rollout before it is shared out among updates."""

    advantages: Tensor  # (B, S)
    keep: Tensor  # (B,) bool
    imitate: Tensor | None  # (B,) bool
    reward: Tensor  # (B, S) the total of its sample
    separate: Tensor | None = None  # (B, S, K) of which the advantages are the sum


def weighed(run: Run, trajectory: Trajectory, judged: Judged, rows: Tensor) -> Part:
    """The rows of one update; those that add nothing to its gradient are left out, but not out of its denominators."""
    mask, advantages = trajectory.mask[rows], judged.advantages[rows]
    separate = None if judged.separate is None else judged.separate[rows]
    weights = run.aggregate(mask, keep=judged.keep[rows])
    used = weights.ne(0).any(1)
    if run.recipe.train.drop_zero_advantage and not run.loss.every:
        used &= (advantages if separate is None else separate.flatten(1)).ne(0).any(1)
    copied = None if judged.imitate is None else token_mean(mask, keep=judged.imitate[rows])
    if copied is not None:
        used |= copied.ne(0).any(1)
    evenly = token_mean(mask, keep=judged.keep[rows]) if "entropy" in run.loss.needs or run.loss.band else None
    given = Given(advantages, weights, copied, judged.reward[rows], evenly, separate)
    return Part(rows[used], given.each(lambda value: value[used]))


def update(run: Run, trajectory: Trajectory, part: Part, fresh: bool) -> dict[str, float]:
    """One optimizer update from the rows of a part."""
    if len(part.rows) == 0:
        return {"update/samples": 0.0}
    chosen = trajectory.take(part.rows)
    held = run.reference if run.reference.active else None
    try:
        measured = accumulate(run.policy, chosen, part.given, today(run), held, fresh)
        norm = clip_gradient(run)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; sample ids {chosen.batch.sample.tolist()[:16]}") from error
    step(run)
    return summary(measured, chosen, norm, run) | follow_entropy(run, measured, part.given)


def summary(measured: Measured, part: Trajectory, norm: float, run: Run) -> dict[str, float]:
    """What one update showed, by name."""
    plain = {
        "update/loss": measured.loss,
        "update/grad_norm": norm,
        "update/samples": float(len(part)),
        "update/learning_rate": run.learning_rate(),
    }
    moved = diagnostics.decisions(measured.values, measured.slope, part.mask)
    return plain | {f"update/{name}": value for name, value in moved.items()}


STAGES: Mapping[str, Callable[[Run], dict[str, float]]] = {
    "align": iteration,
    "pretrain": lesson,
    "offline": partial(iteration, gathering=regrouped),
}


def note(metrics: Mapping[str, float]) -> str:
    """What the bar shows beside the count."""
    rewarded = metrics.get("reward/total/mean")
    shown = f"loss {metrics['teach/loss']:.4g}" if rewarded is None else f"reward {rewarded:.3f}"
    return f"{shown}, see {watch.FILE}" if metrics.get("watch/lines") else shown


def progress() -> Progress:
    """A bar with what is done and what is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
