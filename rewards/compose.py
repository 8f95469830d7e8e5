"""Rewards made of rewards: name several, scale one, add them up with weights, let one count only where others are reached.

The functions are per sample and keep the order of the samples. B samples, K components.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmgrpo.types import Reward, Samples, require_shape


def components(name: str, values: Tensor | Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """What a reward returned, by name: "name", or "name/part" for each named part; (B,) each, else ValueError."""
    parts = (
        {name: values} if isinstance(values, Tensor) else {f"{name}/{part}": value for part, value in values.items()}
    )
    for part, value in parts.items():
        require_shape(f"reward {part!r}", value, size)
    return parts


def named(rewards: Mapping[str, Reward]) -> Reward:
    """One reward that reports several side by side, "name" or "name/part" each; range, failures (NaN): theirs."""

    def score(samples: Samples) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, reward in rewards.items():
            found |= components(name, reward(samples), len(samples))
        return found

    return score


def scale(reward: Reward, by: float) -> Reward:
    """The reward, or each of its named components, times a finite factor; NaN stays NaN; `by` = 1 changes nothing."""
    if not abs(by) < float("inf"):
        raise ValueError(f"by is {by}; expected a finite factor")

    def score(samples: Samples) -> Tensor | Mapping[str, Tensor]:
        values = reward(samples)
        return values * by if isinstance(values, Tensor) else {name: value * by for name, value in values.items()}

    return score


def weighted(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], *, require_all: bool = False
) -> Callable[[Samples], Tensor]:
    """sum_k w_k r_k over the components that have an opinion, NaN where none has; the sum of `Feedback.total`.

    A missing component adds 0, which within a group favours or harms the sample it is missing from; with `require_all`
    one missing component makes the sum NaN. Components of weight 0 count in neither. Weights are keyed as in `named`;
    raises ValueError when names and weights do not match.
    """
    trained = {name: weight for name, weight in weights.items() if weight != 0}
    if not trained:
        raise ValueError(f"weights are {dict(weights)}; expected at least one that is not 0")
    every = named(rewards)

    def score(samples: Samples) -> Tensor:
        found = every(samples)
        assert not isinstance(found, Tensor)
        if found.keys() != weights.keys():
            raise ValueError(f"weights name {sorted(weights)}; expected the components {sorted(found)}")
        matrix = torch.stack([found[name] * weight for name, weight in trained.items()], dim=1)  # (B, K)
        missing = matrix.isnan()
        silent = missing.any(1) if require_all else missing.all(1)
        return torch.where(silent, torch.nan, matrix.nansum(1))

    return score


def guarded(
    *, quality: Reward, guards: Mapping[str, Reward], least: Mapping[str, float], floor: float | None = None
) -> Reward:
    """The quality, but `floor` (left out: NaN) where a guard's score is below its `least`; range and shape: the quality's.

    Measures of the quality of speech hear that it is clean, not that it says anything: a policy trained on one learns fluent
    babble, so a recording gets its quality only if it can be understood. With floor 0 it is GDPO's conditioned reward
    (arXiv 2601.05242): an easy one counts where the hard one is reached; that form's threshold is RECONSTRUCTED. A gate of
    a multi-label safety reward (arXiv 2503.21819) is the same. A floor teaches to avoid it; NaN only takes the sample out of
    the group. A guard without an opinion gives NaN.
    """
    if not guards or guards.keys() != least.keys():
        raise ValueError(f"least names {sorted(least)}; expected the guards {sorted(guards)}, at least one")
    otherwise = torch.nan if floor is None else floor

    def score(samples: Samples) -> Tensor | Mapping[str, Tensor]:
        values = quality(samples)
        fine, unknown = passed(samples, guards, least)

        def held(value: Tensor) -> Tensor:
            kept = torch.where(fine.to(value.device) | value.isnan(), value, otherwise)
            return torch.where(unknown.to(value.device), torch.nan, kept)

        return held(values) if isinstance(values, Tensor) else {name: held(value) for name, value in values.items()}

    return score


def corrected(*, reward: Reward, quality: Reward, middle: float = 3.0, shift: float = 0.2) -> Reward:
    """reward * (quality - middle) + shift: GDRO's corrected score (arXiv 2601.02036), a monitor of reward hacking.

    It falls where a reward rises at the cost of quality, so it is for weight 0. The quality is the mean of its components; the
    source's is UnifiedReward's alignment, coherence and style, about 1 to 5. Shape: the reward's. NaN where either has no
    opinion.
    """

    def score(samples: Samples) -> Tensor | Mapping[str, Tensor]:
        values = reward(samples)
        rated = torch.stack(list(components("quality", quality(samples), len(samples)).values())).mean(0)

        def held(value: Tensor) -> Tensor:
            return value * (rated.to(value) - middle) + shift

        return held(values) if isinstance(values, Tensor) else {name: held(value) for name, value in values.items()}

    return score


def passed(samples: Samples, guards: Mapping[str, Reward], least: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Whether every guard is content, and whether one has no opinion; (B,) bool each."""
    found = {name: components(name, reward(samples), len(samples)) for name, reward in guards.items()}
    several = [name for name, parts in found.items() if len(parts) != 1]
    if several:
        raise ValueError(f"the guard {several[0]!r} has {len(found[several[0]])} components; expected 1")
    scores = {name: next(iter(parts.values())).cpu() for name, parts in found.items()}
    fine = torch.stack([score >= least[name] for name, score in scores.items()]).all(0)
    return fine, torch.stack([score.isnan() for score in scores.values()]).any(0)
