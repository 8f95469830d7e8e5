"""Credit inside a sample: decisions taken in the same state are compared with each other, shared ones are neutral.

Facts that are asked for: "state", (B, S) int64, what a decision was taken in; "edge", (B, S) int64, state, decision and what
followed; equal keys in one group are the same; "predicted_rewards", (B, S), of the data predicted behind each step. Untrained decisions have value 0 and enter no statistic.
Axes: B samples, S decisions, G samples of a group, V tokens, D features, E edges of a graph.
"""

from typing import Literal

import torch
from torch import Tensor

from mmgrpo.advantages import GRPO, standardize
from mmgrpo.comparing import Comparison, as_scores, compared, fact_of, scores_of
from mmgrpo.groups import group_centred, group_std
from mmgrpo.types import Advantage, AdvantageFunction, Feedback, same_shape

Mode = Literal["mean", "mean_std"]
EPS = 1e-6
PREDICTED = "predicted_rewards"


def joint(group: Tensor, key: Tensor) -> Tensor:
    """One int64 id for each pair of a sample's group and a decision's key; (B,), (B, S) -> (B, S)."""
    pairs = torch.stack([group.unsqueeze(1).expand_as(key), key], -1).flatten(0, 1)
    return torch.unique(pairs, dim=0, return_inverse=True)[1].view(key.shape)


def compared_inside(values: Tensor, ids: Tensor, mask: Tensor, mode: Mode) -> Tensor:
    """Value minus the mean of the trained decisions of its id, over their std (ddof 1) + 1e-6 if asked; (B, S) -> (B, S)."""
    same_shape(values=values, ids=ids, mask=mask)
    heard = torch.where(mask, values.double(), torch.nan).flatten()
    centred = group_centred(heard, ids.flatten())
    if mode == "mean_std":
        std = group_std(heard, ids.flatten())
        centred = torch.where(std > 0, centred / (std + EPS), 0)
    return centred.nan_to_num(0).view(values.shape)


# ---- recurring states


def returns(rewards: Tensor, discount: float) -> Tensor:
    """The discounted sum of what is still to come, this decision's included; (B, S) -> (B, S)."""
    left, found = torch.zeros(len(rewards), dtype=torch.float64), []
    for step in rewards.double().flip(1).unbind(1):
        left = step + discount * left
        found.append(left)
    return torch.stack(found[::-1], 1) if found else rewards.double()


def anchored_states(
    *, weight: float = 1.0, discount: float = 0.95, mode: Mode = "mean", cross_steps: bool = False
) -> Comparison:
    """GiGPO (arXiv 2505.10978): the sample's advantage + weight * that of its decision among those of the same state.

    Rewards of parts stand at their decisions, else the total at the last one. `cross_steps` counts a sample in the first term
    once for each of its decisions, as the released code does by default. A state seen once adds 0.
    """

    def function(feedback: Feedback) -> Advantage:
        scores, (mask, state) = scores_of(feedback), fact_of(feedback, "state")
        group = feedback.group.unsqueeze(1).expand_as(state)
        whole = scores.unsqueeze(1).expand_as(mask)
        if cross_steps:
            episode = compared_inside(whole, group, mask & ~whole.isnan(), mode)
        else:
            episode = compared_inside(whole[:, :1], group[:, :1], ~whole[:, :1].isnan(), mode).expand_as(mask)
        come = returns(rewards_of_steps(feedback, mask), discount)
        inside = compared_inside(come, joint(feedback.group, state), mask & ~whole.isnan(), mode)
        return concluded(feedback, torch.where(mask, episode + weight * inside, 0))

    return Comparison(function, needs=("state",))


def rewards_of_steps(feedback: Feedback, mask: Tensor) -> Tensor:
    """The reward at each decision: those of parts, or the total at the last trained decision; (B, S), finite."""
    if feedback.step_rewards is not None:
        return feedback.step_rewards.nan_to_num(0)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last, scores_of(feedback).nan_to_num(0).unsqueeze(1), 0)


# ---- values of steps


