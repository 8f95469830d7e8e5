"""Weights without gradient around an objective, which leave the denominators alone; and an objective for each kind of decision.

A weight is (evaluation, advantages (B, S)) -> (B, S). A decision that weighs 0 still counts in the denominators and in the
other terms of the loss, such as the KL. Axes: B samples, S decisions.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmgrpo.facts import Component, Facts, parts, unbound
from mmgrpo.objectives import Objective, clipped
from mmgrpo.ratios import Level, decision, masked, required, sample_mean, sample_sum, trained
from mmgrpo.types import KINDS, Evaluation

Weight = Callable[[Evaluation, Tensor], Tensor]


@dataclass(frozen=True)
class Weighted:
    """An objective whose losses are multiplied by a weight without gradient."""

    objective: Objective
    weight: Weight

    def __call__(self, evaluation: Evaluation, advantages: Tensor) -> Tensor:
        return self.objective(evaluation, advantages) * self.weight(evaluation, advantages).detach()

    def inside(self) -> Sequence[Component]:
        return self.objective, self.weight


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
    whose = sample_sum if level == "sample" else decision
    return Weighted(objective, partial(sampler_weight, level=whose, cap=cap, floor=floor or 0.0, mode=mode))


def sampler_weight(
    evaluation: Evaluation, advantages: Tensor, *, level: Level, cap: float, floor: float, mode: str
) -> Tensor:
    """exp of the sampler's gap, of one decision or of a sample's sum, limited to [floor, cap] or 0 outside; (B, S)."""
    gap = Evaluation(required(evaluation, "sampler_gap"), mask=evaluation.mask)
    weight = level(gap).exp()
    if mode == "truncate":
        return weight.clamp(floor, cap)
    return torch.where((weight >= floor) & (weight <= cap), weight, 0)


def top_entropy(*, objective: Objective = clipped, share: float = 0.2) -> Weighted:
    """An objective on the decisions of highest entropy alone (arXiv 2506.01939): the top `share` of an update's decisions.

    The others weigh 0 and stay in the denominators.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number in [0, 1]")
    return Weighted(objective, partial(in_top_share, share=share))


def in_top_share(evaluation: Evaluation, advantages: Tensor, *, share: float) -> Tensor:
    """1 where the entropy reaches the (1 - share) quantile of all trained decisions, linearly interpolated; (B, S)."""
    entropy, there = required(evaluation, "entropy").detach(), trained(evaluation)
    if not there.any():
        return torch.zeros_like(entropy)
    ordered = entropy[there].sort().values  # torch.quantile refuses more than 2^24 values
    place = (1 - share) * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return (there & (entropy >= torch.lerp(low, high, place - math.floor(place)))).to(entropy.dtype)


def without_stale(*, objective: Objective = clipped, limit: float = 0.5, level: Level = sample_mean) -> Weighted:
    """An objective without the bad samples that the policy has left (off-policy sequence mask, DeepSeek-V3.2, arXiv 2512.02556).

    A sample with A < 0 weighs 0 where the mean of log pi_old - log pi over its decisions is above `limit`, nats; its value is
    not published. With the level `sample_mean_from_sampler` the sampler's own deviation counts as well.
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}; expected nats from 0")
    return Weighted(objective, partial(not_left, limit=limit, level=level))


def not_left(evaluation: Evaluation, advantages: Tensor, *, limit: float, level: Level) -> Tensor:
    """1 where A >= 0 or the log-ratio at the level is at least -limit, else 0; (B, S)."""
    return ((advantages >= 0) | (level(evaluation).detach() >= -limit)).to(advantages.dtype)


def selection(objective: Component) -> Weight | None:
    """The choice of decisions by their entropy in an objective, which an entropy bonus is then limited to; None without one."""
    if unbound(objective) is in_top_share:
        return objective
    return next((found for part in parts(objective) if (found := selection(part)) is not None), None)


@dataclass(frozen=True)
class ByKind:
    """An objective for each kind of decision, and its weight."""

    by_number: Mapping[int, tuple[Objective, float]]  # number in KINDS -> objective, weight

    def __call__(self, evaluation: Evaluation, advantages: Tensor) -> Tensor:
        kind, there = required(evaluation, "kind"), trained(evaluation)
        for name, number in KINDS.items():
            if number not in self.by_number and (there & (kind == number)).any():
                raise ValueError(f"by_kind has no objective for decisions of kind {name!r}; expected objective.{name}")
        losses = [
            weight * torch.where(kind == number, objective(masked(evaluation, there & (kind == number)), advantages), 0)
            for number, (objective, weight) in self.by_number.items()
        ]
        return torch.stack(losses).sum(0)

    def inside(self) -> Sequence[Component]:
        return [objective for objective, _ in self.by_number.values()]


def by_kind(
    *,
    step: Objective = clipped,
    token: Objective = clipped,
    draw: Objective | None = None,
    step_weight: float = 1.0,
    token_weight: float = 1.0,
    draw_weight: float = 1.0,
) -> ByKind:
    """Denoising steps, tokens and draws of one trajectory, each with its own objective (clip widths differ by 1e3) and weight.

    `draw` is named where there are draws: its fields are then asked of the policy.
    """
    both = {KINDS["step"]: (step, step_weight), KINDS["token"]: (token, token_weight)}
    return ByKind(both if draw is None else {**both, KINDS["draw"]: (draw, draw_weight)})


class Clip(NamedTuple):
    """Where an objective clips."""

    width: float  # distance of the ratio from 1
    level: Level  # whose ratio


def narrowest(objective: Component) -> Clip | None:
    """The narrowest clip of an objective; None if it does not clip."""
    if isinstance(objective, ByKind):
        return narrowest(objective.by_number[KINDS["token"]][0])  # steps are replayed as they were sampled
    own = [] if isinstance(objective, Weighted) else _clips(objective)
    inner = [found for part in parts(objective) if (found := narrowest(part)) is not None]
    return min([*own, *inner], key=attrgetter("width"), default=None)


def _clips(component: Component) -> list[Clip]:
    """What the options of a function say; those of another level are named after it."""
    options = {name: item.default for name, item in inspect.signature(component).parameters.items()}
    own = [Clip(options[name], options.get("level", decision)) for name in ("low", "high") if name in options]
    return own + [Clip(options[name], sample_mean) for name in ("sample_low", "sample_high") if name in options]


FACTS: Mapping[Component, Facts] = {
    ByKind: Facts(("kind",)),
    sampler_weight: Facts(("sampler_gap",)),
    in_top_share: Facts(("entropy",), "batch", every=True),
}
