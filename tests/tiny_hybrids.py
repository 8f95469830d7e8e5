"""A tiny random hybrid model that writes and draws, as a policy."""

import math
from functools import partial
from pathlib import Path

import torch

from mmgrpo.schedules import all_but_last
from mmgrpo.types import Batch
from pipelines import replays, tiny_interleaved
from pipelines.interleaved_hybrid import HybridPolicy, load

EVERY = partial(all_but_last)


def written(place: Path) -> Path:
    """The folder, in which a tokenizer and a model now lie."""
    tiny_interleaved.tokenizer().save_pretrained(place / "tokenizer")
    policy = made(place)
    eager_to_draw(policy)
    policy.save(place / "model")
    return place


def made(folder: Path, **options) -> HybridPolicy:
    torch.manual_seed(0)
    given = {"images": 2, "text": 3, "steps": 3, "plan": EVERY, "rollout_rows": 3, "replay_rows": 2, "device": "cpu"}
    small = tiny_interleaved.config(width=32, layers=2, heads=2, inside=48)
    return load(new=small, tokenizer=str(folder / "tokenizer"), **{**given, **options})


def opened(folder: Path, **options) -> HybridPolicy:
    given = {"images": 2, "text": 3, "steps": 3, "plan": EVERY, "rollout_rows": 3, "replay_rows": 2, "device": "cpu"}
    return load(model=str(folder / "model"), **{**given, **options})


def eager_to_draw(policy: HybridPolicy) -> None:
    """Random weights everywhere, and marks of images likelier than words, so that answers differ in form and hold images."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in (policy.model.flow_head, policy.model.modulation):
            layer.weight += 0.3 * torch.randn(layer.weight.shape, generator=generator)
        policy.model.trunk.model.embed_tokens.weight += 0.2  # a direction that all states share
        policy.model.places += 0.2
        width = policy.model.places.shape[1]
        for mark, likelier in ((policy.marks.start, 4.5), (policy.marks.stop[0], 3.0)):
            policy.model.trunk.lm_head.weight[mark] += likelier / width


def slopes(policy: HybridPolicy, batch: Batch) -> tuple[float, float]:
    """The squared norm of the gradient of a rollout's log-ratios in float64, and the same by finite differences."""
    policy.model.double()
    trajectory, _ = policy.rollout(batch)
    anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
    slope = replays.gradient(policy, trajectory)
    size = float(replays.norm(slope).square())
    by = 3e-5 / math.sqrt(size)  # norms inside the trunk compute in float32
    above, below = (replays.difference(policy, anchored, slope, sign * by) for sign in (1, -1))
    return size, float((above - below) / (2 * by))
