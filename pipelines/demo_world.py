"""The world model demo: a tiny model learns on a CPU to draw what actions do, with the trainer of large ones.

It is rewarded by what an inverse-dynamics model reads of its clips, and measured by where the dot really went.
Writes clips of held-out prompts before and after as MP4, film_strips.png, curve.png, summary.json and the aligned weights
beside the run's own files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmgrpo import journal, moved
from mmgrpo.evaluation import held_out_samples
from mmgrpo.moved import Moved
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.types import Batch, Samples
from pipelines import assets, demos, movies, pictures
from pipelines.demos import points
from pipelines.film_strips import Scene, Strip, film
from pipelines.pictures import Line

SHOWN = 12  # held-out prompts that are drawn and written as clips, whatever their scores
RATE, LOOPS, SCALE = 2, 3, 12  # frames a second of the clips, times that they are played, px of a pixel
PANELS = {  # of the curve: y axis -> name of the line -> score
    "share of actions obeyed": {"inverse dynamics (trained on)": "read", "pixel tracking": "tracked.accuracy"},
    "one whole dot of the right colour": {"share of frames": "drawing.whole", "likeness": "drawing.likeness"},
}


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Align, act in the held-out worlds before and after, and write what a person would look at."""
    torch.set_num_threads(1)  # for so small a model a second one costs more than it brings, much more on a busy machine
    shipped = assets.folder("world_demo")
    places = {
        "policy.model": shipped / "generator",
        "rewards.read.model.source": shipped / "inverse_dynamics",
        "prompts.source": shipped / "train.jsonl",
        "evaluation.source": shipped / "held_out.jsonl",
    }
    training = demos.started("demo_world", seed, places, overrides)
    before = acted(training)
    took = demos.align(training, folder)
    with training.averaged():
        after = acted(training)
    changes = moved.compared(moved.kept(folder), moved.kept(folder, moved.NOW), training.weights)
    assert before.video is not None and after.video is not None
    movies.write_all(folder / "clips", {"before": before.video, "after": after.video}, RATE, LOOPS, SCALE)
    draw(training, folder, before, after)
    draw_curve(folder, changes)
    table: dict[str, object] = {"held_out": {one.name: demos.told(one) for one in changes}}
    facts = {"seed": seed, "iterations": training.iteration, "held_out_prompts": len(training.held_out)}
    shown = {"film strips": "film_strips.png", "curve": "curve.png", "clips": "clips"}
    demos.conclude(folder, table | took | facts, shown)


def acted(training: Run) -> Samples:
    """A clip of each of the first held-out prompts, from the same noise at every call."""
    return held_out_samples(training.policy, training.held_out[:SHOWN], 1, training.recipe.seed)


def draw(training: Run, folder: Path, before: Samples, after: Samples) -> None:
    """Every frame before and after, under each the action that leads to it, framed by whether pixel tracking finds it."""
    scenes = []
    for row in range(len(after)):
        rows, strips = torch.tensor([row]), []
        for name, samples in (("before", before), ("after", after)):
            own = samples.take(rows)
            assert own.video is not None
            strips.append(Strip(name, own.video[0], [("first", None), *obeyed(training, own)]))
        scenes.append(Scene("", strips))
    film(scenes, columns=3, scale=5).save(folder / "film_strips.png")


def obeyed(training: Run, sample: Samples) -> list[Line]:
    """Each action of one sample and whether the dot went that way: pairs of frames are clips of one action."""
    assert sample.video is not None
    (prompt,), clip = sample.prompts, sample.video[0]
    actions = prompt.columns["actions"]
    assert isinstance(actions, list)
    ids = torch.arange(len(actions))
    prompts = tuple(replace(prompt, columns={**prompt.columns, "actions": [action]}) for action in actions)
    pairs = Samples(Batch(prompts, ids, ids, 0, 0), video=torch.stack([clip[:-1], clip[1:]], 1))
    found = score({"tracked": training.rewards["tracked"]}, {"tracked": 1.0}, pairs).rewards["tracked.accuracy"]
    return list(zip(actions, found.bool().tolist(), strict=True))


def draw_curve(folder: Path, changes: Sequence[Moved]) -> None:
    """What held-out clips reached, iterations done from left to right; the start is the scores before."""
    lines, start = journal.read(folder), {one.name: one.before for one in changes}
    panels = {
        label: {name: points(lines, f"held_out/{key}", start[key]) for name, key in parts.items()}
        for label, parts in PANELS.items()
    }
    pictures.curve(panels).save(folder / "curve.png")
