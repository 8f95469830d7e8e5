"""Losses of single decisions, and the weights that add them up.

An objective is (evaluation, advantages (B, S), *, options) -> (B, S) losses. An aggregation is (mask (B, S), *, options) ->
(B, S) weights. The loss of an update is

    weighted_sum(objective(masked(evaluation, mask), advantages), aggregation(mask, keep=keep, total=total))

where `total` is the denominator of the whole update, the sum of `denominator(aggregation, mask, keep)` over its micro-batches
and ranks, so that parts add up to one large batch. Untrained decisions may hold anything: `masked` empties them before a loss
sees them and `weighted_sum` selects, so neither the value nor the gradient can meet them.
The ratio is exp(log_ratio); on the first update after a rollout it is 1 and the gradient -advantage * grad log pi.
Clip widths are for the reduction of the log-ratio at hand: about 0.2 for tokens, 1e-6 to 1e-3 for means over latents.
Axes: B samples, S decisions.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmgrpo.types import KINDS, Evaluation, require_shape, same_shape

Objective = Callable[[Evaluation, Tensor], Tensor]
Aggregation = Callable[..., Tensor]
Level = Literal["decision", "sample", "batch"]  # what an objective must see together
LEVELS: tuple[Level, ...] = ("decision", "sample", "batch")


def masked(evaluation: Evaluation, mask: Tensor) -> Evaluation:
    """The evaluation with 0 in the decisions that are not trained, without gradient to them; mask (B, S) bool."""
    same_shape(**{"mask": mask} | evaluation.tensors())
    trained = {name: torch.where(mask, value, 0) for name, value in evaluation.tensors().items() if name != "mask"}
    return Evaluation(**trained, mask=mask)


# Objectives


def clipped(
    evaluation: Evaluation, advantages: Tensor, *, low: float = 0.2, high: float = 0.2, ceiling: float | None = None
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), PPO's clip as in GRPO (arXiv 2402.03300, eq. 3); -> (B, S).

    high > low is DAPO's clip-higher (arXiv 2503.14476). `ceiling` > 1 + high also bounds the ratio where A < 0 (two-sided
    clip, INTELLECT-2, arXiv 2505.07291).
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    return _clipped(evaluation.log_ratio, advantages, low, high, ceiling)


def reinforce(evaluation: Evaluation, advantages: Tensor) -> Tensor:
    """-A * log_ratio, whose gradient is -A grad log pi at any ratio; -> (B, S)."""
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    return -advantages * evaluation.log_ratio


def guarded(
    evaluation: Evaluation, advantages: Tensor, *, low: float = 2e-6, high: float = 2e-6, scale_by_dt: bool = True
) -> Tensor:
    """GRPO-Guard (arXiv 2510.22319): clip the ratio without its bias and step-dependent scale; needs Gaussian steps; -> (B, S).

    log ratio' = step_std * (log_ratio + drift), linear in the move of the mean. `scale_by_dt` divides the loss by the length
    of the step, as the paper and the authors' code do. All reductions over event dimensions are means.
    """
    drift, std, dt = (_required(evaluation, name) for name in FACTS[guarded].needs)
    same_shape(log_ratio=evaluation.log_ratio, drift=drift, step_std=std, dt=dt, advantages=advantages)
    loss = _clipped(std * (evaluation.log_ratio + drift), advantages, low, high, None)
    return loss / torch.where(dt > 0, dt, 1) if scale_by_dt else loss


def gspo(evaluation: Evaluation, advantages: Tensor, *, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    """GSPO (arXiv 2507.18071, eq. 5): PPO's clip of a sample's own ratio, exp of its mean log-ratio; -> (B, S).

    Every decision of a sample has the sample's loss: add them up with `seq_mean`, `token_mean` would weight by length.
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    return _clipped(sample_mean(evaluation), advantages, low, high, None)


