"""Rewards on how many tokens a model decides in one forward. B samples."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmgrpo.types import Reward, Samples, require_shape
from rewards.length import lengths


def tokens_per_forward(samples: Samples) -> Tensor:
    """Tokens of each text, its end included, over the forwards that it took; (B,), 0 or more, 0 without any forward.

    Source: TPF of LightningRL (arXiv 2603.13319), which counts a text's forwards as this project's block policies do: those
    that decided tokens. Below 1 it can be where tokens behind the end were decided before the end was.
    """
    if samples.forwards is None:
        raise ValueError("the samples do not say how many forwards they took; expected forwards of shape (B,)")
    require_shape("forwards", samples.forwards, len(samples))
    forwards = samples.forwards.double().cpu()
    return torch.where(forwards > 0, lengths(samples) / forwards.clamp(min=1), 0).float()


def within(samples: Samples, *, reward: Reward, limit: int, margin: int = 5) -> Tensor:
    """The reward, and 0 for texts of `limit - margin` tokens and more; a NaN of such a text stays NaN; (B,).

    Source: LightningRL (arXiv 2603.13319) counts an answer within 5 tokens of the limit as wrong. `limit` is
    policy.max_new_tokens.
    """
    if not 0 <= margin < limit:
        raise ValueError(f"limit is {limit} and margin {margin} tokens; expected 0 <= margin < limit")
    values = reward(samples)
    if isinstance(values, Mapping):
        raise ValueError(f"the reward has the components {sorted(values)}; expected a single score")
    long = lengths(samples).to(values.device) >= limit - margin
    return torch.where(long & ~values.isnan(), 0, values)
