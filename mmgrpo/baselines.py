"""Advantages whose baseline or scale is not the group's mean and standard deviation.

Pure functions on scores (B,) and group ids (B,), then the components that recipes name. Exceptions as in mmgrpo/advantages.py.
Axes: B samples, G opinions of one group.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mmgrpo.comparing import Comparison, as_scores, column_of, compared, scores_of, with_spread
from mmgrpo.groups import group_centred, within
from mmgrpo.seeds import derive
from mmgrpo.types import Advantage, Feedback, require_shape


def _applied(estimate: Callable[[Tensor, Tensor], Tensor], feedback: Feedback) -> Advantage:
    scores, group = scores_of(feedback), feedback.group
    return compared(as_scores(estimate(scores, group), scores), scores, group)


# ---- median


def median_centred(scores: Tensor, group: Tensor, eps: float = 1e-3, least_scale: float = 0.0) -> Tensor:
    """(score - median) / (median distance from it + eps), the lower median of an even number; (B,), (B,) -> (B,)."""

    def estimate(heard: Tensor) -> Tensor:
        distance = heard - heard.median()
        return distance / (distance.abs().median().clamp(min=least_scale) + eps)

    return within(scores, group, estimate)


def pivots(scores: Tensor, group: Tensor) -> Tensor:
    """The first sample of each group that has its median score, (B,) bool."""

    def first(heard: Tensor) -> Tensor:
        at = (heard == heard.median()).nonzero()[0]
        return torch.zeros_like(heard).index_fill(0, at, 1)

    return within(scores, group, first) == 1


def median(
    feedback: Feedback, *, eps: float = 1e-3, least_scale: float = 0.0, clamp: float | None = None, drop: bool = True
) -> Advantage:
    """MC-GRPO (arXiv 2601.22582): around the group's median, in units of the median distance; for groups of 3 to 9.

    Ask for an odd number of samples, one more than are to be trained on: the one that is the median has value 0 and, with
    `drop`, leaves the loss and its denominators. With two different rewards the scale is 0 and values reach 1 / eps = 1000, as
    in the authors' code, which leans on the gradient's bound; `least_scale` (ours: 0.1) or `clamp` limits them.
    """
    _require_positive(eps=eps, clamp=clamp)
    scores, group = scores_of(feedback), feedback.group
    values = median_centred(scores, group, eps, least_scale)
    values = values if clamp is None else values.clamp(-clamp, clamp)
    found = compared(as_scores(values, scores), scores, group)
    return found._replace(keep=found.keep & ~pivots(scores, group)) if drop else found


# ---- ranks


def normal_ranks(scores: Tensor, group: Tensor, decimals: int = 6) -> Tensor:
    """The standard-normal quantile at (rank - 0.5) / G, the mean of those of equal scores; (B,), (B,) -> (B,)."""

    def estimate(heard: Tensor) -> Tensor:
        quantiles = torch.special.ndtri((torch.arange(len(heard), dtype=torch.float64) + 0.5) / len(heard))
        kinds, which = torch.unique(heard.round(decimals=decimals), return_inverse=True)
        means = torch.zeros(len(kinds), dtype=torch.float64).index_add(0, which.sort().values, quantiles)
        return torch.where(torch.tensor(len(kinds) > 1), (means / which.bincount())[which], 0)

    return within(scores, group, estimate)


def gaussian_rank(feedback: Feedback, *, decimals: int = 6) -> Advantage:
    """G2RPO of OpenVLThinkerV2 (arXiv 2604.08539): rewards of any shape mapped to a normal distribution by their rank.

    Scores that agree to `decimals` are tied: noise of real numbers is no order (ours; the paper ties exact equals).
    """
    return _applied(partial(normal_ranks, decimals=decimals), feedback)


# ---- virtual samples


def with_virtual(scores: Tensor, group: Tensor, best: float, count: int = 1, eps: float = 1e-6) -> Tensor:
    """Standardized by mean and std (ddof 1) of the group and `count` virtual samples of score `best`; (B,), (B,) -> (B,)."""
    if (scores > best).any():
        raise ValueError(f"a score is {float(scores.nan_to_num(-math.inf).max()):g}; expected at most best = {best:g}")

    def estimate(heard: Tensor) -> Tensor:
        extended = torch.cat([heard, heard.new_full((count,), best)])
        distance = heard - extended.mean()
        std = extended.std(correction=1) if len(extended) > 1 else torch.zeros(())
        return torch.where(extended.min() < extended.max(), distance / (std + eps), 0)

    return within(scores, group, estimate)


def virtual_best(*, best: float = 1.0, count: int = 1, eps: float = 1e-6) -> Comparison:
    """NGRPO (arXiv 2509.18851): the group is compared with a perfect sample too, so an all-wrong one is pushed away.

    `best` is the largest possible total reward. Groups teach unless all of them are perfect; the loss is
    `clipped` with low 0.16 and high 0.24 under `token_mean`.
    """
    if count < 0:
        raise ValueError(f"count is {count}; expected at least 0")
    estimate = partial(with_virtual, best=best, count=count, eps=eps)

    def imperfect(feedback: Feedback) -> Tensor:
        return with_spread(feedback) | (feedback.total() < best if count else torch.tensor(False))

    return Comparison(partial(_applied, estimate), teaches=imperfect)


# ---- baselines of group-relative REINFORCE (arXiv 2509.24203)


def shifted(*, shift: float = -0.1) -> Comparison:
    """AsymRE (arXiv 2506.20520 as in arXiv 2509.24203): score - (mean + shift), which equals a little imitation of every sample.

    A group of one has value -shift. Every group teaches unless shift is 0. The loss is `reinforce` or a kept form of it.
    """

    def estimate(scores: Tensor, group: Tensor) -> Tensor:
        return group_centred(scores, group) - shift

    def any_group(feedback: Feedback) -> Tensor:
        return with_spread(feedback) if shift == 0 else ~feedback.total().isnan()

    return Comparison(partial(_applied, estimate), teaches=any_group)


def against_log_mean_exp(scores: Tensor, group: Tensor, temperature: float = 1.0) -> Tensor:
    """score - temperature * log mean exp(score / temperature); (B,), (B,) -> (B,)."""

    def estimate(heard: Tensor) -> Tensor:
        below = heard - heard.max()  # exactly 0 where all are equal
        return below - temperature * (below / temperature).exp().mean().log()

    return within(scores, group, estimate)


def optimal_value(scores: Tensor, group: Tensor, temperature: float) -> Tensor:
    """temperature * log mean exp(score / temperature) over each sample's group: V* of A*-PO's first stage; (B,), (B,) -> (B,)."""
    _require_positive(temperature=temperature)
    return scores.double() - against_log_mean_exp(scores, group, temperature)


def against_value(*, column: str = "value") -> Comparison:
    """A*-PO (arXiv 2505.20686, number RECALLED): the reward minus a value of the prompt, from a column of the data.

    The value is `optimal_value` of samples of the reference, made before training (temperature beta_1 = 0.5). One sample of a
    prompt is enough; every one teaches. The loss is `mmgrpo.contrasts:regressed`.
    """

    def function(feedback: Feedback) -> Advantage:
        scores = scores_of(feedback)
        values = scores.double() - column_of(feedback, column)
        return compared(as_scores(values, scores), scores, feedback.group)

    return Comparison(function, teaches=lambda feedback: ~feedback.total().isnan())


def log_mean_exp(feedback: Feedback, *, temperature: float = 1.0) -> Advantage:
    """The baseline of OPMD (as in arXiv 2509.24203): between the group's mean (hot) and its largest score (cold)."""
    _require_positive(temperature=temperature)
    return _applied(partial(against_log_mean_exp, temperature=temperature), feedback)


