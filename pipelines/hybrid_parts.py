"""Answers as rewards see them: texts and images, each with the decision that ends it. Axes: B samples, J images at most."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmgrpo.types import Batch, Samples
from pipelines.hybrid_layout import Room
from pipelines.hybrid_writing import Written

Parts = list[tuple[str | Tensor, int]]  # each with the column of the decision that ends it


def samples_of(
    batch: Batch, written: Written, images: Tensor, room: Room, tokenizer: PreTrainedTokenizerBase
) -> Samples:
    """Texts that are not empty and images; images (B, J, 3, h, w) in [0, 1]."""
    shape = written.answers.shape
    found = []
    for row, token in enumerate(written.answers.token):
        length, count = shape.length[row].tolist(), int(shape.drawn[row].sum())
        ids = [own[:size] for own, size in zip(token.tolist(), length, strict=True)]
        found.append(parts_of(ids, list(images[row, :count]), room, tokenizer))
    most = 2 * room.images + 1
    ends = torch.tensor([[*(end for _, end in row), *[-1] * (most - len(row))] for row in found])
    parts = tuple(tuple(part for part, _ in row) for row in found)
    texts = tuple(" ".join(part for part in row if isinstance(part, str)) for row in parts)
    return Samples(batch, text=texts, interleaved=parts, part_end=ends, finished=written.finished)


def parts_of(ids: list[list[int]], images: list[Tensor], room: Room, tokenizer: PreTrainedTokenizerBase) -> Parts:
    """The parts of one answer, from the tokens of its texts and its images.

    The token that asks for an image belongs to the image, the end of the answer to the last part. White space is no part; an
    answer of nothing is one empty text.
    """
    columns, drawn = room.tokens_decided().tolist(), room.images_decided()[:, -1].tolist()
    found: Parts = []
    last = 0
    for number, text in enumerate(ids):
        asks = number < len(images)
        words = tokenizer.decode(text[: len(text) - asks], skip_special_tokens=True).strip()
        if words:
            found.append((words, columns[number][len(text) - asks - 1]))
        if asks:
            found.append((images[number], drawn[number]))
        last = columns[number][len(text) - 1] if text else last
    *others, (part, end) = found or [("", last)]
    return [*others, (part, max(last, end))]
