"""Answers of texts and pictures in turn, as "two red circles", a picture of them, ...: is each text right, and each picture?

Prompts name what is expected in the column `texts`, a list that pictures follow one each. Every score of a part is divided by
the number that is expected, so that its sum over an answer lies in [0, 1]; parts that are missing count 0, needless ones too.
Axes: B answers, J parts, n pictures of a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples
from rewards.shapes import WISHES, Wish, exact_match, rendering_distance, shape_reward

BY_TEXT = {wish.text: wish for wish in WISHES}
Answer = tuple[str | Tensor, ...]


def text_exact(samples: Samples) -> Tensor:
    """Of each text 1 / (texts expected) if it is the one expected in its place, else 0; NaN at pictures; (B, J)."""
    answers = answers_of(samples)
    scores = torch.full((len(samples), parts(samples)), torch.nan)
    for row, answer in enumerate(answers):
        expected = texts_of(samples.prompts[row])
        for number, place in enumerate(places(answer, str)):
            right = number < len(expected) and answer[place] == expected[number]
            scores[row, place] = right / len(expected)
    return scores


def picture_soft(samples: Samples) -> Tensor:
    """Of each picture its `soft` score of `rewards.shapes` for what was expected in its place, divided; NaN at texts; (B, J)."""
    return judged(samples, shape_reward)


def picture_exact(samples: Samples) -> Tensor:
    """The same with the `exact` score: the one to report."""
    return judged(samples, exact_match)


def picture_distance(samples: Samples) -> Tensor:
    """Mean distance of an answer's pictures to true renderings (`rewards.shapes`), which no other score sees; NaN without one; (B,)."""
    return judged(samples, rendering_distance, divided=False).nanmean(1)


def form(samples: Samples) -> Tensor:
    """1 if the answer is a text and a picture in turn, as many as expected, else 0; (B,)."""
    kinds = [[isinstance(part, str) for part in answer] for answer in answers_of(samples)]
    wanted = [[True, False] * len(texts_of(prompt)) for prompt in samples.prompts]
    return torch.tensor([found == expected for found, expected in zip(kinds, wanted, strict=True)]).float()


class Picture(NamedTuple):
    """A picture of an answer and what it should show."""

    row: int
    place: int
    image: Tensor  # (3, H, W)
    wish: Wish
    share: float


def judged(samples: Samples, measure: Callable[[Samples], Tensor], divided: bool = True) -> Tensor:
    """What a measure of `rewards.shapes` says of every picture; needless ones get 0; (B, J)."""
    scores = torch.full((len(samples), parts(samples)), torch.nan)
    found: list[Picture] = []
    for row, answer in enumerate(answers_of(samples)):
        expected = texts_of(samples.prompts[row])
        for number, place in enumerate(places(answer, Tensor)):
            image = answer[place]
            if number >= len(expected):
                scores[row, place] = 0 if divided else torch.nan
            elif isinstance(image, Tensor):
                found.append(Picture(row, place, image, BY_TEXT[expected[number]], 1 / len(expected)))
    if found:
        values = measure(pictured(found))
        for picture, value in zip(found, values.tolist(), strict=True):
            scores[picture.row, picture.place] = value * (picture.share if divided else 1)
    return scores


def pictured(found: Sequence[Picture]) -> Samples:
    """The pictures as samples of their own, as the measures of `rewards.shapes` read them."""
    prompts = tuple(Prompt(number, one.wish.text, columns=vars(one.wish)) for number, one in enumerate(found))
    ids = torch.arange(len(found))
    return Samples(Batch(prompts, ids, ids, 0, 0), image=torch.stack([one.image for one in found]))


def answers_of(samples: Samples) -> tuple[Answer, ...]:
    """The answers; raises ValueError if these samples are none of texts and pictures."""
    if samples.interleaved is None:
        raise ValueError("these rewards look at answers of texts and pictures; these samples have none")
    return samples.interleaved


def parts(samples: Samples) -> int:
    """J, as many as `part_end` has, or as the longest answer."""
    if samples.part_end is not None:
        return samples.part_end.shape[1]
    return max(len(answer) for answer in answers_of(samples))


def places(answer: Answer, kind: type) -> list[int]:
    """Where the parts of a kind are."""
    return [place for place, part in enumerate(answer) if isinstance(part, kind)]


def texts_of(prompt: Prompt) -> list[str]:
    """The texts that are expected; raises ValueError if the prompt does not name them."""
    texts = prompt.columns.get("texts")
    if not isinstance(texts, list) or not texts or not all(text in BY_TEXT for text in texts):
        raise ValueError(
            f"prompt {prompt.id} {prompt.text!r} has texts {texts!r}; expected a list of texts like 'two red circles'"
        )
    return texts
