"""Answers of texts and images taught token by token: the next-token loss over all of an answer's tokens.

The loss is that of the whole vocabulary, marks of images and ends included, so that the model also writes them by itself;
prompts are not learnt. Axes: B rows, b of a batch, T tokens of its longest answer, L tokens of an image.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmgrpo.types import KINDS, Batch, Lesson, Prompt, Trajectory
from pipelines import answer_parts
from pipelines.answers import Answers
from pipelines.picture_tokens import Pictures
from pipelines.sampling import Sampling


class Lessons:
    """Reads answers from the data and says how likely a model finds them."""

    def __init__(self, answers: Answers, pictures: Pictures, folder: Path, text: float, image: float) -> None:
        if min(text, image) < 0 or text + image == 0:
            raise ValueError(
                f"teaching.text is {text} and teaching.image {image}; expected weights from 0, one above 0"
            )
        self.answers, self.pictures, self.folder = answers, pictures, folder
        self.weight = torch.tensor([text, image])
        self.codes: dict[Path, Tensor] = {}  # of images seen so far, (R C,) each

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
        found = [self.tokens(prompt) for prompt in batch.prompts]
        token, image = (pad_sequence(list(part), batch_first=True) for part in zip(*found, strict=True))
        length = torch.tensor([len(tokens) for tokens, _ in found])
        mask = torch.arange(token.shape[1]) < length.unsqueeze(1)
        record = {"token": token, "length": length}
        return Trajectory(batch, mask, torch.full_like(token, KINDS["token"]), record), image

    def tokens(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """The tokens of a prompt's answer, its end included, and which are an image's; (T,) int64 and bool."""
        parts = [self._part(part) for part in answer_parts.parts_of(prompt, self.folder)]
        whole = torch.cat([*(tokens for tokens, _ in parts), self.answers.end.tokens[:1].cpu()])
        image = torch.cat([*(torch.full(tokens.shape, seen) for tokens, seen in parts), torch.tensor([False])])
        return whole, image

    def _part(self, part: str | Path) -> tuple[Tensor, bool]:
        if isinstance(part, str):
            words = self.answers.reader.tokenizer(part, add_special_tokens=False)["input_ids"]
            return torch.tensor(words, dtype=torch.int64), False
        if part not in self.codes:
            self.codes[part] = self.pictures.read(part)
        return self.pictures.layout.filled(self.codes[part].unsqueeze(0))[0], True
