"""The interleaved demo: a tiny model learns on a CPU to answer sums in words and pictures, with the trainer of large ones.

Writes stories.png, curve.png, summary.json and the aligned weights beside the run's own files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo import journal, seeds
from mmgrpo.data import requests
from mmgrpo.evaluation import held_out_samples
from mmgrpo.run import Run
from mmgrpo.types import Samples
from pipelines import assets, demos, pictures
from pipelines.demos import points

SHOWN = 8  # prompts in the picture
MEASURES = ("text", "picture", "exact", "form", "distance")
FRAMES = {True: (0.10, 0.60, 0.31), False: (0.84, 0.19, 0.15)}  # green and red, of a picture that is right or wrong


class Answered(NamedTuple):
    """What the model answers to the held-out prompts."""

    likeliest: Samples  # the likeliest words, pictures without the sampler's noise
    parts: Mapping[str, Tensor]  # scores of their parts, by measure; (B, J), or (B,) of whole answers
    sampled: Mapping[str, Tensor]  # of answers sampled as in training; (B,)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Of the likeliest answers, by measure; (B,)."""
        return summed(self.parts)

    def means(self) -> dict[str, float]:
        """Each measure over all answers, and the reward, half of it for words and half for pictures."""
        found: dict[str, float] = {}
        for way, scores in (("", self.scores), ("_sampled", self.sampled)):
            found |= {f"{name}{way}": float(scores[name].nanmean()) for name in MEASURES}
            found[f"hybrid{way}"] = float(hybrid(scores).mean())
        return found


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Align, answer held-out prompts before and after, and write what a person would look at."""
    torch.set_num_threads(1)  # for so small a model a second one costs more than it brings, much more on a busy machine
    shipped = assets.folder("interleaved_demo")
    places = {
        "policy.model": shipped,
        "prompts.source": shipped / "prompts" / "train.jsonl",
        "evaluation.source": shipped / "prompts" / "held_out.jsonl",
    }
    training = demos.started("demo_interleaved", seed, places, overrides)
    before = answered(training)
    took = demos.align(training, folder)
    with training.averaged():
        after = answered(training)
    draw(folder, before, after)
    draw_curve(folder, before)
    old, new = before.means(), after.means()
    summary: dict[str, object] = {
        f"{name}_{when}": values[name] for name in old for when, values in (("before", old), ("after", new))
    }
    errors = {
        f"{name}{way}_standard_errors": standard_errors(before, after, name, way)
        for way in ("", "_sampled")
        for name in ("hybrid", *MEASURES)
    }
    further = {"seed": seed, "iterations": training.iteration, "held_out_answers": len(after.likeliest)}
    demos.conclude(folder, summary | errors | took | further, {"answers": "stories.png", "curve": "curve.png"})


def answered(training: Run) -> Answered:
    """Ask every held-out prompt several times, with the same random numbers at every call."""
    count, seed = training.recipe.evaluation.samples, training.recipe.seed
    likeliest = held_out_samples(training.policy, training.held_out, count, seed)
    asked = requests(
        training.held_out, range(len(training.held_out)), group_size=count,
        seed=seeds.derive(seed, "sampled evaluation"), iteration=0,
    )  # fmt: skip
    _, sampled = training.policy.rollout(asked)
    return Answered(likeliest, judged(training, likeliest), summed(judged(training, sampled)))


def judged(training: Run, samples: Samples) -> dict[str, Tensor]:
    """Every measure of the parts of every answer, (B, J), or of the answers, (B,)."""
    asked = training.rewards | training.watched
    values = {name: asked[name](samples) for name in MEASURES}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def summed(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of whole answers; (B,) each."""
    return {name: value.nansum(1) if value.dim() == 2 else value for name, value in parts.items()}


def hybrid(scores: Mapping[str, Tensor]) -> Tensor:
    """(B,) in [0, 1]."""
    return (scores["text"] + scores["picture"]) / 2


def standard_errors(before: Answered, after: Answered, name: str, way: str) -> float:
    """The change of a measure over its standard error, paired by prompt; `way` is "" for likeliest answers, or "_sampled"."""
    old, new = (one.scores if way == "" else one.sampled for one in (before, after))
    values = [hybrid(one) if name == "hybrid" else one[name] for one in (old, new)]
    prompts = len({prompt.id for prompt in after.likeliest.prompts})
    change = (values[1] - values[0]).view(prompts, -1).nanmean(1).double()
    error = change.std() / prompts**0.5
    return float(change.mean() / error) if error > 0 else 0.0


def draw(folder: Path, before: Answered, after: Answered) -> None:
    """A row for each of some prompts: its answer before, then after; pictures framed and words coloured by whether they are right."""
    count = len(after.likeliest) // len({prompt.id for prompt in after.likeliest.prompts})
    every = max(1, len(after.likeliest) // count // SHOWN) * count
    tiles = []
    for row in range(0, len(after.likeliest), every)[:SHOWN]:
        prompt = after.likeliest.prompts[row]
        for when, one in (("before", before), ("after", after)):
            tiles += story(prompt.text, when, *marked(one, row))
    pictures.sheet(tiles, columns=4, scale=12).save(folder / "stories.png")


def marked(answered: Answered, row: int) -> tuple[list[tuple[str, bool]], list[tuple[Tensor, bool]]]:
    """The texts and the pictures of one answer, each with whether it is right."""
    assert answered.likeliest.interleaved is not None
    texts: list[tuple[str, bool]] = []
    drawn: list[tuple[Tensor, bool]] = []
    for place, part in enumerate(answered.likeliest.interleaved[row]):
        if isinstance(part, str):
            texts.append((part, bool(answered.parts["text"][row, place] > 0)))
        else:
            drawn.append((part, bool(answered.parts["exact"][row, place] > 0)))
    return texts, drawn


def story(
    prompt: str, when: str, texts: Sequence[tuple[str, bool]], drawn: Sequence[tuple[Tensor, bool]]
) -> list[tuple[Tensor, list[pictures.Line]]]:
    """Two tiles: each picture of an answer with the words in front of it."""
    tiles = []
    for number in range(2):
        text, right = texts[number] if number < len(texts) else ("no words", False)
        image, good = drawn[number] if number < len(drawn) else (torch.ones(3, 16, 16), False)
        lines: list[pictures.Line] = [(prompt if number == 0 else when, None), (text, right)]
        tiles.append((framed(image, good), lines))
    return tiles


def framed(image: Tensor, right: bool) -> Tensor:
    """The picture in a frame of one pixel; (3, H, W) -> (3, H + 2, W + 2)."""
    height, width = image.shape[1:]
    frame = torch.tensor(FRAMES[right])[:, None, None].repeat(1, height + 2, width + 2)
    frame[:, 1:-1, 1:-1] = image
    return frame


def draw_curve(folder: Path, before: Answered) -> None:
    """What rollouts and held-out answers reached, iterations done from left to right; the start is the scores before."""
    lines, start = journal.read(folder), before.means()
    panels = {}
    for name, label in (("text", "texts that are right"), ("exact", "pictures that are right")):
        panels[label] = {
            "rollouts": points(lines, f"reward/{name}/mean"),
            "held out, likeliest": points(lines, f"held_out/{name}", start[name]),
        }
    pictures.curve(panels).save(folder / "curve.png")
