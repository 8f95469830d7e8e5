"""What a block-diffusion policy must show before it is trained, on a few of the run's prompts.

Axes: B answers, T tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmgrpo.data import requests
from mmgrpo.types import Finding, Prompt, Trajectory
from pipelines import replays
from pipelines.answers_check import NEAR

if TYPE_CHECKING:
    from pipelines.block_lm import BlockPolicy


def findings(policy: "BlockPolicy", prompts: Sequence[Prompt]) -> list[Finding]:
    """The masks of blocks hold, the cache of a rollout changes nothing, replays are exact and follow the weights."""
    alike = list(prompts[:2])
    batch = requests(alike, range(len(alike)), group_size=2, seed=0, iteration=0)
    part, _ = policy.rollout(batch)
    anchored = policy.anchor(part, [torch.arange(len(part))])
    first = replays.gradient(policy, part)
    return [
        later_blocks(policy, part),
        cached(policy, part),
        replays.exact(policy, anchored),
        replays.reached(first),
        replays.follows_the_weights(policy, anchored, first),
    ]


def limit(policy: "BlockPolicy") -> float:
    """By how many nats two ways to compute a log-prob may differ."""
    return NEAR[policy.blocks.dtype]


@torch.no_grad()
def later_blocks(policy: "BlockPolicy", part: Trajectory) -> Finding:
    """Other tokens in the last block change the log-prob of no token before it: the model keeps to the masks."""
    blocks, size = policy.blocks, policy.blocks.likelihood_size
    lengths = torch.tensor([len(blocks.tokens(prompt)) for prompt in part.batch.prompts])
    steps = torch.arange(part.mask.shape[1])
    block = (lengths.unsqueeze(1) + steps) // size  # (B, S)
    last = (lengths + part.record["length"] - 1) // size
    late = block >= last.unsqueeze(1)
    token = part.record["token"]
    other = torch.where(token == token.max(), token.min(), token.max())
    changed = replace(part, record={**part.record, "token": torch.where(late, other, token)})
    before, after = (blocks.scored(one, "block", size).log_prob.cpu() for one in (part, changed))
    kept = (part.mask & ~late)[:, : before.shape[1]]
    worst = float((after - before)[kept].abs().max()) if kept.any() else 0.0
    said = f"another last block changes the log-probs of the {int(kept.sum())} tokens before by {worst:.1e} nats"
    return Finding(worst <= limit(policy), "blocks", said)


@torch.no_grad()
def cached(policy: "BlockPolicy", part: Trajectory) -> Finding:
    """The log-probs of the rollout, from a cache and step by step, are those of one forward on the filled text."""
    blocks = policy.blocks
    filled = blocks.write(part.batch)
    record = {"token": filled.token, "step": filled.step, "length": filled.length}
    found = blocks.scored(replace(part, record=record), "order", blocks.unmasking.size).log_prob.cpu()
    mask = part.mask[:, : found.shape[1]]
    worst = float((found - filled.log_prob[:, : found.shape[1]])[mask].abs().max())
    said = f"log-probs of a rollout differ from those of the filled text by {worst:.1e} nats at most"
    return Finding(worst <= limit(policy), "cache", said)
