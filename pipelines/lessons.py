"""Answers of texts and images taught token by token: the next-token loss over all of an answer's tokens.

The loss is that of the whole vocabulary, marks of images and ends included, so that the model also writes them by itself;
prompts are not learnt. Axes: B rows, b of a batch, T tokens of its longest answer, L tokens of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmgrpo import seeds
from mmgrpo.types import KINDS, Batch, Lesson, Trajectory
from pipelines import answer_parts
from pipelines.answers import Answers
from pipelines.picture_tokens import Pictures
from pipelines.sampling import Sampling

REMEMBERED = 2**16  # images whose codes are kept
Parts = list[list[str | Path]]  # of each row's answer


@dataclass(frozen=True)
class Teaching:
    """How answers of texts and images are taught."""

    folder: Path = Path()  # what paths of images in answers are relative to
    text: float = 1.0  # weight of a text's token in the loss
    image: float = 1.0  # of an image's
    unasked: float = 0.0  # share of answers of which one image alone is taught, after the negative prompt, for guidance

    def __post_init__(self) -> None:
        if min(self.text, self.image) < 0 or self.text + self.image == 0:
            raise ValueError(
                f"teaching.text is {self.text} and teaching.image {self.image}; expected weights from 0, one above 0"
            )
        if not 0 <= self.unasked <= 1:
            raise ValueError(f"teaching.unasked is {self.unasked}; expected a share from 0 to 1")


class Lessons:
    """Reads answers from the data and says how likely a model finds them."""

    def __init__(self, answers: Answers, pictures: Pictures, teaching: Teaching) -> None:
        self.answers, self.pictures, self.teaching = answers, pictures, teaching
        self.weight = torch.tensor([teaching.text, teaching.image])
        self.codes = lru_cache(REMEMBERED)(pictures.read)  # of an image's file, (R C,)

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """The weighted mean of -log p over the tokens of each row's answer, nats; (b,) of a batch at a time."""
        plain = Answers(self.answers.model, self.answers.reader, Sampling(1), self.answers.options)
        plain.shared, plain.head_form = self.answers.shared, self.answers.head_form
        taught, image = self.read(batch)
        weight = self.weight[image.long()] * taught.mask  # (B, T)
        for rows in plain.batches(taught):
            surprise = -plain.read(taught.take(rows)).log_prob
            share = weight[rows, : surprise.shape[1]].to(surprise)
            consume(rows, (share * surprise).sum(1) / share.sum(1).clamp(min=torch.finfo(share.dtype).tiny))

    def read(self, batch: Batch) -> tuple[Trajectory, Tensor]:
        """The answers as decisions that were taken, and which of their tokens are an image's; (B, T) bool."""
        parts = [list(answer_parts.parts_of(prompt, self.teaching.folder)) for prompt in batch.prompts]
        batch, parts = self._some_unasked(batch, parts)
        found = [self.tokens(listed) for listed in parts]
        token, image = (pad_sequence(list(part), batch_first=True) for part in zip(*found, strict=True))
        length = torch.tensor([len(tokens) for tokens, _ in found])
        mask = torch.arange(token.shape[1]) < length.unsqueeze(1)
        record = {"token": token, "length": length}
        return Trajectory(batch, mask, torch.full_like(token, KINDS["token"]), record), image

    def _some_unasked(self, batch: Batch, parts: Parts) -> tuple[Batch, Parts]:
        """For a share of the rows with images: the negative prompt, in a group of its own, and one of the images."""
        prompts, group, kept = list(batch.prompts), batch.group.clone(), list(parts)
        for row, sample in enumerate(batch.sample.tolist()):
            images = [part for part in parts[row] if isinstance(part, Path)]
            generator = torch.Generator().manual_seed(seeds.derive(batch.seed, "unasked", sample))
            share, which = torch.rand(2, generator=generator).tolist()
            if images and share < self.teaching.unasked:
                prompts[row], kept[row] = self.answers.negative, [images[int(which * len(images))]]
                group[row] = -1 - row
        return replace(batch, prompts=tuple(prompts), group=group), kept

    def tokens(self, parts: Sequence[str | Path]) -> tuple[Tensor, Tensor]:
        """The tokens of an answer, its end included, and which are an image's; (T,) int64 and bool."""
        read = [self._part(part) for part in parts]
        whole = torch.cat([*(tokens for tokens, _ in read), self.answers.end.tokens[:1].cpu()])
        image = torch.cat([*(torch.full(tokens.shape, seen) for tokens, seen in read), torch.tensor([False])])
        return whole, image

    def _part(self, part: str | Path) -> tuple[Tensor, bool]:
        if isinstance(part, str):
            words = self.answers.reader.tokenizer(part, add_special_tokens=False)["input_ids"]
            return torch.tensor(words, dtype=torch.int64), False
        return self.pictures.layout.filled(self.codes(part).unsqueeze(0))[0], True
