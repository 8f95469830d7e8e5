"""Texts in blocks of tokens that are filled in together: where blocks lie, and who sees whom.

A text is divided from its first token on, prompt included, into blocks of equal size; the last one may be shorter. A clean
block sees itself and all blocks before it; a masked copy of a block sees itself and the clean blocks before its own (BD3-LM,
arXiv 2503.09573, section 3.1 and its single mask for clean and noisy halves; SDAR, arXiv 2510.06303). So one forward reads any
number of copies of any blocks, and each as if it had been alone. A token is predicted at its own place, not at the one before.
Axes: b texts, n slots that are read at once, k slots that are attended to, D features, N canvas slots, S tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, PreTrainedModel

from pipelines import prefix

CLEAN, NOBODY = 0, -1  # kinds of copies: the text itself, padding; from 1 on masked copies


@dataclass(frozen=True)
class Slots:
    """Places that the model reads; (b, n) int64 each."""

    token: Tensor
    position: Tensor  # in the text, from 0
    block: Tensor  # of the text, from 0
    copy: Tensor  # CLEAN, NOBODY, or the number of a masked copy of a block

    def take(self, rows: Tensor) -> "Slots":
        return Slots(*(getattr(self, item.name)[rows] for item in fields(self)))


class Known(NamedTuple):
    """What the model remembers."""

    cache: Cache  # changed in place by whoever reads on
    slots: Slots  # that it holds


def beside(parts: Sequence[Slots]) -> Slots:
    """Slots one after the other."""
    return Slots(*(torch.cat([getattr(part, item.name) for part in parts], dim=1) for item in fields(Slots)))


def nothing(rows: int, device: torch.device) -> Slots:
    """No slots at all, for each of the rows."""
    return Slots(*(torch.zeros(rows, 0, dtype=torch.int64, device=device) for _ in fields(Slots)))


def sees(query: Slots, key: Slots) -> Tensor:
    """Whether a slot attends to another: the same copy of its block, and what is clean before it; -> (b, n, k) bool."""
    block, other = query.block.unsqueeze(2), key.block.unsqueeze(1)
    own = (query.copy.unsqueeze(2) == key.copy.unsqueeze(1)) & (block == other)
    return own | ((key.copy == CLEAN).unsqueeze(1) & (other < block))


def read(model: PreTrainedModel, slots: Slots, known: Known, dtype: torch.dtype) -> Tensor:
    """States from which the tokens at the slots themselves are predicted; (b, n, D). The slots join what is known.

    The mask is additive, (b, 1, n, k), which attention implementations "sdpa" and "eager" take as it is.
    """
    seen = sees(slots, beside([known.slots, slots]))
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    inputs = {"input_ids": slots.token, "position_ids": slots.position, "attention_mask": mask.unsqueeze(1)}
    return prefix.hidden_states(model, inputs | {"past_key_values": known.cache, "use_cache": True})


def heads(prompts: Sequence[Tensor], size: int) -> Slots:
    """The whole blocks of each prompt (L,), padded on the left to the longest."""
    tokens = [prompt[: len(prompt) // size * size] for prompt in prompts]
    token = pad_sequence(tokens, batch_first=True, padding_side="left")
    there = pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True, padding_side="left").bool()
    position = (there.cumsum(1) - 1).clamp(min=0)
    return slots_of(token, position, size, there)


def slots_of(token: Tensor, position: Tensor, size: int, there: Tensor, copy: Tensor | int = CLEAN) -> Slots:
    """Slots in blocks of `size`, (b, n) each; nobody where `there` is False."""
    return Slots(token, position, torch.where(there, position // size, NOBODY), torch.where(there, copy, NOBODY))


def encode(model: PreTrainedModel, slots: Slots, dtype: torch.dtype) -> Known:
    """Read the whole blocks of prompts."""
    known = Known(DynamicCache(), nothing(len(slots.token), slots.token.device))
    if slots.token.shape[1]:
        read(model, slots, known, dtype)
    return known._replace(slots=slots)


def repeated(known: Known, rows: Tensor) -> Known:
    """The remembered rows named by `rows` (b,) int64, any of them any number of times; the cache is changed in place."""
    if known.slots.token.shape[1]:
        known.cache.batch_select_indices(rows)
    return known._replace(slots=known.slots.take(rows))


def with_room(known: Known, rows: Tensor, room: int) -> Known:
    """`repeated` for reading on without gradient; the cache is another one, with room for further tokens."""
    return Known(prefix.cache_with_room(known.cache, rows, room), known.slots.take(rows))


@dataclass(frozen=True)
class Canvas:
    """Answers in the blocks of their texts, from the one in which the prompt ends; (b, N) each, N a multiple of the size."""

    size: int  # tokens of a block
    token: Tensor  # int64: the prompt's last tokens, then the answer's; anything elsewhere
    position: Tensor  # int64, in the text
    there: Tensor  # bool: the place exists, an answer has S places at most
    start: Tensor  # (b,) int64, slot of the answer's first token, below `size`

    def slots(self, number: Tensor) -> Tensor:
        """Canvas slots of the given blocks, counted from the canvas's first; (...) -> (..., size) int64."""
        return number.unsqueeze(-1) * self.size + torch.arange(self.size, device=self.token.device)

    def answer_slots(self, steps: int) -> Tensor:
        """Canvas slot of each of an answer's first tokens; (b, steps) int64."""
        return self.start.unsqueeze(1) + torch.arange(steps, device=self.token.device)

    def clean(self, blocks: Tensor) -> Slots:
        """The first blocks of each answer, `blocks` (b,) int64, as the model reads them when they are filled."""
        width = int(blocks.max()) * self.size
        there = torch.arange(width, device=blocks.device) < (blocks * self.size).unsqueeze(1)
        return slots_of(self.token[:, :width], self.position[:, :width], self.size, there)

    def window(self, rows: Tensor, columns: Tensor, copy: int) -> Slots:
        """Some slots of some rows, (m,) and (w,) int64; (m, w)."""
        at = (rows.unsqueeze(1), columns)
        return slots_of(self.token[at], self.position[at], self.size, self.there[at], copy)


def canvas(prompts: Sequence[Tensor], size: int, most: int, fill: int) -> Canvas:
    """Places for answers of `most` tokens after prompts (L,) each, on their device; places of answers hold `fill`."""
    device = prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    start = lengths % size
    width = -(-(int(start.max()) + most) // size) * size
    column = torch.arange(width, device=device)
    token = torch.full((len(prompts), width), fill, device=device)
    for row, prompt in enumerate(prompts):
        tail = prompt[len(prompt) // size * size :]
        token[row, : len(tail)] = tail
    there = column < (start + most).unsqueeze(1)
    position = (lengths - start).unsqueeze(1) + column
    return Canvas(size, token, position, there, start)