def gspo_token(evaluation: Evaluation, advantages: Tensor, *, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    """GSPO-token (arXiv 2507.18071, eq. 14): the value of `gspo`, the gradient through each decision's own log-prob; -> (B, S).

    Equal to `gspo` where the advantages of a sample are; meant for advantages per decision.
    """
    own = evaluation.log_ratio
    same_shape(log_ratio=own, advantages=advantages)
    return _clipped(sample_mean(evaluation).detach() + own - own.detach(), advantages, low, high, None)


def cispo(evaluation: Evaluation, advantages: Tensor, *, cap: float = 5.0) -> Tensor:
    """CISPO (arXiv 2506.13585, eq. 4): -A * log pi under the weight min(ratio, cap), which carries no gradient; -> (B, S).

    No lower bound, as MiniMax uses it and ScaleRL (arXiv 2510.13786) recommends with a cap of 5. log_ratio stands for
    log pi: the gradient is the same, the value of the loss is another.
    """
    if cap <= 0:
        raise ValueError(f"cap is {cap}; expected a positive bound of the ratio")
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    weight = evaluation.log_ratio.detach().clamp(max=math.log(cap)).exp()
    return -weight * advantages * evaluation.log_ratio


def sample_mean(evaluation: Evaluation) -> Tensor:
    """The mean log-ratio of a sample's trained decisions, at each of its decisions; (B, S)."""
    trained = _trained(evaluation)
    total = torch.where(trained, evaluation.log_ratio, 0).sum(1, keepdim=True)
    return (total / trained.sum(1, keepdim=True).clamp(min=1)).expand_as(trained)


# Weights that carry no gradient and leave the denominators alone


@dataclass(frozen=True)
class Weighted:
    """An objective whose losses are multiplied by a weight without gradient."""

    objective: Objective
    weight: Callable[[Evaluation], Tensor]  # -> (B, S)
    needs: tuple[str, ...]
    couples: Level

    def __call__(self, evaluation: Evaluation, advantages: Tensor) -> Tensor:
        return self.objective(evaluation, advantages) * self.weight(evaluation).detach()


def sampler_corrected(
    *,
    objective: Objective = clipped,
    cap: float = 2.0,
    floor: float | None = None,
    mode: Literal["truncate", "mask"] = "truncate",
    level: Literal["decision", "sample"] = "decision",
) -> Weighted:
    """An objective for decisions that were sampled by other kernels than the replay's: times pi_replay / pi_sampler.

    Both under the weights that sampled, from the policy's `sampler_gap`; the product over a sample's decisions if `level`
    is "sample". "truncate" limits the weight to [floor, cap] (TIS), "mask" makes it 0 outside (MIS, arXiv 2510.18855).
    """
    if cap < 1 or (floor is not None and not 0 < floor <= 1):
        raise ValueError(f"cap and floor are {cap} and {floor}; expected at least 1, and at most 1 or none")
    weight = partial(sampler_weight, cap=cap, floor=floor or 0.0, mode=mode, level=level)
    return Weighted(objective, weight, ("sampler_gap",), "sample" if level == "sample" else "decision")


def sampler_weight(evaluation: Evaluation, *, cap: float, floor: float, mode: str, level: str) -> Tensor:
    """exp of the sampler's gap, of one decision or of a sample's sum, limited to [floor, cap] or 0 outside; (B, S)."""
    gap = _required(evaluation, "sampler_gap")
    weight = (gap.sum(1, keepdim=True).expand_as(gap) if level == "sample" else gap).exp()
    if mode == "truncate":
        return weight.clamp(floor, cap)
    return torch.where((weight >= floor) & (weight <= cap), weight, 0)


def top_entropy(*, objective: Objective = clipped, share: float = 0.2) -> Weighted:
    """An objective on the decisions of highest entropy alone (arXiv 2506.01939): the top `share` of an update's decisions.

    The others weigh 0 and stay in the denominators.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number in [0, 1]")
    return Weighted(objective, partial(in_top_share, share=share), ("entropy",), "batch")


def in_top_share(evaluation: Evaluation, *, share: float) -> Tensor:
    """1 where the entropy reaches the (1 - share) quantile of all trained decisions, linearly interpolated; (B, S)."""
    entropy, trained = _required(evaluation, "entropy").detach(), _trained(evaluation)
    if not trained.any():
        return torch.zeros_like(entropy)
    ordered = entropy[trained].sort().values  # torch.quantile refuses more than 2^24 values
    place = (1 - share) * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return (trained & (entropy >= torch.lerp(low, high, place - math.floor(place)))).to(entropy.dtype)


@dataclass(frozen=True)
class ByKind:
    """An objective for each kind of decision, and its weight."""

    parts: Mapping[int, tuple[Objective, float]]  # number in KINDS -> objective, weight

    def __call__(self, evaluation: Evaluation, advantages: Tensor) -> Tensor:
        kind, trained = _required(evaluation, "kind"), _trained(evaluation)
        losses = [
            weight
            * torch.where(kind == number, objective(masked(evaluation, trained & (kind == number)), advantages), 0)
            for number, (objective, weight) in self.parts.items()
        ]
        return torch.stack(losses).sum(0)


def by_kind(
    *, step: Objective = clipped, token: Objective = clipped, step_weight: float = 1.0, token_weight: float = 1.0
) -> ByKind:
    """Denoising steps and tokens of one trajectory, each with its own objective (clip widths differ by 1e3) and weight."""
    return ByKind({KINDS["step"]: (step, step_weight), KINDS["token"]: (token, token_weight)})


class Facts(NamedTuple):
    """What must be known of an objective before it is computed."""

    needs: tuple[str, ...] = ()  # fields of `Evaluation` beyond log_ratio
    couples: Level = "decision"


FACTS: Mapping[Callable[..., Tensor], Facts] = {
    guarded: Facts(("drift", "step_std", "dt")),
    gspo: Facts(couples="sample"),
    gspo_token: Facts(couples="sample"),
}


def facts(objective: Objective) -> Facts:
    """Of an objective as a recipe builds it: options bound with functools.partial, weights around it."""
    if isinstance(objective, Weighted):
        inner = facts(objective.objective)
        widest = max(inner.couples, objective.couples, key=LEVELS.index)
        return Facts((*inner.needs, *objective.needs), widest)
    if isinstance(objective, ByKind):
        found = [facts(part) for part, _ in objective.parts.values()]
        widest = max((one.couples for one in found), key=LEVELS.index)
        return Facts(("kind", *(name for one in found for name in one.needs)), widest)
    return FACTS.get(_unbound(objective), Facts())


def clip_width(objective: Objective) -> float | None:
    """The smaller distance from 1 at which the objective clips its ratio; None if it does not."""
    if isinstance(objective, Weighted):
        return clip_width(objective.objective)
    if isinstance(objective, ByKind):
        return clip_width(objective.parts[KINDS["token"]][0])  # steps are replayed as they were sampled
    options = inspect.signature(objective).parameters
    return min((options[name].default for name in ("low", "high") if name in options), default=None)


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float, ceiling: float | None) -> Tensor:
    """PPO's clip in log space, where a width of 1e-6 keeps its digits in float32 and no exponential overflows when A >= 0."""
    if low <= 0 or high <= 0:
        raise ValueError(f"low and high are {low} and {high}; expected positive clip widths")
    if ceiling is not None and ceiling <= 1 + high:
        raise ValueError(f"ceiling is {ceiling}; expected more than 1 + high = {1 + high}")
    floor = math.log1p(-low) if low < 1 else -math.inf
    raised = log_ratio.clamp(max=math.log1p(high))  # A >= 0 gains nothing above
    lowered = log_ratio.clamp(min=floor, max=None if ceiling is None else math.log(ceiling))  # nor A < 0 below
    return -advantages * torch.where(advantages >= 0, raised, lowered).exp()


def _trained(evaluation: Evaluation) -> Tensor:
    """(B, S) bool; everything where no mask was set."""
    return torch.ones_like(evaluation.log_ratio, dtype=torch.bool) if evaluation.mask is None else evaluation.mask


def _required(evaluation: Evaluation, name: str) -> Tensor:
    fields = evaluation.tensors()
    if name not in fields:
        raise ValueError(f"the objective needs {name!r} of every decision; the policy evaluates {sorted(fields)}")
    return fields[name]


# Aggregations: weights such that the loss is the sum of weight * loss of a decision


def seq_mean(mask: Tensor, *, keep: Tensor | None = None, total: Tensor | float | None = None) -> Tensor:
    """Mean over a sample's trained decisions, then over samples (GRPO); `total` counts samples.

    A sample that is not kept leaves the denominator; a kept one without a trained decision adds 0 and stays in it.
    """
    counted = _counted(mask, keep)
    return counted / counted.sum(1, keepdim=True).clamp(min=1) / _at_least_one(seq_mean, mask, keep, total)


def token_mean(mask: Tensor, *, keep: Tensor | None = None, total: Tensor | float | None = None) -> Tensor:
    """Mean over all trained decisions of kept samples (DAPO, arXiv 2503.14476); `total` counts decisions."""
    return _counted(mask, keep) / _at_least_one(token_mean, mask, keep, total)


def constant(mask: Tensor, *, length: int, keep: Tensor | None = None, total: Tensor | float | None = None) -> Tensor:
    """Sum over decisions / (length * samples), length the longest allowed (Dr. GRPO, arXiv 2503.20783); `total` counts samples."""
    if length < 1:
        raise ValueError(f"length is {length}; expected the largest number of decisions of a sample, from 1")
    return _counted(mask, keep) / (length * _at_least_one(constant, mask, keep, total))


def denominator(aggregation: Aggregation, mask: Tensor, keep: Tensor | None = None) -> Tensor:
    """What a part of an update adds to `total`: its trained decisions for token_mean, else its kept samples; -> () int64."""
    if _unbound(aggregation) is token_mean:
        return _counted(mask, keep).sum().long()
    return torch.tensor(len(mask), device=mask.device) if keep is None else keep.sum()


def weighted_sum(per_decision: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight * loss over the decisions whose weight is not 0; (B, S), (B, S) -> ()."""
    same_shape(per_decision=per_decision, weights=weights)
    return (torch.where(weights != 0, per_decision, 0) * weights).sum()


def _counted(mask: Tensor, keep: Tensor | None) -> Tensor:
    """1 where a decision counts, (B, S) float32."""
    require_shape("mask", mask, None, None)
    if keep is None:
        return mask.float()
    require_shape("keep", keep, len(mask))
    return (mask & keep[:, None]).float()


def _at_least_one(aggregation: Aggregation, mask: Tensor, keep: Tensor | None, total: Tensor | float | None) -> Tensor:
    count = denominator(aggregation, mask, keep) if total is None else total
    return torch.as_tensor(count, dtype=torch.float32, device=mask.device).clamp(min=1)


def _unbound(component: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function under the options bound with functools.partial."""
    return _unbound(component.func) if isinstance(component, partial) else component
