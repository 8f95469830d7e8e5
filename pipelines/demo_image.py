"""The image demo: align a tiny text-to-image model on a CPU with the trainer that aligns large ones, and draw the result.

Writes before_after.png, curve.png, summary.json and the aligned weights beside the run's own files.
"""

import json
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch

from mmgrpo import journal
from mmgrpo.evaluation import held_out_samples, means
from mmgrpo.recipe import load
from mmgrpo.run import Run, start
from mmgrpo.scoring import score
from mmgrpo.trainer import begin
from mmgrpo.types import Samples
from pipelines import assets, pictures

SHOWN = 2  # samples of every held-out prompt in the picture


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Align, evaluate on held-out prompts before and after, and write what a person would look at."""
    shipped = assets.folder("image_demo")
    places = [
        f"seed={seed}",
        f"policy.model={json.dumps(str(shipped))}",
        f"prompts.source={json.dumps(str(shipped / 'prompts' / 'train.jsonl'))}",
        f"evaluation.source={json.dumps(str(shipped / 'prompts' / 'held_out.jsonl'))}",
    ]
    recipe = load(Path(str(files("pipelines") / "recipes" / "demo_image.toml")), [*places, *overrides])
    training = start(recipe)
    before = generated(training)
    scores = means(training.rewards, before)
    begun = time.perf_counter()
    begin(training, folder)
    seconds = time.perf_counter() - begun
    with training.averaged():
        after = generated(training)
        training.policy.save(folder / "aligned")
    reached = means(training.rewards, after)
    draw(training, folder, before, after)
    draw_curve(training, folder, scores)
    summary = {
        "held_out_before": scores["exact"],
        "held_out_after": reached["exact"],
        "quality_before": scores["distance"],
        "quality_after": reached["distance"],
        "seconds": training_seconds(folder),
        "seconds_with_checks": seconds,
        "seed": seed,
        "iterations": training.iteration,
        "held_out_samples": len(after),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    print(f"before and after: {folder / 'before_after.png'}\ncurve: {folder / 'curve.png'}")


def training_seconds(folder: Path) -> float:
    """Seconds of rollouts, rewards and updates, without the check before training and the held-out curve."""
    phases = ("seconds/rollout", "seconds/score", "seconds/update")
    return sum(float(line[name] or 0) for line in journal.read(folder) for name in phases)


def generated(training: Run) -> Samples:
    """The held-out samples, from the same noise at every call."""
    options = training.recipe.evaluation
    return held_out_samples(training.policy, training.held_out, options.samples, training.recipe.seed)


def draw(training: Run, folder: Path, before: Samples, after: Samples) -> None:
    """Two samples of every held-out prompt before and after, framed by whether they are exact."""
    count = training.recipe.evaluation.samples
    rows = torch.tensor([row for row in range(len(after)) if row % count < SHOWN])
    old, new = before.take(rows), after.take(rows)
    assert old.image is not None and new.image is not None
    exact = {name: value for name, value in training.rewards.items() if name == "exact"}
    marks = [score(exact, {"exact": 1.0}, part).rewards["exact"].bool().tolist() for part in (old, new)]
    captions = [prompt.text for prompt in new.prompts]
    picture = pictures.before_after(old.image, new.image, captions, marks[0], marks[1], columns=6, scale=8)
    picture.save(folder / "before_after.png")


def draw_curve(training: Run, folder: Path, scores: Mapping[str, float]) -> None:
    """What rollouts and held-out samples reached, iterations done from left to right; the start is the scores before."""
    lines = journal.read(folder)
    panels = {
        "exact match": {
            "rollouts": points(lines, "reward/exact/mean"),
            "held out": points(lines, "held_out/exact", scores["exact"]),
        },
        "distance to a true rendering": {"held out": points(lines, "held_out/distance", scores["distance"])},
    }
    pictures.curve(panels).save(folder / "curve.png")


def points(lines: Sequence[journal.Line], name: str, start: float | None = None) -> tuple[list[float], list[float]]:
    """How many iterations were done when a metric was written, and its values; a start stands at 0."""
    found = [(float(line["iteration"] or 0) + 1, line[name]) for line in lines if name in line]
    known = [(at, float(value)) for at, value in found if value is not None]
    known = known if start is None else [(0.0, start), *known]
    return [at for at, _ in known], [value for _, value in known]
