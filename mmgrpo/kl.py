"""Distances to the reference policy, per decision: in closed form, or estimated from the decision that was recorded.

The functions on d = log pi - log pi_ref (any shape, nats) are the estimators of Schulman, "Approximating KL Divergence" (2020);
those on an `Evaluation` are what a recipe's loss.kl names. Axes: B samples, S decisions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgrpo.types import Evaluation, same_shape

KL = Callable[[Evaluation], Tensor]  # -> (B, S)


def k1(log_ratio: Tensor) -> Tensor:
    """log pi - log pi_ref of a sample of pi: unbiased, any sign; its gradient as a loss is 0 on average: for rewards only."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the square of log pi - log pi_ref: biased, but on samples of pi its gradient is that of KL(pi || ref)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-d) - 1 + d with d = log pi - log pi_ref: unbiased, never negative; its gradient is that of KL(ref || pi).

    d is limited to [-10, 10], beyond which the estimate is constant. Schulman, "Approximating KL Divergence" (2020).
    """
    d = log_ratio.clamp(-10, 10)
    return torch.expm1(-d) + d


def flow_grpo_kl(kl: Tensor, dt: Tensor) -> Tensor:
    """KL of a Gaussian step times its length: the scale in which Flow-GRPO's beta of 0.04 and 0.01 are published; (B, S).

    The paper (arXiv 2505.05470) has the closed form; the authors' code divides by 2 g^2 instead of 2 g^2 dt.
    """
    same_shape(kl=kl, dt=dt)
    return kl * dt


def exact_kl(evaluation: Evaluation) -> Tensor:
    """The KL in closed form as the policy computed it; raises ValueError if it did not."""
    if evaluation.kl is None:
        raise ValueError(
            "loss.kl is 'exact', but the policy's decisions have no closed form; expected 'k2', 'k3' or 'k3_unbiased'"
        )
    return evaluation.kl


def scaled_kl(evaluation: Evaluation) -> Tensor:
    """The exact KL times the step's length, `flow_grpo_kl`; raises ValueError for decisions that are no steps."""
    if evaluation.dt is None:
        raise ValueError(
            "loss.kl is 'flow_grpo', but the policy's decisions have no step length; expected another kind"
        )
    return flow_grpo_kl(exact_kl(evaluation), evaluation.dt)


def estimated_k2(evaluation: Evaluation) -> Tensor:
    """`k2` of the recorded decisions."""
    return k2(_to_reference(evaluation))


def estimated_k3(evaluation: Evaluation) -> Tensor:
    """`k3` of the recorded decisions."""
    return k3(_to_reference(evaluation))


def unbiased_k3(evaluation: Evaluation) -> Tensor:
    """ratio * `k3`, the ratio unclipped and with gradient: value and gradient of KL(pi || ref) on any samples.

    DeepSeek-V3.2, arXiv 2512.02556.
    """
    return evaluation.log_ratio.exp() * k3(_to_reference(evaluation))


@dataclass(frozen=True)
class ByKind:
    """A distance for each kind of decision, times its share."""

    parts: Mapping[int, tuple[KL, float]]  # number in mmgrpo.types.KINDS -> distance, share

    def __call__(self, evaluation: Evaluation) -> Tensor:
        assert evaluation.kind is not None  # `improve.accumulate` sets it
        found = [
            share * torch.where(evaluation.kind == number, distance(evaluation), 0)
            for number, (distance, share) in self.parts.items()
        ]
        return torch.stack(found).sum(0)


def _to_reference(evaluation: Evaluation) -> Tensor:
    if evaluation.to_reference is None:
        raise ValueError("loss.kl_weight is set, but the policy returned no log-ratio to its reference")
    return evaluation.to_reference


DISTANCES: Mapping[str, KL] = {
    "exact": exact_kl,
    "flow_grpo": scaled_kl,
    "k2": estimated_k2,
    "k3": estimated_k3,
    "k3_unbiased": unbiased_k3,
}
