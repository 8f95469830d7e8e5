"""Groups that are kept to stand in, in a later iteration, for groups without signal: a replay buffer of whole groups.

Experimental in TRL (GRPO with a replay buffer): groups that differ inside are kept by their score, and take the place of groups
of the current rollout that do not. Their old log-probs are those of the weights that sampled. RECONSTRUCTED: the highest score
is recalled first, the newer one of equals, and each group once; their advantages are computed again from their rewards, beside
the groups of today, which changes them only where an advantage looks at the whole batch.
Left out: a pipeline that draws from torch's global generator while it denoises draws today's numbers for recalled rows too.
Axes: B samples, S decisions, G samples of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmgrpo import packing
from mmgrpo.groups import group_std, group_sum
from mmgrpo.types import Batch, Feedback, Policy, Prompt, Trajectory


@dataclass(frozen=True, eq=False)
class Kept:
    """A group as it was sampled and judged, in main memory."""

    score: float  # above 0; 0 in the stage "offline", which keeps every group
    iteration: int  # that sampled it
    trajectory: Trajectory  # G rows, with what a replay compares them with
    feedback: Feedback  # G rows


def scores(values: Tensor, feedback: Feedback) -> Tensor:
    """sum_i |A_i| * the standard deviation of the group's total rewards, at each of its samples; (B,) or (B, S) -> (B,) float64.

    Of an advantage of decisions the mean over the trained ones counts.
    """
    size = values.double().abs()
    if size.dim() == 2:
        there = torch.ones_like(size) if feedback.mask is None else feedback.mask.to(size)
        size = (size * there).sum(1) / there.sum(1).clamp(min=1)
    return group_sum(size, feedback.group) * group_std(feedback.total(), feedback.group)


def best(kept: Sequence[Kept], count: int) -> list[Kept]:
    """At most `count` groups, the highest score first, the newer one of equals."""
    return sorted(kept, key=lambda group: (-group.score, -group.iteration))[:count]


def young(kept: Sequence[Kept], iteration: int, age: int) -> list[Kept]:
    """Those sampled at most `age` iterations before the given one."""
    return [group for group in kept if iteration - group.iteration <= age]


def fits(group: Kept, trajectory: Trajectory) -> bool:
    """Whether a group can be replayed beside a rollout: what the rollout recorded is there, of the same shape.

    A group of another plan of trained steps, or of recordings of another length, does not.
    """
    past = group.trajectory.record
    return group.trajectory.mask.shape[1] == trajectory.mask.shape[1] and all(
        name in past and past[name].shape[1:] == value.shape[1:] for name, value in trajectory.record.items()
    )


def places(group: Tensor, replaced: Tensor) -> Tensor:
    """The order in which the rows that stay, and behind them those of other groups, take the places of before.

    group (B,) int64 and replaced (B,) bool, true for all rows of some groups, which are of the size of the others -> (B,) int64.
    """
    slot = torch.unique(group, return_inverse=True)[1]
    return torch.cat([slot[~replaced], slot[replaced].sort().values]).argsort(stable=True)


def anchored(policy: Policy, trajectory: Trajectory, parts: Sequence[Tensor], past: Tensor) -> Trajectory:
    """`policy.anchor`, except that recalled rows, (B,) bool, are compared with what was stored."""
    rows = past.nonzero().flatten()
    stored = {name: value[rows] for name, value in trajectory.record.items()} if len(rows) else {}
    found = policy.anchor(trajectory, parts)
    if found is trajectory or not stored:
        return found
    record = dict(found.record)
    for name, value in stored.items():
        if not torch.equal(record[name][rows], value):
            record[name] = record[name].index_copy(0, rows, value)
    return replace(found, record=record)


def in_memory(trajectory: Trajectory) -> Trajectory:
    """A copy that shares no memory with the rollout it comes from."""
    batch = replace(trajectory.batch, group=trajectory.batch.group.clone(), sample=trajectory.batch.sample.clone())
    record = {name: value.detach().to("cpu", copy=True) for name, value in trajectory.record.items()}
    return Trajectory(batch, trajectory.mask.clone(), trajectory.kind.clone(), record)


# in a checkpoint


def packed(kept: Sequence[Kept]) -> packing.Packed:
    """Everything but the prompts, of which the ids are stored."""
    return packing.pack([_plain(group) for group in kept])


def _plain(group: Kept) -> dict[str, object]:
    trajectory, feedback = group.trajectory, group.feedback
    batch = trajectory.batch
    return {
        "score": group.score,
        "iteration": group.iteration,
        "prompts": [prompt.id for prompt in batch.prompts],
        "batch": {"group": batch.group, "sample": batch.sample, "seed": batch.seed, "iteration": batch.iteration},
        "trajectory": {"mask": trajectory.mask, "kind": trajectory.kind, "record": dict(trajectory.record)},
        "feedback": {
            "rewards": dict(feedback.rewards),
            "weights": dict(feedback.weights),
            "step_rewards": feedback.step_rewards,
            "facts": dict(feedback.facts),
        },
    }


def unpacked(state: packing.Packed, prompts: Sequence[Prompt]) -> list[Kept]:
    """The groups that `packed` took apart, their prompts found by id among those of the run."""
    known = {prompt.id: prompt for prompt in prompts}
    plain = packing.unpack(state)
    assert isinstance(plain, list)
    return [_group(item, known) for item in plain]


def _group(plain: Mapping[str, Any], known: Mapping[int, Prompt]) -> Kept:
    lost = [number for number in plain["prompts"] if number not in known]
    if lost:
        raise ValueError(f"the checkpoint keeps a group of prompt {lost[0]}, which the data no longer holds")
    batch = Batch(tuple(known[number] for number in plain["prompts"]), **plain["batch"])
    trajectory = Trajectory(batch, **plain["trajectory"])
    feedback = Feedback(group=batch.group, prompts=batch.prompts, mask=trajectory.mask, **plain["feedback"])
    return Kept(plain["score"], plain["iteration"], trajectory, feedback)
