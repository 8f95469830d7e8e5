"""Rewards of what a policy predicts behind each of its decisions, for advantages that need rewards of single steps.

They cost a decoding and a call of every reward for each step of each sample. Axes: B samples, S decisions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmgrpo.comparing import needed
from mmgrpo.credit import PREDICTED
from mmgrpo.scoring import score
from mmgrpo.types import AdvantageFunction, Feedback, Policy, Previewing, Reward, Samples, Trajectory


def expect(compare: AdvantageFunction, policy: Policy) -> None:
    """Tell a policy before it is prepared that its predictions will be judged; raises ValueError if it has none to show."""
    if PREDICTED in needed(compare):
        showing(policy).keep_predictions()


def showing(policy: Policy) -> Previewing:
    """The policy, which must be one that shows its predictions; raises ValueError."""
    if not isinstance(policy, Previewing):
        raise ValueError(
            f"the advantage needs {PREDICTED!r}, and a {type(policy).__name__} predicts no clean samples; "
            "expected one that does, such as pipelines.diffusion:load, or another advantage"
        )
    return policy


def previewed(
    compare: AdvantageFunction,
    policy: Policy,
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    trajectory: Trajectory,
    feedback: Feedback,
) -> Trajectory:
    """The trajectory with the fact "predicted_rewards" in its record if the advantage needs it.

    Rewards of weight 0 are not asked: they are no part of a total.
    """
    if PREDICTED not in needed(compare):
        return trajectory
    trained = {name: reward for name, reward in rewards.items() if weights[name]}
    found = predicted_rewards(
        showing(policy), trajectory, feedback.total(), lambda shown: score(trained, weights, shown).total()
    )
    return replace(trajectory, record={**trajectory.record, PREDICTED: found})


def predicted_rewards(
    policy: Previewing, trajectory: Trajectory, total: Tensor, judge: Callable[[Samples], Tensor]
) -> Tensor:
    """The total reward of what was predicted behind each decision, NaN where nothing was or no reward has an opinion; (B, S).

    The decision behind a sample's last preview is its last one: what follows is the sample, with its own `total`, (B,).
    """
    found = torch.full(trajectory.mask.shape, torch.nan)
    last = torch.zeros(len(trajectory), dtype=torch.int64)
    for step, rows, samples in policy.previews(trajectory):
        found[rows, step] = judge(samples)
        last[rows] = step + 1
    found[torch.arange(len(found)), last] = total
    return found
