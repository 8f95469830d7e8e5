"""Rewards on the length of a text and on its repetitions. B samples; lengths are tokens, the end token included."""

from typing import Literal

import torch
from torch import Tensor

from mmgrpo.types import Samples, require_shape
from rewards.answers import texts


def lengths(samples: Samples) -> Tensor:
    """Tokens of each text, (B,) float64; raises ValueError if the samples do not say."""
    if samples.length is None:
        raise ValueError("the samples do not say how long their texts are; expected length of shape (B,), tokens")
    require_shape("length", samples.length, len(samples))
    return samples.length.double().cpu()


def overlong(samples: Samples, *, limit: int = 20480, cache: int = 4096) -> Tensor:
    """0 up to `limit - cache` tokens, then falling linearly to -1 at `limit`, and -1 above; in [-1, 0], (B,).

    Source: soft overlong punishment of DAPO (arXiv 2503.14476), whose numbers are the defaults.
    """
    if not 0 < cache <= limit:
        raise ValueError(f"limit is {limit} and cache {cache} tokens; expected 0 < cache <= limit")
    return ((limit - cache - lengths(samples)) / cache).clamp(-1, 0).float()


def envelope(samples: Samples, *, least: int, low: int, high: int, most: int) -> Tensor:
    """1 from `low` to `high` tokens, falling linearly to 0 at `least` and at `most`, 0 beyond; in [0, 1], (B,).

    Source: the length reward of OpenVLThinkerV2 (arXiv 2604.08539), which publishes no values: choose them per task.
    """
    if not 0 <= least < low <= high < most:
        raise ValueError(
            f"least, low, high, most are {least}, {low}, {high}, {most} tokens; expected an increasing order"
        )
    count = lengths(samples)
    inside = torch.minimum((count - least) / (low - least), (most - count) / (most - high))
    return inside.clamp(0, 1).float()


def length_penalty(samples: Samples, *, wanted: int, rate: float = 0.0003, shorter: bool = False) -> Tensor:
    """-rate x the tokens above `wanted`, or with `shorter` those above or below it; at most 0, unbounded below, (B,).

    Source: with `shorter` the length term of LCPO-Exact in L1 (arXiv 2503.04697), whose rate is the default.
    """
    if wanted < 0 or not 0 <= rate < float("inf"):
        raise ValueError(f"wanted is {wanted} tokens and rate {rate} per token; expected finite numbers of at least 0")
    excess = lengths(samples) - wanted
    return (-rate * (excess.abs() if shorter else excess.clamp(min=0))).float()


def repeated(text: str, size: int, unit: Literal["word", "character"]) -> float:
    """Share of the n-grams of `size` units that stood before in the text; in [0, 1), 0 for a text without any."""
    units = text.lower().split() if unit == "word" else text
    total = len(units) - size + 1
    if total < 1:
        return 0.0
    seen = {tuple(units[start : start + size]) for start in range(total)}
    return 1 - len(seen) / total


def repetition_penalty(
    samples: Samples, *, size: int = 3, most: float = 1.0, unit: Literal["word", "character"] = "word"
) -> Tensor:
    """-most x the share of repeated n-grams of `size` words, or characters where words have no blanks; (B,).

    In (-most, 0]. Words end at white space, without case. Source: the n-gram penalty of Demystifying Long
    Chain-of-Thought (arXiv 2502.03373, appendix C.2) in the form that Open-R1 uses, over the whole text.
    """
    if size < 1 or not 0 <= most < float("inf"):
        raise ValueError(f"size is {size} and most {most}; expected size >= 1 and a finite number of at least 0")
    return torch.tensor([0.0 - most * repeated(text, size, unit) for text in texts(samples)], dtype=torch.float32)
