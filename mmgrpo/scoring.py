"""Ask every reward for its opinion of a batch of samples."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmgrpo.types import Feedback, Reward, Samples, require_shape


@torch.no_grad()
def score(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], samples: Samples, decisions: int | None = None
) -> Feedback:
    """Every reward's scores by name; one that answers with named components adds "name.component" with its own weight.

    A reward of parts, (B, J), counts with the sum over them. Where there is one and the number of `decisions` S is given, the
    feedback also holds each part's weighted sum at its end; a reward of the whole sample is then one of its last part.
    Raises ValueError naming the reward if it does not return one finite number or NaN (no opinion) per sample or part.
    """
    scores: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    parted: dict[str, Tensor] = {}  # (B, J)
    for name, reward in rewards.items():
        answer = reward(samples)
        parts = (
            {f"{name}.{part}": value for part, value in answer.items()}
            if isinstance(answer, Mapping)
            else {name: answer}
        )
        for part, value in parts.items():
            shares[part] = weights[name]
            if value.dim() == 2 and samples.part_end is not None:
                parted[part] = checked(part, value, len(samples), samples.part_end.shape[1])
                scores[part] = torch.where(parted[part].isnan().all(1), torch.nan, parted[part].nansum(1))
            else:
                scores[part] = checked(part, value, len(samples))
    placed = None
    if parted and decisions is not None:
        assert samples.part_end is not None
        placed = at_ends(scores, shares, parted, samples.part_end, decisions)
    return Feedback(scores, shares, samples.batch.group, placed)


def at_ends(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    parted: Mapping[str, Tensor],
    ends: Tensor,
    decisions: int,
) -> Tensor:
    """The weighted sum of each part's rewards at the decision that ends it, NaN elsewhere; (B, S).

    scores (B,), those of parts (B, J), ends (B, J) int64, -1: no such part. Its sum over a row is the total reward.
    """
    there = ends >= 0  # (B, J)
    sums = torch.zeros(ends.shape)
    last = there & (there.flip(1).cumsum(1).flip(1) == 1)
    for name, values in scores.items():
        value = parted.get(name, torch.where(last, values.unsqueeze(1), 0))
        sums = sums + weights[name] * value.nan_to_num(0)
    placed = torch.full((len(ends), decisions), torch.nan)
    rows, parts = there.nonzero(as_tuple=True)
    placed[rows, ends[rows, parts]] = sums[rows, parts]
    return placed


def checked(name: str, value: Tensor, *shape: int) -> Tensor:
    """The scores as float32 on the CPU."""
    require_shape(f"reward {name!r}", value, *shape)
    value = value.detach().float().cpu()
    if value.isinf().any():
        raise ValueError(f"reward {name!r} returned {float(value[value.isinf()][0])}; expected finite scores or NaN")
    return value
