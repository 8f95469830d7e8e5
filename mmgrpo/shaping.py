"""Advantages that look at the policy's own probabilities, or at what the data say of a prompt.

Axes: B samples, S decisions.
"""

import torch
from torch import Tensor

from mmgrpo.advantages import GRPO, standardize
from mmgrpo.comparing import Comparison, Memory, Remembering, as_scores, column_of, compared, fact_of, scores_of
from mmgrpo.groups import group_centred, within
from mmgrpo.types import Advantage, AdvantageFunction, Feedback, same_shape

# ---- likely samples earn less


def shrunk_by_likelihood(scores: Tensor, log_prob: Tensor, group: Tensor, share: float) -> Tensor:
    """score * (1 - share * rank / G), rank 0 the least likely of its group; (B,), (B,), (B,) -> (B,)."""
    same_shape(scores=scores, log_prob=log_prob, group=group)
    if (scores < 0).any():
        raise ValueError(
            f"a score is {float(scores.nan_to_num().min()):g}; expected none below 0, which shrinking would reward"
        )
    asked = torch.where(scores.isnan(), torch.nan, log_prob.double())
    ranks = within(asked, group, lambda heard: heard.argsort(stable=True).argsort().double() / len(heard))
    return scores.double() * (1 - share * ranks)


def unlikeliness(*, share: float = 0.25, ddof: int = 1, eps: float = 1e-6) -> Comparison:
    """Rewarding the Unlikely (arXiv 2506.02355, number not confirmed): likely samples keep less of their reward; then GRPO.

    Likelihood is the mean log-prob of a sample's decisions under the weights that sampled. Rewards must not be negative. Groups
    teach if their own rewards differ. The authors also pass twice over each rollout (train.passes = 2).
    """

    def function(feedback: Feedback) -> Advantage:
        scores, group = scores_of(feedback), feedback.group
        likely = mean_of(*fact_of(feedback, "log_prob"))
        shrunk = shrunk_by_likelihood(scores, likely, group, share)
        return compared(as_scores(standardize(shrunk, group, ddof, eps), scores), scores, group)

    return Comparison(function, needs=("log_prob",))


def mean_of(mask: Tensor, values: Tensor) -> Tensor:
    """The mean over a sample's trained decisions, 0 where there is none; (B, S), (B, S) -> (B,)."""
    return torch.where(mask, values.double(), 0).sum(1) / mask.sum(1).clamp(min=1)


# ---- entropy held at a target


def steering_share(distance: float, right_share: float, most: float = 0.1) -> float:
    """alpha = a / (1 + a), a = min(|target - entropy|, most) / share of right samples; 0 where none is right."""
    pull = min(abs(distance), most) / right_share if right_share else 0.0
    return pull / (1 + pull)


def distribution_centric(
    *, target: float = 0.25, hot: float = 1.2, cold: float = 0.8, right: float = 0.05, most: float = 0.1
) -> Remembering:
    """DCPO, Distribution-Centric (official code 597358816/DCPO): steers the policy's entropy to `target`, nats per token.

    (1 - alpha) A + alpha w of right samples (reward above `right`), w the probability of a token at another temperature over
    its own: `hot` while the entropy of the rollout before was at most the target, `cold` above it. A is GRPO's. Token policies
    alone know their probabilities at another temperature. The script's target is 0.5, 0.25 was best.
    """
    names = {temperature: f"log_prob at {temperature:g}" for temperature in (1.0, hot, cold)}

    def function(feedback: Feedback, memory: Memory) -> tuple[Advantage, Memory]:
        entropy = float(memory.get("entropy", torch.zeros(())))
        found, scores = GRPO(feedback), scores_of(feedback)
        good = scores > right
        alpha = steering_share(target - entropy, float(good[~scores.isnan()].double().mean()), most)
        chosen = names[hot if entropy <= target else cold]
        weight = (feedback.facts[chosen] - feedback.facts[names[1.0]]).exp()  # (B, S)
        values = (1 - alpha) * found.values.unsqueeze(1) + alpha * good.unsqueeze(1) * weight
        values = torch.where(found.keep.unsqueeze(1), values, 0)
        mask, nats = fact_of(feedback, "entropy")
        now = torch.where(mask, nats.double(), 0).sum() / mask.sum().clamp(min=1)
        metrics = {**found.metrics, "steering_share": alpha, "entropy": float(now)}
        return Advantage(values.to(found.values), found.keep, metrics), {"entropy": now}

    def spread_or_right(feedback: Feedback) -> Tensor:
        return group_centred(feedback.total(), feedback.group).nan_to_num().ne(0) | (feedback.total() > right)

    return Remembering(function, {}, needs=("entropy", *names.values()), teaches=spread_or_right)


