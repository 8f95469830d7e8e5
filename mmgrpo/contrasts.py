"""Objectives that compare the samples of a prompt themselves, or regress on their rewards: no ratio, no clip.

Every decision of a group has its group's loss and every decision of a sample its sample's, so that `seq_mean` gives the mean over
groups (weighted by their kept samples) or over samples. They read the total reward and ignore the advantages, except `regressed`.
Axes: B samples, S decisions.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmgrpo.facts import Component, Facts
from mmgrpo.ratios import of_samples, required, sample_mean, sample_sum, trained
from mmgrpo.types import Evaluation, require_shape, same_shape

Score = Callable[[Evaluation], Tensor]  # of a sample; -> (B,), with gradient
Pairing = Callable[[Tensor, Tensor], Tensor]  # rewards (B,), group (B,) -> (B, B) bool: row against column


# DisCO


def log_likelihood(evaluation: Evaluation) -> Tensor:
    """The mean log-prob of a sample's decisions (log-L); (B,)."""
    return _mean(evaluation, required(evaluation, "log_prob"))


def mean_ratio(evaluation: Evaluation) -> Tensor:
    """The mean ratio of a sample's decisions (L-ratio); (B,)."""
    return _mean(evaluation, evaluation.log_ratio.exp())


def discriminative(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    score: Score,
    temperature: float | None = None,
    threshold: float = 0.5,
    penalty: float = 1e3,
    slack: float = 1e-4,
) -> Tensor:
    """DisCO (arXiv 2505.12366): right samples score above the wrong ones of their group, under a bound on the KL; -> (B, S).

    -J of the group, `separation` with right meaning a reward above `threshold`; 0 where all are right or all wrong. Plus
    penalty * max(KL - slack, 0) without gradient * KL, KL = -the mean log-ratio of all trained decisions. The reported value
    is that of the formula: the authors' code has its gradient and another value.
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    there = trained(evaluation)
    right = of_samples(evaluation, "reward") > threshold
    index = of_samples(evaluation, "group")
    gain = separation(score(evaluation), there.any(1) & right, there.any(1) & ~right, index, temperature)
    moved = -torch.where(there, evaluation.log_ratio, 0).sum() / there.sum().clamp(min=1)
    held = penalty * (moved.detach() - slack).clamp(min=0) * moved
    return (held - gain).unsqueeze(1).expand_as(there)


def separation(scores: Tensor, right: Tensor, wrong: Tensor, group: Tensor, temperature: float | None = None) -> Tensor:
    """Mean score of a group's right samples - that of its wrong ones, at each sample; 0 in a group without both; (B,) each.

    With a temperature the wrong ones count by temperature * log mean exp(score / temperature): the highest weighs most.
    """
    same_shape(scores=scores, right=right, wrong=wrong, group=group)
    together = group.unsqueeze(1) == group  # (B, B)
    better, worse = together & right, together & wrong
    below = _mean_among(scores, worse) if temperature is None else soft_maximum(scores, worse, temperature)
    return torch.where(better.any(1) & worse.any(1), _mean_among(scores, better) - below, 0)


def soft_maximum(values: Tensor, among: Tensor, temperature: float) -> Tensor:
    """temperature * log mean exp(value / temperature) over the columns of each row, 0 of none; (B,), (B, B) bool -> (B,).

    It tends to the mean for a high temperature, to the largest value for a low one.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number, in units of the values")
    some = among.any(1)
    chosen = among | ~some.unsqueeze(1)  # the logarithm of an empty sum has no gradient
    exponent = torch.where(chosen, (values / temperature).expand_as(among), -torch.inf)
    count = chosen.sum(1).to(values)
    return torch.where(some, temperature * (exponent.logsumexp(1) - count.log()), 0)


def _mean_among(values: Tensor, among: Tensor) -> Tensor:
    """The mean over the columns of each row, 0 of none; (B,), (B, B) bool -> (B,)."""
    return torch.where(among, values.expand_as(among), 0).sum(1) / among.sum(1).clamp(min=1)


disco = partial(discriminative, score=log_likelihood, temperature=10.0)
disco_ratio = partial(discriminative, score=mean_ratio, temperature=1.0)
disco_b = partial(discriminative, score=log_likelihood)


# DNO


def every_pair(rewards: Tensor, group: Tensor) -> Tensor:
    """All pairs of different samples of a group, in the order of their rows; (B,), (B,) int64 -> (B, B) bool."""
    return (group.unsqueeze(1) == group).triu(1)


