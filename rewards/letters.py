"""The reward of the block demo: every letter that was asked for, once, in any order. B samples."""

from torch import Tensor

from mmgrpo.types import Prompt, Samples
from rewards.answers import score_answers, unusable


def same_letters(samples: Samples) -> Tensor:
    """1 if the text holds the target's characters, each as often as it does, in whatever order, else 0; (B,).

    White space around the text does not count; NaN without a target.
    """
    return score_answers(samples, None, wanted, lambda text, letters: float(sorted(text) == sorted(letters)))


def wanted(prompt: Prompt) -> str | None:
    """The letters that are asked for; raises ValueError if they are no text."""
    if prompt.target is None or isinstance(prompt.target, str):
        return prompt.target
    raise unusable(prompt, "a text")
