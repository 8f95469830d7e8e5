"""What a text answers, what was asked for, and the walk over a batch that the rewards of text share. B samples."""

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mmgrpo.types import Prompt, Samples

T = TypeVar("T")
FREE = r"(?<![A-Za-z0-9_.])"  # what stands before a number: the 2 of x2 is none
SIGN, POWER = r"(?:(?<![\w.)\]])[-+])?", r"(?:[eE][-+]?\d++)?"  # the - of 1-4 is no sign
NUMBER = rf"{FREE}{SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})++(?!\d)|\d++)(?:\.\d++)?|\.\d++){POWER}"  # -1,234.5, .5, 2e-3
LONGEST = 400  # characters of a number; more have no float64


def texts(samples: Samples) -> tuple[str, ...]:
    """The texts of the samples, B; raises ValueError if they have none."""
    if samples.text is None:
        raise ValueError("the samples carry no text; expected one text for each")
    return samples.text


def tags(text: str, names: tuple[str, ...]) -> list[re.Match[str]]:
    """Every <name> and </name> in a text, in order; raises ValueError for a name that is no plain word."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z][\w:.-]*", name):
            raise ValueError(f"the tag {name!r} arrived; expected a word such as 'answer', without brackets")
    return list(re.finditer(f"</?(?:{'|'.join(map(re.escape, names))})>", text))


def answer(text: str, tag: str | None) -> str | None:
    """What stands between the last <tag> and </tag> that no further one of the two parts; None: there is no such pair.

    Of nested pairs that is the innermost of the last; an unclosed tag opens nothing. Without a tag it is the whole text.
    White space around it does not count, the tag's case does.
    """
    if tag is None:
        return text.strip()
    marks = tags(text, (tag,))
    for opening, closing in zip(marks[-2::-1], marks[:0:-1], strict=True):  # from the end
        if opening[0] == f"<{tag}>" and closing[0] == f"</{tag}>":
            return text[opening.end() : closing.start()].strip()
    return None


def score_answers(
    samples: Samples, tag: str | None, wanted: Callable[[Prompt], T | None], score: Callable[[str, T], float]
) -> Tensor:
    """score(answer, target) of each sample; (B,) float32, 0 without an answer in `tag`, NaN without a target."""
    values = torch.full((len(samples),), torch.nan)
    for row, (text, prompt) in enumerate(zip(texts(samples), samples.prompts, strict=True)):
        target = wanted(prompt)
        if target is not None:
            found = answer(text, tag)
            values[row] = 0.0 if found is None else score(found, target)
    return values


def unusable(prompt: Prompt, expected: str) -> ValueError:
    """The error of a target that a reward cannot compare with."""
    shown = repr(prompt.target)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(
        f"prompt {prompt.id} has the target {shown} of type {type(prompt.target).__name__}; expected {expected}"
    )


def accepted(prompt: Prompt) -> tuple[str, ...] | None:
    """The target as the texts that are right, one or several; None: no target; raises ValueError for another type."""
    if prompt.target is None:
        return None
    several = prompt.target if isinstance(prompt.target, list | tuple) else [prompt.target]
    if not several or any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in several):
        raise unusable(prompt, "a text, a number, or a list of them")
    return tuple(str(item).strip() for item in several)


def to_number(text: str) -> float | None:
    """What `NUMBER` matched as a finite float64, else None."""
    value = float(text.replace(",", "")) if len(text) <= LONGEST else float("inf")
    return value if abs(value) < float("inf") else None
