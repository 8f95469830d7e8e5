"""The video editing demo: a tiny model learns on a CPU to recolour a moving shape and nothing else, with the trainer of large ones.

Writes clips of held-out prompts before and after as MP4, film_strip.png, curve.png, summary.json and the aligned weights beside
the run's own files.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmgrpo import journal, moved
from mmgrpo.evaluation import held_out_samples
from mmgrpo.moved import Moved
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.types import Samples
from pipelines import assets, demos, movies, pictures
from pipelines.demos import points
from pipelines.film_strips import film_strips

SHOWN = 8  # held-out prompts that are drawn and written as clips, whatever their scores
RATE, LOOPS, SCALE = 4, 4, 8  # frames a second of the clips, times that they are played, px of a pixel
SAID = ("edit", "colour", "iou")  # scores below a film strip


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Align, edit the held-out clips before and after, and write what a person would look at."""
    torch.set_num_threads(1)  # for so small a model a second one costs more than it brings, much more on a busy machine
    shipped = assets.folder("video_edit_demo")
    places = {
        "policy.model": shipped,
        "prompts.source": shipped / "train.jsonl",
        "evaluation.source": shipped / "held_out.jsonl",
    }
    training = demos.started("demo_video_edit", seed, places, overrides)
    before = edited(training)
    took = demos.align(training, folder)
    with training.averaged():
        after = edited(training)
    changes = moved.compared(moved.kept(folder), moved.kept(folder, moved.NOW), training.weights)
    movies.write_all(folder / "clips", shown(before, after), RATE, LOOPS, SCALE)
    draw(training, folder, before, after)
    draw_curve(folder, changes)
    facts = {"seed": seed, "iterations": training.iteration, "held_out_clips": len(training.held_out)}
    drawn = {"film strip": "film_strip.png", "curve": "curve.png", "clips": "clips"}
    table = {one.name: demos.told(one) for one in changes}
    demos.conclude(folder, {"held_out": table, **took, **facts}, drawn)


def edited(training: Run) -> Samples:
    """One edit of each of the shown held-out clips, from the same noise at every call; they lie evenly among all."""
    every = max(1, len(training.held_out) // SHOWN)
    return held_out_samples(training.policy, training.held_out[::every][:SHOWN], 1, training.recipe.seed)


def shown(before: Samples, after: Samples) -> dict[str, Tensor]:
    """The source of each edit, the edit before and the edit after, (B, F, 3, H, W) each."""
    assert before.source_video is not None and before.video is not None and after.video is not None
    return {"source": before.source_video, "before": before.video, "after": after.video}


def draw(training: Run, folder: Path, before: Samples, after: Samples) -> None:
    """The frames of each source beside those of its edits before and after, with what the edits scored."""
    lines = {"source": [prompt.text for prompt in before.prompts]}
    for name, samples in (("before", before), ("after", after)):
        found = score(training.rewards, training.weights, samples).rewards
        lines[name] = [", ".join(f"{part} {found[part][row]:.2f}" for part in SAID) for row in range(len(samples))]
    film_strips(shown(before, after), lines).save(folder / "film_strip.png")


def draw_curve(folder: Path, changes: Sequence[Moved]) -> None:
    """Every held-out score against iterations done, and that of the rollouts beside it."""
    lines = journal.read(folder)
    panels = {
        one.name: {
            "rollouts": points(lines, f"reward/{one.name}/mean"),
            "held out": points(lines, f"held_out/{one.name}", one.before),
        }
        for one in changes
    }
    pictures.curve(panels).save(folder / "curve.png")
