"""How much better each sample was than the others of its prompt.

Pure functions on scores (B,) and group ids (B,), then the components that recipes name: (feedback, *, options) -> Advantage.
One treatment of the exceptions, everywhere:
- NaN is no opinion: the sample enters no statistic, its value is 0 and `keep` is False;
- a group of equal scores, or with a single opinion, has value exactly 0 and is kept;
- an infinite score is a fault of a reward and raises ValueError.
Group ids are any int64 values in any order. Axes: B samples, K rewards.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mmgrpo.comparing import Comparison, Remembering, as_scores, compared, needed, scores_of, teaching
from mmgrpo.groups import group_centred, group_size, group_std
from mmgrpo.types import Advantage, AdvantageFunction, Feedback

Scale = Literal["group", "batch", "none"]
Missing = Literal["skip", "zero"]


def standardize(scores: Tensor, group: Tensor, ddof: int = 1, eps: float = 1e-4, scale: Scale = "group") -> Tensor:
    """(score - mean of its group) / (std + eps); (B,), (B,) int64 -> (B,), NaN where the score is.

    The std is of the group (GRPO, arXiv 2402.03300), of all scores of the batch as they are (Lite PPO, arXiv 2508.08221;
    Flow-GRPO with ddof 0), or not used (Dr. GRPO, arXiv 2503.20783).
    """
    if eps < 0:
        raise ValueError(f"eps is {eps}; expected a number from 0")
    distance = group_centred(scores, group)
    match scale:
        case "none":
            return as_scores(distance, scores)
        case "group":
            std = group_std(scores, group, ddof)
        case "batch":
            std = group_std(scores, torch.zeros_like(group), ddof)
        case _:
            raise ValueError(f"scale is {scale!r}; expected 'group', 'batch' or 'none'")
    return as_scores(distance / torch.where(std > 0, std + eps, 1), scores)


def against_others(scores: Tensor, group: Tensor) -> Tensor:
    """Score minus the mean of the others of its group, 0 where there is no other; (B,), (B,) int64 -> (B,).

    RLOO, arXiv 2402.14740: G / (G - 1) times the distance to the group's mean.
    """
    size = group_size(scores, group)
    return as_scores(group_centred(scores, group) * size / (size - 1).clamp(min=1), scores)


def standardized(
    feedback: Feedback, *, ddof: int = 1, eps: float = 1e-4, scale: Scale = "group", clamp: float | None = None
) -> Advantage:
    """GRPO on the weighted sum of the rewards, as `standardize`; `clamp` bounds the values to [-clamp, clamp]."""
    if clamp is not None and clamp <= 0:
        raise ValueError(f"clamp is {clamp}; expected a positive number")
    scores = scores_of(feedback)
    values = standardize(scores, feedback.group, ddof, eps, scale)
    return compared(values if clamp is None else values.clamp(-clamp, clamp), scores, feedback.group)


GRPO = partial(standardized, eps=1e-6)  # as the methods that build on it are published


def centered(feedback: Feedback) -> Advantage:
    """Dr. GRPO (arXiv 2503.20783): the weighted sum of the rewards minus its mean in the group."""
    return standardized(feedback, scale="none")


def leave_one_out(feedback: Feedback) -> Advantage:
    """RLOO (arXiv 2402.14740) on the weighted sum of the rewards."""
    scores = scores_of(feedback)
    return compared(against_others(scores, feedback.group), scores, feedback.group)


def gdpo(
    feedback: Feedback, *, ddof: int = 1, eps: float = 1e-4, missing: Missing = "skip", batch_scale: bool = True
) -> Advantage:
    """GDPO (arXiv 2601.05242): standardize each reward in the group, add with the weights, divide by the batch's std.

    A single reward falls back to GRPO, as the authors' release does. `missing` says what a NaN of one reward is: "skip"
    leaves it out of that reward's statistics and of the sample's sum, "zero" takes it as a score of 0 (the release). Without
    `batch_scale` this is the aggregation of MixGRPO (arXiv 2507.21802). The paper's subtraction of the batch's mean is not
    written: the mean is 0 by construction, and a group without spread stays exactly 0.
    """
    if missing not in ("skip", "zero"):
        raise ValueError(f"missing is {missing!r}; expected 'skip' or 'zero'")
    scores, group = scores_of(feedback), feedback.group
    trained = [(feedback.rewards[name].double(), weight) for name, weight in feedback.weights.items() if weight != 0]
    if len(trained) == 1:
        return compared(standardize(scores, group, ddof, eps), scores, group)
    if missing == "zero":
        trained = [(values.nan_to_num(0), weight) for values, weight in trained]
    parts = torch.stack([weight * standardize(values, group, ddof, eps) for values, weight in trained])  # (K, B)
    combined = torch.where(scores.isnan(), torch.nan, added_up(parts))
    if batch_scale:
        std = group_std(combined, torch.zeros_like(group), ddof)
        combined = combined / torch.where(std > 0, std + eps, 1)
    return compared(as_scores(combined, scores), scores, group)


def added_up(parts: Tensor) -> Tensor:
    """The sum of what there is, exactly 0 where it cancels up to rounding, which is no preference; (K, ...) -> (...)."""
    combined, size = parts.nansum(0), parts.abs().nansum(0)
    return torch.where(combined.abs() > 1e-12 * size, combined, 0)


def scaled_sum(feedback: Feedback, *, ddof: int = 0, eps: float = 1e-4) -> Advantage:
    """FlowSE-GRPO (arXiv 2601.16483): divide each reward by its std over the batch, add with the weights, standardize in groups.

    Unlike in `gdpo` a reward that hardly varies inside a group weighs little there. Weights 0.6, 1, 1 are published for DNSMOS,
    speaker similarity and SpeechBERTScore. A std up to 1e-6 drops the reward, one up to 1e-8 of the sum the group, as public
    reimplementations do (RECONSTRUCTED from these). The rewards are centred in their group before they are added: nothing changes where all are there, and
    a missing one counts as the mean of its group.
    """
    scores, group = scores_of(feedback), feedback.group
    combined = torch.zeros(len(group), dtype=torch.float64, device=scores.device)
    for name, weight in feedback.weights.items():
        values = feedback.rewards[name].double()
        std = group_std(values, torch.zeros_like(group), ddof)
        share = torch.where(std > 1e-6, weight / std, 0)
        combined = combined + (share * group_centred(values, group)).nan_to_num(0)
    combined = torch.where(scores.isnan(), torch.nan, combined)
    combined = torch.where(group_std(combined, group, ddof) > 1e-8, combined, combined * 0)
    return compared(as_scores(standardize(combined, group, ddof, eps), scores), scores, group)


def process(feedback: Feedback, *, ddof: int = 0, eps: float = 1e-4) -> Advantage:
    """Rewards of the parts of an answer: standardized together over the group, a decision gets the sum of those still to come.

    UnifiedGRPO (arXiv 2603.09538), as DeepSeekMath's process supervision (arXiv 2402.03300, section 4.1.3); that all parts of
    a group form one pool is RECONSTRUCTED. With one part it is `standardized`. Needs a reward that answers with one number
    for each part; values are (B, S). Raises ValueError without one.
    """
    if feedback.step_rewards is None:
        raise ValueError(
            "advantage 'process' needs a reward of parts, (B, J); these all judge whole answers: use 'standardized'"
        )
    scores, rewards = scores_of(feedback), feedback.step_rewards
    group = feedback.group.repeat_interleave(rewards.shape[1])
    parts = standardize(rewards.flatten(), group, ddof, eps).view(rewards.shape).nan_to_num(0)
    left = parts.flip(1).cumsum(1).flip(1)
    whole = compared(standardize(scores, feedback.group, ddof, eps), scores, feedback.group)
    return whole._replace(values=torch.where(whole.keep.unsqueeze(1), left, 0))


def in_branches(*, advantage: AdvantageFunction = standardized) -> Comparison:
    """An advantage that compares the samples of a group that explored at the same decisions with each other alone.

    TempFlow-GRPO (arXiv 2508.04324) and E-GRPO (arXiv 2601.00423), whose groups go through a schedule by several routes
    (mmgrpo/routes.py). Equal rows of the mask are one branch; a sample alone in its own has nothing to be compared with.
    """
    if isinstance(advantage, Remembering):
        raise ValueError("advantage.advantage remembers what it saw, which branches do not keep; expected another one")

    def function(feedback: Feedback) -> Advantage:
        return advantage(replace(feedback, group=branches(feedback)))

    def teaches(feedback: Feedback) -> Tensor:
        return teaching(advantage, replace(feedback, group=branches(feedback)))

    return Comparison(function, needed(advantage), teaches)


def branches(feedback: Feedback) -> Tensor:
    """One id for the samples of a group that have the same decisions trained, (B,) int64."""
    mask = torch.ones(len(feedback.group), 0, dtype=torch.bool) if feedback.mask is None else feedback.mask
    return torch.unique(torch.cat([feedback.group.unsqueeze(1), mask.long()], 1), dim=0, return_inverse=True)[1]
