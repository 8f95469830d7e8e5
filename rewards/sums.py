"""The reward of the block demo: an answer that adds up to the number asked for. B samples."""

import re

from torch import Tensor

from mmgrpo.types import Prompt, Samples
from rewards.answers import score_answers, unusable

SUM = re.compile(r"([0-9]{1,15})\+([0-9]{1,15})")


def adds_up(samples: Samples) -> Tensor:
    """1 for "A+B" whose numbers add up to the prompt's target, else 0; (B,) float32, NaN without a target.

    Nothing but digits and one plus sign may stand in the answer; any two numbers are right.
    """
    return score_answers(samples, None, wanted, lambda text, total: float(value(text) == total))


def wanted(prompt: Prompt) -> int | None:
    """The sum that is asked for; raises ValueError if it is no whole number."""
    if prompt.target is None or (isinstance(prompt.target, int) and not isinstance(prompt.target, bool)):
        return prompt.target
    raise unusable(prompt, "a whole number")


def value(text: str) -> int | None:
    """What a sum adds up to; None: the text is no sum of two numbers."""
    found = SUM.fullmatch(text)
    return None if found is None else int(found[1]) + int(found[2])
