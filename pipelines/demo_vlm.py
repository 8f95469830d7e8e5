"""The vision-language demo: a tiny model learns on a CPU to answer questions about drawn pictures, with the trainer of large ones.

Writes answers.png, curve.png, summary.json and the aligned weights beside the run's own files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from mmgrpo import journal, seeds
from mmgrpo.data import requests
from mmgrpo.evaluation import held_out_samples
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.types import Samples
from pipelines import assets, demos, pictures, tiny_vlm
from pipelines.demos import points

QUESTIONS = {"train": 2048, "held_out": 512}
DRAWN_WITH = 1  # the seed of the pictures; settings were chosen on the held-out pictures of seed 0
SAMPLED = 8  # answers to each held-out question
SHOWN = 24  # questions in the picture


class Answered(NamedTuple):
    """What the model says to the held-out questions, and whether it is right."""

    greedy: Samples  # the likeliest answer to each
    right: Tensor  # (questions,) of the greedy answers, 0 or 1
    sampled: Tensor  # (questions,) share of right ones among the sampled answers

    def accuracies(self) -> dict[str, float]:
        """Of greedy and of sampled answers, over all questions and for each kind of question."""
        kinds = [str(prompt.columns["kind"]) for prompt in self.greedy.prompts]
        parts = {"": torch.ones(len(kinds), dtype=torch.bool)}
        parts |= {f"_{kind}": torch.tensor([own == kind for own in kinds]) for kind in dict.fromkeys(kinds)}
        both = {"greedy": self.right, "sampled": self.sampled}
        return {
            f"{way}{kind}": float(value[rows].mean()) for way, value in both.items() for kind, rows in parts.items()
        }


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Draw pictures, align, ask the held-out questions before and after, and write what a person would look at."""
    torch.set_num_threads(1)  # for so small a model a second one costs more than it brings, much more on a busy machine
    drawn = {
        name: tiny_vlm.write_prompts(folder / "pictures", name, count, DRAWN_WITH) for name, count in QUESTIONS.items()
    }
    places = {
        "policy.model": assets.folder("vlm_demo"),
        "prompts.source": drawn["train"],
        "evaluation.source": drawn["held_out"],
    }
    training = demos.started("demo_vlm", seed, places, overrides)
    before = answered(training)
    took = demos.align(training, folder)
    with training.averaged():
        after = answered(training)
    draw(folder, before, after)
    draw_curve(folder, before)
    old, new = before.accuracies(), after.accuracies()
    summary: dict[str, object] = {
        f"{name}_{when}": values[name] for name in old for when, values in (("before", old), ("after", new))
    }
    further = {"seed": seed, "iterations": training.iteration, "held_out_questions": len(after.right)}
    demos.conclude(folder, summary | took | further, {"answers": "answers.png", "curve": "curve.png"})
    print(told(old, new))


def answered(training: Run) -> Answered:
    """Ask every held-out question, once greedily and several times with the same random numbers at every call."""
    greedy = held_out_samples(training.policy, training.held_out, 1, training.recipe.seed)
    seed = seeds.derive(training.recipe.seed, "sampled evaluation")
    asked = requests(training.held_out, range(len(training.held_out)), group_size=SAMPLED, seed=seed, iteration=0)
    _, sampled = training.policy.rollout(asked)
    return Answered(greedy, right(training, greedy), right(training, sampled).view(-1, SAMPLED).mean(1))


def right(training: Run, samples: Samples) -> Tensor:
    """1 where the answer is the expected one; (B,)."""
    return score({"exact": training.rewards["exact"]}, {"exact": 1.0}, samples).rewards["exact"]


def told(old: Mapping[str, float], new: Mapping[str, float]) -> str:
    """What was learned, in words."""
    lines = []
    for way, shown in (("greedy", "the likeliest answer is taken"), ("sampled", "answers are sampled")):
        lines.append(f"Share of right answers when {shown}: {old[way]:.2f} before, {new[way]:.2f} after.")
    return "\n".join(
        [
            *lines,
            "A rise of the first is new skill. Most of the second's is the model becoming sure of what it knew: its start was",
            "made unsure on purpose, so that answers to a question differ and there is something to compare.",
        ]
    )


def draw(folder: Path, before: Answered, after: Answered) -> None:
    """Some questions whose answer changed, then others, with the answers before and after."""
    assert before.greedy.text is not None and after.greedy.text is not None
    texts = list(zip(before.greedy.text, after.greedy.text, strict=True))
    order = sorted(
        range(len(texts)), key=lambda row: texts[row][0] == texts[row][1]
    )  # stable: those that changed first
    rows = [*order[: SHOWN // 2], *[row for row in order[SHOWN // 2 :] if texts[row][0] == texts[row][1]]][:SHOWN]
    tiles = []
    for row in rows:
        prompt = after.greedy.prompts[row]
        lines: list[pictures.Line] = [(prompt.text, None)]
        for name, one in (("before", before), ("after", after)):
            assert one.greedy.text is not None
            lines.append((f"{name}: {one.greedy.text[row]}", bool(one.right[row])))
        with Image.open(prompt.media["image"][0]) as image:
            tiles.append((to_tensor(image.convert("RGB")), lines))
    pictures.sheet(tiles, columns=6, scale=12).save(folder / "answers.png")


def draw_curve(folder: Path, before: Answered) -> None:
    """Right answers against iterations done; the start is the score before."""
    lines, start = journal.read(folder), before.accuracies()
    panel = {
        "rollouts, sampled": points(lines, "reward/exact/mean"),
        "held out, greedy": points(lines, "held_out/exact", start["greedy"]),
    }
    pictures.curve({"share of right answers": panel}).save(folder / "curve.png")
