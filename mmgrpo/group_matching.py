"""Losses of draws that compare the samples of a prompt themselves, by their errors at the same draw: no ratio.

Every draw of a group has its group's loss, so that `seq_mean` gives the mean over groups and draws. The (t, eps) of a column are
meant to be shared inside a group; the mean errors are compared, so `strength` is tied to a mean over D latent elements.
Axes: B samples, S draws, k the samples of one group.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmgrpo.facts import Component, Facts
from mmgrpo.ratios import of_samples, required, trained
from mmgrpo.types import Evaluation, same_shape

Errors = Callable[[Evaluation], Tensor]  # of the weights to compare with; -> (B, S), no gradient


# DGPO


def of_reference(evaluation: Evaluation) -> Tensor:
    """The errors of the reference; (B, S)."""
    return required(evaluation, "reference_error")


def of_old(evaluation: Evaluation) -> Tensor:
    """The errors of the weights that sampled, averaged ones if those do; (B, S)."""
    return required(evaluation, "old_error")


def dgpo(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    against: Errors = of_reference,
    strength: float = 100.0,
    clip: float | None = 1e-3,
    exact: bool = False,
) -> Tensor:
    """DGPO (arXiv 2510.08425): good samples' errors fall below those of other weights, bad ones' rise above; -> (B, S).

    With s = `preference` it is, as in the authors' code, sigmoid(s) without gradient * A * error: the gradient of
    -log sigmoid(-s), which `exact` gives at every sample of the group, without its factor `strength`. An error has no gradient where
    `settled` by `clip`. The authors' strength is 10 to 100 against a frozen reference, 2000 to 5000 against averaged weights,
    their clip 1e-3 for rollouts with guidance, else 1e-5. Advantages are meant to sum to 0 in a group.
    """
    error, other = required(evaluation, "error"), against(evaluation)
    same_shape(log_ratio=evaluation.log_ratio, error=error, against=other, advantages=advantages)
    if clip is not None:
        error = torch.where(settled(evaluation.log_ratio, advantages, clip), error.detach(), error)
    there, group = trained(evaluation), of_samples(evaluation, "group")
    against_others = preference(error - other, advantages, group, there, strength)
    return -logsigmoid(-against_others) if exact else against_others.detach().sigmoid() * advantages * error


def preference(away: Tensor, advantages: Tensor, group: Tensor, there: Tensor, strength: float) -> Tensor:
    """s = strength / G * sum of A * (error - other error) over the G samples of the group that have the draw; (B, S).

    (B, S) each, `there` bool; group (B,) int64.
    """
    if strength <= 0:
        raise ValueError(f"strength is {strength}; expected a positive factor of the errors")
    together = (group.unsqueeze(1) == group).to(away)  # (B, B)
    count = together @ there.to(away)
    return strength * (together @ torch.where(there, advantages * away, 0)) / count.clamp(min=1)


def settled(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Whether q = exp(old error - error) has left 1 by more than `clip` to the side that A pulls to; (B, S) bool."""
    if not 0 < clip < 1:
        raise ValueError(f"clip is {clip}; expected a number between 0 and 1, or none")
    away = torch.expm1(log_ratio.detach())
    return ((advantages > 0) & (away > clip)) | ((advantages < 0) & (away < -clip))


# GDRO


def gdro(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    strength: float = 12.0,
    temperature: float = 0.05,
    stabilizer: float = 0.5,
    top: bool = False,
) -> Tensor:
    """GDRO (arXiv 2601.02036, eq. 2-9): samples are ranked by their errors as by their rewards; -> (B, S).

    `listwise` of the implicit rewards -strength * (error - reference_error), plus stabilizer * the error of the group's best
    sample, the first of equals. A group of equal rewards has no loss. The advantages are not read. The source's numbers are 12
    and 0.5 for text rendering, 6 and 1 for composition; too small a strength collapses. Its samples are made once
    before (mmgrpo/offline.py). PARTIAL: whether its errors are means or sums is not published; one (t, eps) per group and column is
    RECONSTRUCTED.
    """
    error, reference = required(evaluation, "error"), required(evaluation, "reference_error")
    same_shape(log_ratio=evaluation.log_ratio, error=error, reference_error=reference, advantages=advantages)
    there, scores = trained(evaluation), -strength * (error - reference)
    rewards, group = of_samples(evaluation, "reward").to(scores), of_samples(evaluation, "group")
    losses = torch.zeros_like(error)
    for number in group.unique():
        rows = (group == number).nonzero().flatten()
        rows = rows[rewards[rows].argsort(descending=True, stable=True)]
        ranked, have = rewards[rows], there[rows]
        loss = listwise(scores[rows], ranked, have, temperature, top)
        best = torch.where(leading(have), error[rows], 0).sum(0)
        losses[rows] = torch.where(unequal(ranked, have), loss + stabilizer * best, 0)
    return losses


def listwise(scores: Tensor, rewards: Tensor, there: Tensor, temperature: float, top: bool = False) -> Tensor:
    """The Plackett-Luce cross-entropy of a group's scores, samples in falling order of their rewards; -> (S,).

    At each place i the samples from i on are chosen among: the sum over i of log sum exp(score) - the mean score under
    softmax(reward / temperature); temperature 0 chooses sample i. With `top` the first place alone. (k, S), (k,), (k, S) bool.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; expected a number from 0, in units of the reward")
    own = torch.eye(len(rewards), dtype=torch.bool, device=rewards.device)  # (k, k) place, sample
    after = torch.ones_like(own).triu()
    left = own.unsqueeze(2) | (after.unsqueeze(2) & there)  # (k, k, S); never empty, even where a place is not there
    exponent = rewards / temperature if temperature else torch.where(own, 0.0, -torch.inf).to(rewards)
    wanted = torch.where(left, exponent.expand_as(own).unsqueeze(2), -torch.inf).softmax(1)
    losses = torch.where(left, scores, -torch.inf).logsumexp(1) - (wanted * scores).sum(1)  # (k, S)
    return torch.where(leading(there) if top else there, losses, 0).sum(0)


def leading(there: Tensor) -> Tensor:
    """The first of the samples that have a draw; (k, S) bool -> (k, S) bool."""
    return there & (there.cumsum(0) == 1)


def unequal(rewards: Tensor, there: Tensor) -> Tensor:
    """Whether the rewards of the samples that have a draw differ; (k,), (k, S) bool -> (S,) bool."""
    values = rewards.unsqueeze(1)
    return torch.where(there, values, torch.inf).amin(0) < torch.where(there, values, -torch.inf).amax(0)


FACTS: Mapping[Component, Facts] = {
    dgpo: Facts(("error", "group"), "batch", every=True),
    of_reference: Facts(("reference_error",)),
    of_old: Facts(("old_error",)),
    gdro: Facts(("error", "reference_error", "reward", "group"), "batch", every=True),
}
