"""Tokens whose update would lower the policy's entropy most are left out, and what an update will do to it is told before.

On the Entropy Dynamics in Reinforcement Fine-Tuning (arXiv 2602.03392). Token policies alone: a step without alternatives has none.
Axes: B samples, S decisions.
"""

from typing import Literal

import torch
from torch import Tensor

from mmgrpo.advantages import GRPO
from mmgrpo.comparing import Comparison, fact_of
from mmgrpo.types import Advantage, AdvantageFunction, Feedback, same_shape

LEAST_SPREAD = 1e-12


def discriminator(log_prob: Tensor, entropy: Tensor) -> Tensor:
    """S = p (H + log p) of the token that was chosen: raising its logit by e changes the entropy by -e S, to first order."""
    same_shape(log_prob=log_prob, entropy=entropy)
    return torch.where(log_prob > -torch.inf, log_prob.exp() * (entropy + log_prob), 0)


def expected_discriminator(probabilities: Tensor) -> Tensor:
    """The mean of S over the policy's own tokens, sum of p^2 (H + log p); (..., V) -> (...)."""
    log_prob = probabilities.log().clamp(min=torch.finfo(probabilities.dtype).min)
    entropy = -(probabilities * log_prob).sum(-1, keepdim=True)
    return (probabilities.square() * (entropy + log_prob)).sum(-1)


def kept_in_batch(values: Tensor, advantages: Tensor, mask: Tensor, width: float) -> Tensor:
    """Clip_B: drops A < 0 with S more than `width` standard deviations (ddof 0) below the mean of all tokens; (B, S) bool."""
    same_shape(values=values, advantages=advantages, mask=mask)
    heard = values[mask].double()
    std = heard.std(correction=0) if len(heard) else torch.zeros(())
    if std < LEAST_SPREAD:
        return mask
    return mask & ~((advantages < 0) & (values.double() - heard.mean() < -width * std))


def kept_in_vocabulary(
    values: Tensor, expected: Tensor, advantages: Tensor, mask: Tensor, width: float, most: float
) -> Tensor:
    """Clip_V: drops A < 0 with E[S] - S over `width` standard deviations, the largest share `most` (at least one) at most."""
    same_shape(values=values, expected=expected, advantages=advantages, mask=mask)
    distance = torch.where(mask, (expected - values).double(), -torch.inf)
    heard = distance[mask]
    std = heard.std(correction=0) if len(heard) else torch.zeros(())
    if std < LEAST_SPREAD:
        return mask
    dropped = mask & (advantages < 0) & (distance > width * std)
    allowed = max(1, int(most * len(heard)))
    if dropped.sum() > allowed:
        ranked = torch.where(dropped, distance, -torch.inf).flatten()
        dropped = torch.zeros_like(ranked, dtype=torch.bool).index_fill(0, ranked.topk(allowed).indices, True)
    return mask & ~dropped.view(mask.shape)


def entropy_clipped(
    *,
    advantage: AdvantageFunction = GRPO,
    by: Literal["batch", "vocabulary"] = "batch",
    width: float | None = None,
    most: float = 1e-4,
) -> Comparison:
    """An advantage, and the tokens it may train on: Clip_B (`width` 2.5 by default) or Clip_V (8.5, of a share `most` at most).

    Dropped tokens leave the denominators. Tokens of A >= 0 are never dropped: the release drops those of A = 0 as well, which
    changes its denominators. The metrics hold the predicted change of the entropy for a unit step, -mean A (S - E[S]), and
    the share dropped. That E[S] is what the release calls "nec" is RECONSTRUCTED.
    """

    def function(feedback: Feedback) -> Advantage:
        found, (mask, entropy) = advantage(feedback), fact_of(feedback, "entropy")
        values = discriminator(fact_of(feedback, "log_prob")[1], entropy)
        expected = fact_of(feedback, "expected_discriminator")[1]
        own = (found.values if found.values.dim() == 2 else found.values.unsqueeze(1)).expand(mask.shape)
        heard = mask & found.keep.unsqueeze(1)
        if by == "batch":
            kept = kept_in_batch(values, own, heard, 2.5 if width is None else width)
        else:
            kept = kept_in_vocabulary(values, expected, own, heard, 8.5 if width is None else width, most)
        count = heard.sum().clamp(min=1)
        metrics = {
            "dropped_tokens": float((heard & ~kept).sum() / count),
            "entropy_change": float(-torch.where(heard, own * (values - expected), 0).sum() / count),
        }
        return found._replace(metrics={**found.metrics, **metrics}, decisions=kept)

    return Comparison(function, needs=("entropy", "log_prob", "expected_discriminator"))
