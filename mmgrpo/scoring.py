"""Ask every reward for its opinion of a batch of samples."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmgrpo.types import Feedback, Reward, Samples, require_shape


@torch.no_grad()
def score(rewards: Mapping[str, Reward], weights: Mapping[str, float], samples: Samples) -> Feedback:
    """Every reward's scores by name; one that answers with named components adds "name.component" with its own weight.

    Raises ValueError naming the reward if it does not return one finite number or NaN (no opinion) per sample.
    """
    scores: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for name, reward in rewards.items():
        answer = reward(samples)
        parts = (
            {f"{name}.{part}": value for part, value in answer.items()}
            if isinstance(answer, Mapping)
            else {name: answer}
        )
        for part, value in parts.items():
            scores[part] = checked(part, value, len(samples))
            shares[part] = weights[name]
    return Feedback(scores, shares, samples.batch.group)


def checked(name: str, value: Tensor, count: int) -> Tensor:
    """The scores as float32 on the CPU."""
    require_shape(f"reward {name!r}", value, count)
    value = value.detach().float().cpu()
    if value.isinf().any():
        raise ValueError(f"reward {name!r} returned {float(value[value.isinf()][0])}; expected finite scores or NaN")
    return value