def preferred(
    rewards: Tensor,
    group: Tensor,
    *,
    least: float | None = None,
    margin: float = 0.0,
    teacher: Tensor | None = None,
    teacher_margin: float = 0.0,
) -> Tensor:
    """Ordered pairs of a group whose first has a reward above the second's, by at least `margin`; -> (B, B) bool.

    The first must have at least `least`. `teacher` (B,) bool marks samples that the policy did not make, which as firsts need
    `teacher_margin`. The paper's judge, of 1 to 6 points: least 5, margin 1, teacher_margin 2.
    """
    require_shape("rewards", rewards, None)
    same_shape(rewards=rewards, group=group)
    gap = rewards.unsqueeze(1) - rewards
    needed = torch.full_like(rewards, margin)
    needed = needed if teacher is None else torch.where(teacher, teacher_margin, needed)
    pairs = (group.unsqueeze(1) == group) & (gap > 0) & (gap >= needed.unsqueeze(1))
    return pairs if least is None else pairs & (rewards >= least).unsqueeze(1)


def paired(
    evaluation: Evaluation, advantages: Tensor, *, pairing: Pairing, hard: bool, strength: float = 0.1
) -> Tensor:
    """DNO (arXiv 2404.03715, algorithms 1 and 2): gaps of a pair's log-ratios regress on gaps of their rewards; -> (B, S).

    `pair_loss` with D = strength * (log-ratio of the first - of the second), sums over their decisions, relative to the policy
    that sampled, the previous iterate; the target is sigmoid(reward - reward), rewards being win rates, or 1 if `hard`, which
    is DPO's loss. The mean over the pairs of a group, RECONSTRUCTED: the paper shuffles the pairs of all prompts.
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    there = trained(evaluation)
    rewards, group = of_samples(evaluation, "reward"), of_samples(evaluation, "group")
    pairs = pairing(rewards, group) & there.any(1) & there.any(1).unsqueeze(1)
    whole = strength * sample_sum(evaluation)[:, 0]
    target = (rewards.unsqueeze(1) - rewards).sigmoid()
    losses = pair_loss(whole.unsqueeze(1) - whole, torch.ones_like(target) if hard else target)
    together = (group.unsqueeze(1) == group).to(losses)
    by_first = torch.stack([torch.where(pairs, losses, 0).sum(1), pairs.sum(1).to(losses)], 1)  # (B, 2) sum, count
    total, count = (together @ by_first).unbind(1)
    return (total / count.clamp(min=1)).unsqueeze(1).expand_as(there)


def pair_loss(gap: Tensor, target: Tensor) -> Tensor:
    """-(z log sigmoid(D) + (1 - z) log sigmoid(-D)), least at D = logit z; gap D and target z of any equal shapes."""
    same_shape(gap=gap, target=target)
    return -(target * logsigmoid(gap) + (1 - target) * logsigmoid(-gap))


dno = partial(paired, pairing=every_pair, hard=False)
dno_hard = partial(paired, pairing=preferred, hard=True)


# A*-PO


def regressed(evaluation: Evaluation, advantages: Tensor, *, strength: float = 1e-3) -> Tensor:
    """A*-PO's second stage (arXiv 2505.20686): (strength * log pi / pi_ref of the sample - A)^2; -> (B, S).

    A is meant to be the reward minus the prompt's V*: `mmgrpo.baselines:against_value`. Needs a reference.
    """
    away = required(evaluation, "to_reference")
    same_shape(log_ratio=evaluation.log_ratio, to_reference=away, advantages=advantages)
    whole = sample_sum(Evaluation(away, mask=evaluation.mask))
    return (strength * whole - advantages).square()


def _mean(evaluation: Evaluation, values: Tensor) -> Tensor:
    """The mean over each sample's trained decisions; (B, S) -> (B,)."""
    return sample_mean(Evaluation(values, mask=evaluation.mask))[:, 0]


FACTS: Mapping[Component, Facts] = {
    discriminative: Facts(("reward", "group"), "batch", every=True),
    log_likelihood: Facts(("log_prob",), "sample"),
    mean_ratio: Facts(couples="sample"),
    paired: Facts(("reward", "group"), "batch", every=True),
    regressed: Facts(("to_reference",), "sample", every=True),
}
