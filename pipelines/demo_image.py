"""The image demo: align a tiny text-to-image model on a CPU with the trainer that aligns large ones, and draw the result.

Writes before_after.png, curve.png, summary.json and the aligned weights beside the run's own files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mmgrpo import journal
from mmgrpo.evaluation import held_out_samples, means
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.types import Samples
from pipelines import assets, demos, pictures
from pipelines.demos import points

TEXTBOOK = "flow_grpo"  # the method that has a recipe of its own
SHOWN = 2  # samples of every held-out prompt in the picture


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Align, evaluate on held-out prompts before and after, and write what a person would look at."""
    shipped = assets.folder("image_demo")
    places = {
        "policy.model": shipped,
        "prompts.source": shipped / "prompts" / "train.jsonl",
        "evaluation.source": shipped / "prompts" / "held_out.jsonl",
    }
    textbook = [one for one in overrides if one == f"method={TEXTBOOK}"]
    recipe = f"demo_image_{TEXTBOOK}" if textbook else "demo_image"
    training = demos.started(recipe, seed, places, [one for one in overrides if one not in textbook])
    before = generated(training)
    scores = means(training.rewards, before)
    took = demos.align(training, folder)
    with training.averaged():
        after = generated(training)
    reached = means(training.rewards, after)
    draw(training, folder, before, after)
    draw_curve(training, folder, scores)
    summary = {
        "held_out_before": scores["exact"],
        "held_out_after": reached["exact"],
        "quality_before": scores["distance"],
        "quality_after": reached["distance"],
        **took,
        "seed": seed,
        "iterations": training.iteration,
        "held_out_samples": len(after),
    }
    demos.conclude(folder, summary, {"before and after": "before_after.png", "curve": "curve.png"})


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
