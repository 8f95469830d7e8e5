"""Recorded texts under today's weights, token by token: what the replays of all language policies share.

Axes: B texts, S tokens at most, b and T those of one batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mmgrpo.types import Chunk, Consumer, Evaluation, Reference, Trajectory
from pipelines.token_probabilities import Scores


class Reads(Protocol):
    """A model that reads what was written, in batches of bounded size."""

    def batches(self, trajectory: Trajectory) -> list[Tensor]:
        """Rows that are read together; (b,) int64 each."""
        ...

    def read(self, part: Trajectory) -> Scores:
        """Log-prob and entropy of every token under today's weights; (b, T) each, 0 behind the texts' ends."""
        ...


@torch.no_grad()
def anchored(texts: Reads, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
    """The trajectory with the tokens' log-probs under today's weights, in the batches of the coming replays."""
    anchor = torch.full(trajectory.mask.shape, torch.nan)
    for part in parts:
        taken = trajectory.take(part)
        for rows in texts.batches(taken):
            found = texts.read(taken.take(rows)).log_prob.cpu()
            anchor = anchor.to(torch.promote_types(anchor.dtype, found.dtype))
            anchor[part[rows].unsqueeze(1), torch.arange(found.shape[1])] = found
    return replace(trajectory, record={**trajectory.record, "anchor": anchor})


def replay(texts: Reads, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
    """Evaluate texts within the budget of tokens at a time, with gradient; `consume` may run backward.

    Without an anchor today's weights are those that sampled: a log-ratio compares each log-prob with its own value.
    """
    for rows in texts.batches(trajectory):
        part = trajectory.take(rows)
        held = None
        if reference is not None:
            with torch.no_grad(), reference.applied():
                held = texts.read(part).log_prob
        consume(Chunk(rows, *evaluated(texts, part, held)))


def evaluated(texts: Reads, part: Trajectory, held: Tensor | None) -> tuple[Tensor, Evaluation]:
    """The columns of a batch's texts, (T,), and what they are under today's weights, (b, T); `held`: the reference's."""
    found = texts.read(part)
    steps = torch.arange(found.log_prob.shape[1])

    def recorded(name: str) -> Tensor:
        return part.record[name][:, steps].to(found.log_prob)

    old, gap = found.log_prob.detach(), None
    if "anchor" in part.record:
        old = torch.where(recorded("anchor").isnan(), old, recorded("anchor"))  # NaN: read before any update
    if "log_prob" in part.record:  # the sampler's, of the same distribution
        there = steps < part.record["length"].unsqueeze(1)
        gap = torch.where(there.to(old.device), old - recorded("log_prob"), 0)
    to_reference = None if held is None else found.log_prob - held
    return steps, Evaluation(
        found.log_prob - old,
        log_prob=found.log_prob,
        to_reference=to_reference,
        sampler_gap=gap,
        entropy=found.entropy,
    )
