"""Score a policy on held-out prompts, always with the same noise, so that curves are paired."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmgrpo import checkpoint, moved, seeds
from mmgrpo.data import requests
from mmgrpo.recipe import Recipe
from mmgrpo.run import Run, load_weights, start
from mmgrpo.scoring import score
from mmgrpo.teaching import Examinable, losses
from mmgrpo.types import Batch, Policy, Prompt, Reward, Samples

REPORT = "held_out.txt"


def held_out_samples(policy: Policy, prompts: Sequence[Prompt], count: int, seed: int) -> Samples:
    """`count` samples of every prompt without exploration, from noise that depends on the run's seed alone."""
    return policy.generate(held_out_batch(prompts, count, seed))


def held_out_batch(prompts: Sequence[Prompt], count: int, seed: int) -> Batch:
    """The requests of an evaluation, the same each time."""
    return requests(prompts, range(len(prompts)), group_size=count, seed=seeds.derive(seed, "evaluation"), iteration=0)


def means(rewards: Mapping[str, Reward], samples: Samples) -> dict[str, float]:
    """The mean of every reward over the samples that it has an opinion of."""
    feedback = score(rewards, dict.fromkeys(rewards, 1.0), samples)
    return {name: float(values.nanmean()) for name, values in feedback.rewards.items()}


def held_out(run: Run) -> dict[str, Tensor]:
    """The rewards of each of the run's held-out prompts, under its averaged weights if it has any; name -> (P,).

    In the stage "pretrain" the mean supervised loss as well, as "loss", and what the policy itself examines. Each prompt's samples are averaged.
    """
    options, found = run.recipe.evaluation, {}
    batch = held_out_batch(run.held_out, options.samples, run.recipe.seed)
    with run.averaged():
        if run.recipe.train.stage == "pretrain":
            found["loss"] = losses(run.policy, batch)
            found |= run.policy.examined(batch) if isinstance(run.policy, Examinable) else {}
        if run.rewards | run.watched:
            judged = score(run.rewards | run.watched, run.weights, run.policy.generate(batch))
            found |= judged.rewards
    return {name: values.view(len(run.held_out), options.samples).nanmean(1) for name, values in found.items()}


def remember(run: Run, folder: Path) -> None:
    """Write the held-out scores of the start, which those of `look` are compared with."""
    moved.keep(folder, held_out(run))


def look(run: Run, folder: Path) -> dict[str, float]:
    """The held-out scores and how far they moved since the start; -> metrics, and held_out.txt for people."""
    scores = held_out(run)
    moved.keep(folder, scores, moved.NOW)
    taught = {"loss": 1.0} if run.recipe.train.stage == "pretrain" else {}
    found = moved.compared(moved.kept(folder), scores, run.weights | taught)
    (folder / REPORT).write_text("".join(f"{one.said()}\n" for one in found), encoding="utf-8")
    errors = {f"held_out/{one.name}/standard_errors": one.errors for one in found}
    return {f"held_out/{name}": float(values.nanmean()) for name, values in scores.items()} | errors


def report(folder: Path) -> None:
    """Say at the end what the held-out scores did."""
    if (folder / REPORT).exists():
        print((folder / REPORT).read_text(encoding="utf-8"), end="")


@torch.no_grad()
def evaluate(recipe: Recipe, path: Path | None, folder: Path) -> dict[str, float]:
    """Mean rewards of a recipe's policy on its [evaluation] prompts, with a checkpoint's weights if one is named.

    Writes them to scores.json in the folder. Raises ValueError if the recipe has no evaluation prompts.
    """
    run = start(recipe)
    if not run.held_out:
        raise ValueError("evaluation.source is not set; expected a file of held-out prompts")
    if path is not None:
        tensors, _ = checkpoint.read(newest(path))
        load_weights(run.policy, tensors.get("average", tensors["policy"]))
    samples = held_out_samples(run.policy, run.held_out, recipe.evaluation.samples, recipe.seed)
    scores = means(run.rewards | run.watched, samples)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores


def newest(path: Path) -> Path:
    """A checkpoint itself, or the newest complete one of a run's folder; raises FileNotFoundError."""
    found = path if path.parent.name == "checkpoints" else checkpoint.latest(path)
    if found is None:
        raise FileNotFoundError(f"{path} holds no complete checkpoint")
    return found
