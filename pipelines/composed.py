"""The parts of an answer of texts and images, from its tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipelines.picture_tokens import Layout


class Span(NamedTuple):
    """A part of an answer."""

    start: int  # its first token
    end: int  # the decision with which it ends: a text's last token, an image's last code
    text: str | None  # None: it is an image


def spans(token: Sequence[int], layout: Layout, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The parts of one answer in order. A text of white space alone is none, but an answer without any part is one empty text.

    What chooses to begin an image belongs to that image, what chooses to end the answer to the last part.
    """
    found: list[Span] = []
    start = 0
    for place in [*(place for place, number in enumerate(token) if number == layout.begin), len(token)]:
        words = tokenizer.decode(token[start:place], skip_special_tokens=True).strip()
        if words:
            found.append(Span(start, place - 1, words))
        if place < len(token):
            found.append(Span(place, place + layout.last, None))
            start = place + len(layout.pattern)
    chosen = len(token) - 1
    if found and found[-1].text is None and start == len(token):
        chosen = found[-1].end  # cut off behind an image: what follows its last code was no choice
    return [*found[:-1], found[-1]._replace(end=chosen)] if found else [Span(0, chosen, "")]