def anchored_values(
    *,
    discount: float = 0.9,
    absolute: float = 0.1,
    early: float = 0.5,
    weighed: bool = True,
    eps: float = 0.0,
    predicted: bool = False,
) -> Comparison:
    """VGPO (arXiv 2512.12387): the discounted reward to come, against the same step of the group and against 0; values (B, S).

    Q is the sum of discounted step rewards; a step has omega * ((Q - mean) / (std + eps) + absolute * Q), mean and std (ddof 0) of
    its group at that step, omega = Q over its mean in the sample, 1 unless `weighed`. The term in `absolute` is that of the
    first int(early * S) steps, and teaches groups without spread too, poor ones included. RECONSTRUCTED from reviews: discount,
    absolute, the std's ddof, and that omega multiplies both terms. Rewards are to be from 0 if `weighed`. A step without a reward
    adds 0 to Q, enters no statistic and has value 0. `predicted`: the rewards are the fact "predicted_rewards", the total
    reward of the clean sample that the policy predicts in one step behind each step, NaN where it asked none.
    """
    if not 0 <= early <= 1:
        raise ValueError(f"early is {early}; expected a share of the steps in [0, 1]")

    def function(feedback: Feedback) -> Advantage:
        scores = scores_of(feedback)
        rewards = fact_of(feedback, PREDICTED)[1] if predicted else feedback.step_rewards
        if rewards is None:
            raise ValueError("the advantage needs a reward of every step, (B, S); these all judge whole samples")
        if weighed and (rewards < 0).any():
            least = float(rewards.nan_to_num(0).min())
            raise ValueError(f"a step's reward is {least}; expected rewards from 0, or weighed = false")
        come = torch.where(rewards.isnan(), torch.nan, returns(rewards.nan_to_num(0), discount))
        steps = torch.arange(come.shape[1]).expand_as(come)
        against = standardize(come.flatten(), joint(feedback.group, steps).flatten(), 0, eps).view(come.shape)
        values = against + torch.where(steps < int(early * come.shape[1]), absolute * come, 0)
        values = (values * over_own_mean(come) if weighed else values).nan_to_num(0)
        whole = compared(scores, scores, feedback.group)
        return whole._replace(values=as_scores(torch.where(whole.keep.unsqueeze(1), values, 0), scores))

    needs = (PREDICTED,) if predicted else ()
    return Comparison(function, needs, teaches=lambda feedback: ~feedback.total().isnan())


def over_own_mean(values: Tensor) -> Tensor:
    """Value over the mean of its sample, 1 where that is 0; NaN enters no mean; (B, S) -> (B, S)."""
    mean = values.nanmean(1, keepdim=True)
    return torch.where(mean == 0, 1, values / mean)


# ---- shared edges


def merged(values: Tensor, ids: Tensor, mask: Tensor, distinct: bool) -> Tensor:
    """The mean over all trained decisions of the same id, or over the samples that have one; (B, S) -> (B, S)."""
    same_shape(values=values, ids=ids, mask=mask)
    rows = torch.arange(len(ids)).unsqueeze(1).expand_as(ids)
    weight = mask.double()
    if distinct:
        own = joint(rows[:, 0], ids)  # one id for each sample and edge
        weight = weight / torch.zeros(int(own.max()) + 1).double().index_add(0, own.flatten(), weight.flatten())[
            own
        ].clamp(min=1)
    sums = torch.zeros(int(ids.max()) + 1, 2, dtype=torch.float64)
    both = torch.stack([weight * values.double(), weight], -1).flatten(0, 1)
    sums = sums.index_add(0, ids.flatten(), both)[ids]
    return torch.where(mask, sums[..., 0] / sums[..., 1].clamp(min=EPS), 0)


def shared_edges(*, advantage: AdvantageFunction = GRPO, distinct: bool = False) -> Comparison:
    """SALT (arXiv 2510.20022): a decision that several samples share has the mean of their advantages, others keep their own.

    RECONSTRUCTED from the abstract: what an edge is (here: state, decision, what followed) and the mean over occurrences;
    with `distinct` over samples. `advantage` is any that gives one value for each sample.
    """

    def function(feedback: Feedback) -> Advantage:
        found, (mask, edge) = advantage(feedback), fact_of(feedback, "edge")
        values = (found.values if found.values.dim() == 2 else found.values.unsqueeze(1)).expand_as(mask)
        kept = mask & found.keep.unsqueeze(1)
        return found._replace(values=merged(values, joint(feedback.group, edge), kept, distinct).to(found.values))

    return Comparison(function, needs=("edge",))


# ---- sets of edges


