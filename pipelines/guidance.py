"""Classifier-free guidance of the images in an answer: a code's logits are s with + (1 - s) without, s the guidance.

`with` is the model after the prompt and the answer so far; `without` is the model after the negative prompt and the image
so far: neither the prompt nor the answer's texts. The last layer is linear, so hidden states are mixed instead of logits.
Axes: B answers, b of a batch, T tokens, n images, L tokens of one, D features.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipelines import prefix
from pipelines.composing import Composer
from pipelines.prefix import Prefix
from pipelines.vocabularies import Grammar


def mixed(inside: Tensor, without: Tensor, scale: float) -> Tensor:
    """Hidden states (..., D) whose logits are the guided ones."""
    return (without.float() + scale * (inside.float() - without.float())).to(inside.dtype)


class Guide:
    """Follows the rows of a rollout and reads their images, each after the negative prompt alone.

    Rows are in images at different times, so each reads whatever the step brings and sees only what belongs to its image.
    """

    def __init__(self, model: PreTrainedModel, negative: Prefix, composer: Composer, rows: int) -> None:
        self.model, self.composer = model, composer
        self.start = negative.inputs["attention_mask"].shape[1]  # tokens of the negative prompt
        place = torch.zeros(rows, dtype=torch.int64, device=negative.last.device)
        self.prompt = prefix.with_room(negative, place, composer.left)
        self.seen = torch.zeros(rows, 0, dtype=torch.bool, device=place.device)  # columns of a row's present image

    def keep(self, rows: Tensor, left: int) -> None:
        """Go on with these rows of the batch."""
        self.prompt, self.seen = prefix.with_room(self.prompt, rows, left), self.seen[rows]

    def guided(self, hidden: Tensor, token: Tensor, going: Tensor) -> Tensor:
        """The states that predict the next tokens, guided inside images; hidden (b, D), token and going (b,) -> (b, D)."""
        place = torch.zeros_like(token)
        place[going] = self.composer.place[self.composer.alive]
        inside = (place > 0).unsqueeze(1)
        if not inside.any():
            return hidden
        without = self._read(token, place, inside)
        return torch.where(inside, mixed(hidden, without, self.composer.grammar.guidance), hidden)

    def _read(self, token: Tensor, place: Tensor, inside: Tensor) -> Tensor:
        self.seen = self.seen & (place > 1).unsqueeze(1)  # at its begin an image has no past
        inputs = dict(self.prompt.inputs)
        mask, positions = inputs["attention_mask"].clone(), inputs["position_ids"].clone()
        mask[:, self.start :] = self.seen.to(mask)
        positions[:, -1] = self.start + place.clamp(min=1) - 2  # one before the position of this token
        longer = replace(self.prompt, inputs=inputs | {"attention_mask": mask, "position_ids": positions})
        hidden, self.prompt = prefix.read_on(self.model, longer, token.unsqueeze(1))
        self.seen = torch.cat([self.seen, inside], dim=1)
        return hidden[:, -1]


def replayed(
    model: PreTrainedModel, known: Grammar, negative: Prefix, hidden: Tensor, token: Tensor, length: Tensor
) -> Tensor:
    """The states of a replay, guided inside images; hidden (b, T, D), token (b, T), length (b,) -> (b, T, D)."""
    rows, begins = places(known, token, length)
    if len(rows) == 0:
        return hidden
    reach = torch.arange(known.layout.last, device=token.device)  # the token before the last code is the last one read
    columns = begins.unsqueeze(1) + reach  # (n, L')
    repeated = prefix.repeat(negative, torch.zeros_like(rows))
    without, _ = prefix.read_on(model, repeated, token[rows.unsqueeze(1), columns])  # (n, L', D), of the next tokens
    where = (rows.unsqueeze(1).expand_as(columns), columns + 1)
    return hidden.index_put(where, mixed(hidden[where], without, known.guidance))


def places(known: Grammar, token: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the first token of every image; token (b, T), length (b,) -> (n,) int64 each."""
    there = torch.arange(token.shape[1], device=token.device) < length.to(token.device).unsqueeze(1)
    rows, begins = ((token == known.layout.begin) & there).nonzero(as_tuple=True)
    return rows, begins