# ---- hard prompts weigh more


def clause_hardness(similarity: Tensor, both: bool = False) -> float:
    """1 - the mean over clauses of the output (rows) of their best similarity to a clause of the demonstration (columns).

    `both` averages both directions (ours). No clause at all is hardness 1. (M, N) cosines -> a number.
    """
    if similarity.numel() == 0:
        return 1.0
    rows = similarity.amax(1).mean()
    return float(1 - (rows + similarity.amax(0).mean()) / 2) if both else float(1 - rows)


def difficulty_scaled(
    *,
    hardness: str = "hardness",
    category: str = "category",
    demonstration: str | None = None,
    outliers: float = 0.1,
    bounds: tuple[float, float] = (0.5, 2.0),
    advantage: AdvantageFunction = GRPO,
) -> Remembering:
    """GRPO-S of DR-IRL (arXiv 2503.18991): an advantage times sigm(hardness) / sigm(its mean), and the same of the reward's gap.

    `hardness` and `category` are columns of the data (`clause_hardness` gives the first). With `demonstration`, a column with
    the reward of a demonstration, the gap to the group's mean counts too: its mean over the batch, without the share
    `outliers` farthest from it, against its running mean. Means are per category, over the run. PARTIAL: from a reading note;
    the rule for outliers and the reference of the gap are RECONSTRUCTED, the bounds ours.
    """

    def function(feedback: Feedback, memory: Memory) -> tuple[Advantage, Memory]:
        found, kinds = advantage(feedback), [str(prompt.columns.get(category)) for prompt in feedback.prompts]
        delta, now = column_of(feedback, hardness), dict(memory)
        factor = torch.ones(len(kinds), dtype=torch.float64)
        gap = None
        if demonstration is not None:
            scores = scores_of(feedback).double()
            gap = column_of(feedback, demonstration) - (scores - group_centred(scores, feedback.group))
        for kind in sorted(set(kinds)):
            rows = torch.tensor([one == kind for one in kinds])
            factor[rows] = delta[rows].sigmoid() / running(now, f"hardness {kind}", delta[rows]).sigmoid()
            if gap is not None:
                kept = without_outliers(gap[rows & ~gap.isnan()], outliers)
                if len(kept):
                    factor[rows] *= kept.mean().sigmoid() / running(now, f"gap {kind}", kept).sigmoid()
        factor = factor.clamp(*bounds)
        scaled = found.values * (factor if found.values.dim() == 1 else factor.unsqueeze(1)).to(found.values)
        return found._replace(values=scaled, metrics={**found.metrics, "difficulty": float(factor.mean())}), now

    return Remembering(function, {})


def running(memory: dict[str, Tensor], name: str, values: Tensor) -> Tensor:
    """The mean of all values seen under a name, these included; kept in `memory` as (sum, count)."""
    before = memory.get(name, torch.zeros(2, dtype=torch.float64))
    memory[name] = before + torch.stack([values.sum(), torch.tensor(float(len(values)), dtype=torch.float64)])
    return memory[name][0] / memory[name][1]


def without_outliers(values: Tensor, share: float) -> Tensor:
    """Without the given share of values, rounded down, that are farthest from the mean; (n,) -> (m,)."""
    kept = len(values) - int(share * len(values))
    return values[(values - values.mean()).abs().argsort(stable=True)[:kept].sort().values]