def edge_values(present: Tensor, success: Tensor, ddof: int = 0) -> Tensor:
    """Success rate of the graphs that have an edge, standardized over the edges that occur, 0 for others; (G, E), (G,) -> (E,)."""
    counts = present.double().sum(0)
    rate = torch.where(
        counts > 0, (present.double() * success.double().unsqueeze(1)).sum(0) / counts.clamp(min=1), torch.nan
    )
    one = torch.zeros(rate.shape, dtype=torch.int64)
    std = group_std(rate, one, ddof)
    return torch.where(std > 0, group_centred(rate, one) / (std + EPS), 0).nan_to_num(0)


def edges(*, ddof: int = 0) -> Comparison:
    """Graph-GRPO, the edge estimator (arXiv 2603.02701): each decision is an edge that is drawn or not; its value is the edge's.

    Absent edges have value 0. Needs the fact "present", (B, S) bool. PARTIAL: the treatment of absent edges and the std
    (population) are RECONSTRUCTED.
    """

    def function(feedback: Feedback) -> Advantage:
        scores, (mask, present) = scores_of(feedback), fact_of(feedback, "present")
        values = torch.zeros(mask.shape, dtype=torch.float64)
        for number in feedback.group.unique():
            rows = ((feedback.group == number) & ~scores.isnan()).nonzero().flatten()
            if len(rows):
                drawn = present[rows] & mask[rows]
                values[rows] = drawn * edge_values(drawn, scores[rows], ddof)
        return concluded(feedback, values)

    return Comparison(function, needs=("present",))


# ---- hidden influence of tokens


def hidden_reward(right: Tensor, residual: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """How much raising a token's log-prob raises that of right answers; (G,) bool, (G, S, V), (G, S, D), (G, S) -> (G, S).

    residual: onehot(token) - probabilities; hidden: what the token was predicted from. 0 outside the mask.
    """
    lengths = mask.sum(1).clamp(min=1)
    weight = (mask & right.unsqueeze(1)).to(residual) / lengths.unsqueeze(1)
    pull = torch.einsum("gs,gsv,gsd->vd", weight, residual, hidden)
    sign = torch.where(right, 1.0, -1.0).to(residual)
    return torch.where(mask, sign.unsqueeze(1) * torch.einsum("gsv,vd,gsd->gs", residual, pull, hidden), 0)


def influence_threshold(influence: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """The smallest mean influence of a right answer; (G, S), (G,), (G, S) -> ()."""
    means = torch.where(mask, influence, 0).sum(1) / mask.sum(1).clamp(min=1)
    return means[right & mask.any(1)].min()


def token_hidden_reward(*, tilt: float = 0.1, threshold: float = 1.0, right: float = 0.5) -> Comparison:
    """THR (arXiv 2510.03669): GRPO on tokens whose influence on right answers is large, times 1 + sign(influence) * tilt.

    tilt > 0 exploits, < 0 explores, 0 keeps the dominant tokens alone; `threshold` times `influence_threshold` is what counts
    as large. Rewards above `right` are right. Needs the facts "hidden" (B, S, D) and "residual" (B, S, V), V the tokens that
    occur: token policies alone. PARTIAL: the threshold's rule is that of the predecessor NTHR.
    """

    def function(feedback: Feedback) -> Advantage:
        found, (mask, hidden) = GRPO(feedback), fact_of(feedback, "hidden")
        good, factor = scores_of(feedback) > right, torch.ones(mask.shape, dtype=torch.float64)
        for number in feedback.group.unique():
            rows = ((feedback.group == number) & found.keep).nonzero().flatten()
            if good[rows].any() and not good[rows].all():
                part = good[rows], feedback.facts["residual"][rows].float(), hidden[rows].float(), mask[rows]
                influence = hidden_reward(*part)
                large = influence.abs() > threshold * influence_threshold(influence, good[rows], mask[rows])
                factor[rows] = (large * (1 + influence.sign() * tilt)).double()
        values = torch.where(mask, found.values.unsqueeze(1) * factor, 0)
        share = float((factor[mask] != 0).double().mean()) if mask.any() else 0.0
        return found._replace(values=values.to(found.values), metrics={**found.metrics, "dominant_tokens": share})

    return Comparison(function, needs=("hidden", "residual"))


# ---- shared


def concluded(feedback: Feedback, values: Tensor) -> Advantage:
    """Values of decisions with the metrics and the missing opinions of GRPO."""
    plain = GRPO(feedback)
    return plain._replace(values=torch.where(plain.keep.unsqueeze(1), values, 0).to(plain.values))
