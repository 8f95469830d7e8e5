"""The block-diffusion demo: a tiny model learns to fill in blocks with fewer forwards, with the trainer of large ones.

Two runs from the same start: LightningRL, which rewards accuracy and speed and imitates correct answers, and GRPO on accuracy alone.
Writes parallelism.png (accuracy against tokens per forward at several thresholds), curve.png, summary.json and the aligned weights
beside the run's own files; those of the second run lie in accuracy_alone/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mmgrpo import journal, seeds
from mmgrpo.data import requests
from mmgrpo.evaluation import means
from mmgrpo.run import Run
from mmgrpo.types import Samples
from pipelines import assets, demos, pictures
from pipelines.block_lm import BlockPolicy
from pipelines.demos import Points, points

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the curve; the recipe's own is among them
SAMPLED = 4  # answers to each held-out prompt
ALONE = (  # the second run: GRPO on accuracy, whose speed is watched
    "rewards.speed.weight=0",
    "advantage={build='mmgrpo.advantages:standardized'}",
    "loss.anchor_weight=0",
)
SHOWN = 4  # prompts whose answers are printed


class Filled(NamedTuple):
    """What a policy's sampled answers to the held-out prompts are worth."""

    accuracy: float  # share of right ones
    speed: float  # mean tokens per forward
    greedy: float  # share of right ones if the likeliest tokens are taken
    greedy_speed: float
    curve: dict[float, tuple[float, float]]  # threshold -> accuracy and tokens per forward, sampled
    texts: tuple[str, ...]  # sampled, SAMPLED for each prompt


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Align for accuracy and speed, and for accuracy alone; measure before and after, and write what a person would look at."""
    torch.set_num_threads(1)
    shipped = assets.folder("block_lm_demo")
    places = {
        "policy.model": shipped,
        "prompts.source": shipped / "train.jsonl",
        "evaluation.source": shipped / "held_out.jsonl",
    }
    found: dict[str, Filled] = {}
    took: dict[str, dict[str, float]] = {}
    for name, own, more in (("after", folder, ()), ("accuracy_alone", folder / "accuracy_alone", ALONE)):
        training = demos.started("demo_block_lm", seed, places, [*overrides, *more])
        if "before" not in found:
            found["before"] = measured(training)
        took[name] = demos.align(training, own)
        with training.averaged():
            found[name] = measured(training)
    draw(folder, found)
    draw_curve(folder)
    demos.conclude(
        folder,
        numbers(found)
        | seconds(took)
        | {"seed": seed, "iterations": training.iteration, "prompts": len(training.held_out)},
        {"accuracy and parallelism": "parallelism.png", "curve": "curve.png"},
    )
    print(told(training, found))


def measured(training: Run) -> Filled:
    """Answer every held-out prompt, with the same random numbers at every call."""
    policy, prompts = training.policy, training.held_out
    assert isinstance(policy, BlockPolicy)
    own, seed = policy.blocks.unmasking, seeds.derive(training.recipe.seed, "sampled evaluation")
    asked = requests(prompts, range(len(prompts)), group_size=SAMPLED, seed=seed, iteration=0)
    once = requests(prompts, range(len(prompts)), group_size=1, seed=seed, iteration=0)
    curve = {}
    for threshold in THRESHOLDS:
        policy.blocks.unmasking = replace(own, threshold=threshold)
        curve[threshold] = worth(training, policy.rollout(once)[1])
    policy.blocks.unmasking = own
    _, sampled = policy.rollout(asked)
    assert sampled.text is not None
    return Filled(*worth(training, sampled), *worth(training, policy.generate(once)), curve, sampled.text)


def worth(training: Run, samples: Samples) -> tuple[float, float]:
    """Share of right answers, and mean tokens per forward."""
    found = means(training.rewards, samples)
    return found["accuracy"], found["speed"]


def numbers(found: Mapping[str, Filled]) -> dict[str, object]:
    """What was measured, by name."""
    plain = {
        f"{name}_{when}": getattr(one, name)
        for when, one in found.items()
        for name in ("accuracy", "speed", "greedy", "greedy_speed")
    }
    return plain | {f"distinct_{when}": len(set(one.texts)) / len(one.texts) for when, one in found.items()}


def seconds(took: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    """How long the two runs took, by name."""
    return {f"{name}_{when}": value for when, times in took.items() for name, value in times.items()}


def draw(folder: Path, found: Mapping[str, Filled]) -> None:
    """Accuracy against tokens per forward, one point for each threshold."""
    named = {"before": "before", "after": "accuracy and speed", "accuracy_alone": "accuracy alone"}
    lines: dict[str, Points] = {}
    for name, said in named.items():
        rights, speeds = zip(*found[name].curve.values(), strict=True)
        lines[said] = list(speeds), list(rights)
    title = f"held-out prompts, sampled, thresholds {THRESHOLDS[0]} to {THRESHOLDS[-1]}"
    panels = {"share of right answers": lines}
    pictures.curve(panels, "tokens per forward", title).save(folder / "parallelism.png")


def draw_curve(folder: Path) -> None:
    """What the rollouts of both runs reached, iterations done from left to right."""
    both = {"accuracy and speed": journal.read(folder), "accuracy alone": journal.read(folder / "accuracy_alone")}
    panels = {
        label: {name: points(lines, f"reward/{reward}/mean") for name, lines in both.items()}
        for label, reward in (("share of right answers", "accuracy"), ("tokens per forward", "speed"))
    }
    pictures.curve(panels, title="rollouts").save(folder / "curve.png")


def told(training: Run, found: Mapping[str, Filled]) -> str:
    """Some answers before and after, and what was learned, in words."""
    old, new, alone = (found[name] for name in ("before", "after", "accuracy_alone"))
    lines = []
    for number in range(min(SHOWN, len(training.held_out))):
        given, start = training.held_out[number].text, number * SAMPLED
        parts = [f"{name} {' '.join(one.texts[start : start + 2])}" for name, one in (("before", old), ("after", new))]
        lines.append(f"{given} {', '.join(parts)}")
    gain = f"{new.speed / old.speed - 1:+.0%}"
    return "\n".join(
        [
            *lines,
            f"Tokens per forward: {old.speed:.2f} before, {new.speed:.2f} after ({gain}); share of right answers: {old.accuracy:.2f} "
            f"before, {new.accuracy:.2f} after.",
            f"Rewarded for accuracy alone: {alone.speed:.2f} tokens per forward, {alone.accuracy:.2f} right.",
        ]
    )
