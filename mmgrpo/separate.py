"""Several advantages of one sample: the objective may be taken of each by itself, so that one's clip does not hide another's pull.

Of the ways to combine rewards this is the third: raw (`standardized`), standardized and then added (`gdpo`), or the clipped losses
added. They agree where nothing is clipped. Exceptions as in mmgrpo/advantages.py. Axes: B samples, S decisions, K rewards.
"""

import torch

from mmgrpo.advantages import added_up, standardize
from mmgrpo.comparing import Comparison, as_scores, compared, fact_of, scores_of
from mmgrpo.credit import joint
from mmgrpo.types import Advantage, Feedback

SCORES = "process_scores"


def dance(
    feedback: Feedback, *, ddof: int = 1, eps: float = 1e-8, clamp: float = 5.0, separate: bool = True
) -> Advantage:
    """DanceGRPO (arXiv 2505.07818): each reward standardized in the group and clamped, the weighted losses added; values (B,).

    `values`, the weighted sum, also ranks the samples for train.keep_share. Without `separate` the objective is taken of it. A
    weight below 0 turns its advantage around. A reward without an opinion adds 0 to the sample.
    """
    _require_positive(clamp)
    scores, group = scores_of(feedback), feedback.group
    parts = torch.stack(
        [
            weight * standardize(feedback.rewards[name].double(), group, ddof, eps).clamp(-clamp, clamp)
            for name, weight in feedback.weights.items()
            if weight != 0
        ]
    ).nan_to_num(0)  # (K, B)
    whole = compared(as_scores(torch.where(scores.isnan(), torch.nan, added_up(parts)), scores), scores, group)
    return whole._replace(separate=as_scores(parts, scores)) if separate else whole


def dual(*, outcome: float = 1.0, process: float = 1.0, eps: float = 1e-8, clamp: float = 5.0) -> Comparison:
    """Euphonium (arXiv 2602.04928): `dance`'s losses times `outcome`, and times `process` one of every step; values (B, S).

    A step's advantage is its score standardized (ddof 1) over the group at the same step, exactly 0 where all are equal. The
    fact "process_scores", (B, S), is what a process reward says of the sample before the step; 0 or NaN where it guided none.
    """
    _require_positive(clamp)

    def function(feedback: Feedback) -> Advantage:
        whole, scores = dance(feedback, eps=eps, clamp=clamp), fact_of(feedback, SCORES)[1]
        assert whole.separate is not None  # dance was asked to
        steps = torch.arange(scores.shape[1]).expand_as(scores)
        inside = standardize(scores.double().flatten(), joint(feedback.group, steps).flatten(), 1, eps).view(
            scores.shape
        )
        of_steps = torch.where(whole.keep.unsqueeze(1), inside.clamp(-clamp, clamp).nan_to_num(0), 0)
        of_samples = whole.separate.unsqueeze(2).expand(-1, *scores.shape)
        parts = torch.cat([outcome * of_samples, process * of_steps.to(of_samples).unsqueeze(0)])
        return whole._replace(values=added_up(parts), separate=parts)

    return Comparison(function, (SCORES,), teaches=lambda feedback: ~feedback.total().isnan())


def _require_positive(clamp: float) -> None:
    if clamp <= 0:
        raise ValueError(f"clamp is {clamp}; expected a positive number")
