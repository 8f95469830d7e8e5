"""Losses of draws, clean samples noised again: the forward process is matched, no step of a sampler is replayed.

A draw's output (a velocity on a flow's path) is compared with what it should have been, `target`. Distances are means over D latent
elements. Those that compare the samples of a prompt themselves are mmgrpo/group_matching.py. The sources train them with averaged
weights: those sample, and the old outputs and errors are theirs.
Axes: B samples, S draws, D latent elements.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from mmgrpo.facts import Component, Facts
from mmgrpo.objectives import Objective, clipped
from mmgrpo.ratios import required
from mmgrpo.types import Evaluation, same_shape

Weighting = Callable[[Tensor, Tensor], Tensor]  # error, clean_scale; (B, S) each -> (B, S)
OUTPUTS = ("prediction", "old_prediction", "target")  # fields (B, S, D)
SMALLEST = 1e-5  # of the distance that a draw's loss is divided by


# DiffusionNFT


def nft(evaluation: Evaluation, advantages: Tensor, *, strength: float = 1.0, bound: float = 5.0) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117), the authors' code: bound * (r L+ + (1 - r) L-) / strength; -> (B, S).

    L+ and L- are mean_d (x+- - x0)^2 / max(mean_d |x+- - x0|, 1e-5), the divisor without gradient, of the clean samples that
    `implicit` outputs predict; r is `optimality`. At A = 0 the policy is pulled back to the old one. `strength` is the paper's
    beta: 1 for one reward, 0.1 for text rendering and several rewards.
    """
    good = optimality(advantages, bound)
    scale = required(evaluation, "clean_scale")
    better, worse = (normalized(away, scale) for away in implicit(evaluation, advantages, strength))
    return bound * (good * better + (1 - good) * worse) / strength


def nft_plain(evaluation: Evaluation, advantages: Tensor, *, strength: float = 1.0, bound: float = 5.0) -> Tensor:
    """DiffusionNFT as in the paper: r * mean_d (v+ - target)^2 + (1 - r) * mean_d (v- - target)^2; -> (B, S).

    No weight by time and none by the distance itself; v+-, r and the options as in `nft`.
    """
    good = optimality(advantages, bound)
    better, worse = (away.square().mean(2) for away in implicit(evaluation, advantages, strength))
    return good * better + (1 - good) * worse


def optimality(advantages: Tensor, bound: float) -> Tensor:
    """r = A / (2 bound) + 1/2 within [0, 1]: how much a sample counts as a good one; (B, S)."""
    if bound <= 0:
        raise ValueError(f"bound is {bound}; expected the positive advantage from which a sample is all good")
    return (advantages / (2 * bound) + 0.5).clamp(0, 1)


def implicit(evaluation: Evaluation, advantages: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """v+ - target and v- - target: v+- = old +- strength * (output - old); (B, S, D) each."""
    if strength <= 0:
        raise ValueError(f"strength is {strength}; expected a positive factor of the move from the old output")
    new, old, target = (required(evaluation, name) for name in OUTPUTS)
    same_shape(prediction=new, old_prediction=old, target=target)
    same_shape(log_ratio=evaluation.log_ratio, prediction=new[..., 0], advantages=advantages)
    moved = strength * (new - old)
    return (old - target) + moved, (old - target) - moved


def normalized(away: Tensor, scale: Tensor) -> Tensor:
    """mean_d x^2 / max(mean_d |x|, 1e-5), the divisor without gradient, x = scale * away; (B, S, D), (B, S) -> (B, S)."""
    clean = scale.unsqueeze(2) * away
    return clean.square().mean(2) / clean.detach().abs().mean(2).clamp(min=SMALLEST)


# AWM


narrow = partial(clipped, low=1e-4, high=1e-4)


def uniform(error: Tensor, scale: Tensor) -> Tensor:
    """The error itself; (B, S)."""
    return error


def by_time(error: Tensor, scale: Tensor) -> Tensor:
    """t * error, with t the scale of the predicted clean sample; (B, S)."""
    return scale * error


def by_squared_time(error: Tensor, scale: Tensor) -> Tensor:
    """t^2 * error, the error of the predicted clean sample; (B, S)."""
    return scale.square() * error


def huber(error: Tensor, scale: Tensor, *, eps: float = 1e-10) -> Tensor:
    """t * (sqrt(error + eps) - sqrt(eps)); (B, S)."""
    return generalized_huber(error, scale, power=0.5, eps=eps) / 2


def generalized_huber(error: Tensor, scale: Tensor, *, power: float = 0.25, eps: float = 1e-10) -> Tensor:
    """t / power * ((error + eps)^power - eps^power); (B, S)."""
    if power <= 0 or eps <= 0:
        raise ValueError(f"power and eps are {power} and {eps}; expected positive numbers")
    return scale / power * ((error + eps).pow(power) - eps**power)


def advantage_weighted(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    objective: Objective = narrow,
    weighting: Weighting = uniform,
) -> Tensor:
    """AWM (arXiv 2509.25050): an objective whose log-ratio is how much a draw's weighted error fell; -> (B, S).

    log_ratio = W(old_error) - W(error), W the `weighting`, of the same draw under both weights; subtracted in float64, for the
    differences are about 1e-3. Any objective on log-ratios will do; those that need means of Gaussian steps will not.
    """
    error, old, scale = (required(evaluation, name) for name in FACTS[advantage_weighted].needs)
    same_shape(log_ratio=evaluation.log_ratio, error=error, old_error=old, clean_scale=scale, advantages=advantages)
    fallen = weighting(old.double(), scale.double()) - weighting(error.double(), scale.double())
    return objective(replace(evaluation, log_ratio=fallen.to(error.dtype)), advantages)


def held(
    evaluation: Evaluation, advantages: Tensor, *, objective: Objective = advantage_weighted, weight: float = 1.0
) -> Tensor:
    """An objective plus weight * drift, for a draw mean_d (output - old output)^2: AWM's EMA-KL; -> (B, S).

    It is that to averaged weights where those sample. Samples of advantage 0 are held too.
    """
    if weight <= 0:
        raise ValueError(
            f"weight is {weight}; expected a positive factor of the drift, or the objective without `held`"
        )
    drift = required(evaluation, "drift")
    same_shape(log_ratio=evaluation.log_ratio, drift=drift, advantages=advantages)
    return objective(evaluation, advantages) + weight * drift


# The tuned recipe of AWM's authors, beside advantages clamped to 1 and 1e-4 of the KL.
awm_tuned = partial(
    held,
    objective=partial(advantage_weighted, objective=partial(clipped, low=1.0, high=1.0), weighting=generalized_huber),
    weight=1.0,
)

FACTS: Mapping[Component, Facts] = {
    nft: Facts((*OUTPUTS, "clean_scale"), every=True),
    nft_plain: Facts(OUTPUTS, every=True),
    advantage_weighted: Facts(("error", "old_error", "clean_scale")),
    held: Facts(("drift",), every=True),
}