def balanced_scores(scores: Tensor, group: Tensor) -> Tensor:
    """score - mean of what is kept, 0 for what is dropped: as many negatives as there are scores from the mean up.

    Which negatives are dropped depends on the group's id alone. (B,), (B,) -> (B,).
    """
    values = torch.full(scores.shape, torch.nan, dtype=torch.float64)
    for number in group.unique().tolist():
        rows = ((group == number) & ~scores.isnan()).nonzero().flatten()
        heard = scores[rows].double()
        good, bad = rows[heard >= heard.mean()], rows[heard < heard.mean()]
        generator = torch.Generator().manual_seed(derive("balanced", number))
        kept = torch.cat([good, bad[torch.randperm(len(bad), generator=generator)[: len(good)]]])
        values[rows] = 0.0
        if len(kept) > 1:
            values[kept] = scores[kept].double() - scores[kept].double().mean()
    return values


def balanced(feedback: Feedback) -> Advantage:
    """RED-Drop (arXiv 2509.24203): where negatives are more than positives, a random surplus of them has value 0."""
    return _applied(balanced_scores, feedback)


# ---- the whole batch


def whitened(scores: Tensor, lengths: Tensor) -> Tensor:
    """(score - mean) / sqrt(var + 1e-8) over the decisions of the batch, of which a sample has its length; (B,), (B,) -> (B,)."""
    weight = torch.where(scores.isnan(), 0, lengths.double())
    known, count = scores.double().nan_to_num(0), weight.sum()
    mean = (weight * known).sum() / count.clamp(min=1)
    variance = (weight * (known - mean).square()).sum() / (count - 1).clamp(min=1)
    return torch.where(scores.isnan(), torch.nan, (known - mean) / (variance + 1e-8).sqrt())


def batch_whitened(*, baseline: bool = False) -> Comparison:
    """REINFORCE++ (arXiv 2501.03262): standardized over all decisions of the batch; with `baseline` the group's mean goes first.

    Without it a group of any size teaches, one sample included. Its KL in the reward is
    loss.kl_in_reward. The form with `baseline` is RECALLED, not read.
    """

    def function(feedback: Feedback) -> Advantage:
        scores, group = scores_of(feedback), feedback.group
        lengths = torch.ones(len(group)) if feedback.mask is None else feedback.mask.sum(1)
        require_shape("lengths", lengths, len(group))
        inside = group_centred(scores, group) if baseline else scores
        return compared(as_scores(whitened(inside, lengths), scores), scores, group)

    def differs_from_batch(feedback: Feedback) -> Tensor:
        scores = feedback.total()
        return with_spread(feedback) if baseline else ~scores.isnan() & (scores != scores.nanmean())

    return Comparison(function, teaches=differs_from_batch)


def _require_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; expected a positive number")
