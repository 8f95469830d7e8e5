"""Rewards made of rewards: name several, scale one, add them up with weights.

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
