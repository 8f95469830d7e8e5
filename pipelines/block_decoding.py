"""Answers filled in block by block, several tokens in one forward where the model is sure of them.

Low-confidence dynamic unmasking (SDAR, arXiv 2510.06303): every masked place of a block gets a token; those whose probability is
above a threshold stay, or the likeliest ones if they are fewer than the step's quota. Axes: B answers, S tokens at most, N canvas
slots, w slots of a block, m masked slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmgrpo import seeds
from pipelines.blocks import CLEAN, Canvas, Known, beside, read, with_room
from pipelines.sampling import draw, uniforms


@dataclass(frozen=True)
class Unmasking:
    """How many tokens of a block are decided in one forward."""

    size: int  # tokens of a block
    steps: int  # forwards for a block at most; size / steps tokens at least are decided in each
    threshold: float = 0.9  # tokens of a higher probability are all decided; 1 leaves the quota alone

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"policy.block_size is {self.size}; expected at least 1 token")
        if not 1 <= self.steps <= self.size:
            raise ValueError(f"policy.steps is {self.steps}; expected 1 to policy.block_size, {self.size}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"policy.threshold is {self.threshold}; expected a probability")

    def quota(self, step: int) -> int:
        """Tokens that are decided at least in a forward, counted from 0 in its block; the first ones take the remainder."""
        return self.size // self.steps + (step < self.size % self.steps)

    def chosen(self, confidence: Tensor, masked: Tensor, step: int) -> Tensor:
        """Which slots are decided; confidence (B, w) in [0, 1], masked (B, w) bool -> (B, w) bool."""
        sure = masked & (confidence > self.threshold)
        order = torch.where(masked, confidence, -1.0).argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(masked).scatter(1, order[:, : self.quota(step)], True) & masked
        return torch.where((sure.sum(1) >= self.quota(step)).unsqueeze(1), sure, best)


@dataclass
class Filled:
    """Answers as they were filled in; what was never decided is 0."""

    token: Tensor  # (B, S) int64; tokens behind an answer's end may be there, decided together with it
    log_prob: Tensor  # (B, S) float32, under the distribution that was sampled, at the forward that decided
    step: Tensor  # (B, S) int64: the forward that decided, from 1 on; 0: none
    length: Tensor  # (B,) int64, the end included
    finished: Tensor  # (B,) bool: ended by itself
    forwards: Tensor  # (B,) int64, evaluations of the model after the prompt


class Filler:
    """Decides tokens of a canvas and notes what it decided."""

    def __init__(
        self,
        canvas: Canvas,
        unmasking: Unmasking,
        end: Tensor,
        temperature: float,
        seed: int,
        samples: Sequence[int],
        explore: bool,
    ) -> None:
        self.canvas, self.unmasking, self.end, self.temperature = canvas, unmasking, end, temperature
        self.seed, self.samples, self.explore = seed, samples, explore  # without exploration the likeliest is taken
        column = torch.arange(canvas.token.shape[1], device=canvas.token.device)
        self.masked = canvas.there & (column >= canvas.start.unsqueeze(1))  # (B, N)
        self.answer = self.masked.clone()  # (B, N): places of the answer
        self.log_prob = torch.zeros(self.masked.shape, device=column.device)
        self.step = torch.zeros_like(canvas.token)
        self.forwards = torch.zeros_like(canvas.start)
        self.finished = torch.zeros_like(canvas.start, dtype=torch.bool)

    def uniforms(self, number: int, rows: Tensor) -> Tensor:
        """The random numbers of a block, in [0, 1): for each sample, forward and slot; (b, steps, w) float64."""
        size, steps = self.unmasking.size, self.unmasking.steps
        chosen = [self.samples[row] for row in rows.tolist()]
        return uniforms(seeds.derive(self.seed, "block", number), chosen, steps * size).view(-1, steps, size)

    def decide(self, rows: Tensor, columns: Tensor, logits: Tensor, uniform: Tensor, step: int) -> None:
        """One forward's decisions for some rows (b,); logits (m, V) of their masked slots, uniform (b, w)."""
        at = (rows.unsqueeze(1), columns)
        masked = self.masked[at]  # (b, w)
        log_prob = (logits / self.temperature).log_softmax(1)
        token = draw(log_prob, uniform[masked]) if self.explore else log_prob.argmax(1)
        found = log_prob.gather(1, token.unsqueeze(1)).squeeze(1).float()
        sampled = torch.zeros(masked.shape, device=found.device).masked_scatter(masked, found)
        chosen = self.unmasking.chosen(torch.where(masked, sampled.exp(), 0), masked, step)
        self.forwards[rows] += 1
        self.canvas.token[at] = torch.where(
            chosen, self.canvas.token[at].masked_scatter(masked, token), self.canvas.token[at]
        )
        self.log_prob[at] = torch.where(chosen, sampled, self.log_prob[at])
        self.step[at] = torch.where(chosen, self.forwards[rows].unsqueeze(1), self.step[at])
        self.masked[at] = masked & ~chosen
        self.finished[rows] = self.ended(rows)

    def ended(self, rows: Tensor) -> Tensor:
        """Whether an end token was decided, and everything before it; (b,) bool."""
        open_before = self.masked[rows].cumsum(1) > 0
        ends = self.answer[rows] & torch.isin(self.canvas.token[rows], self.end)
        return (ends & ~open_before).any(1)

    def going(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which rows have slots of a block left to decide; (b,) bool."""
        return ~self.finished[rows] & self.masked[rows][:, columns].any(1)

    def filled(self, most: int) -> Filled:
        """The answers of all rows."""
        slots = self.canvas.answer_slots(most)
        step = self.step.gather(1, slots)
        token = torch.where(step > 0, self.canvas.token.gather(1, slots), 0)
        ends = torch.isin(token, self.end) & (step > 0)
        first = torch.where(ends.any(1), ends.int().argmax(1) + 1, most)
        length = torch.where(self.finished, first, most)
        return Filled(token, self.log_prob.gather(1, slots), step, length, self.finished, self.forwards)


@dataclass
class Decoding:
    """The model, and rows of a canvas that it reads block by block."""

    model: PreTrainedModel
    logits: Callable[[Tensor], Tensor]  # (n, D) -> (n, V)
    dtype: torch.dtype  # of the computation
    known: Known  # the text before the block
    rows: Tensor  # (b,) int64 of the canvas, that `known` holds

    def only(self, kept: Tensor, room: int) -> "Decoding":
        """The rows at the given places, (m,) int64."""
        return replace(self, known=with_room(self.known, kept, room), rows=self.rows[kept])

    def masked(self, canvas: Canvas, before: Tensor, columns: Tensor) -> Tensor:
        """States that predict a block (b, w, D); what is filled `before` it is read in for good, the block is not."""
        clean = canvas.window(self.rows, before, CLEAN)
        asked = beside([clean, canvas.window(self.rows, columns, CLEAN + 1)])
        hidden = read(self.model, asked, self.known, self.dtype)[:, len(before) :]
        self.known.cache.crop(-len(columns))
        self.known = self.known._replace(slots=beside([self.known.slots, clean]))
        return hidden


@torch.no_grad()
def fill(decoding: Decoding, filler: Filler) -> None:
    """Fill every row's answer; what is known at first are the whole blocks of the prompts.

    A filled block is read in once more, clean, by the forward that begins the next one: there are no other forwards.
    """
    size = filler.canvas.size
    for number in range(filler.canvas.token.shape[1] // size):
        columns = torch.arange(number * size, (number + 1) * size, device=decoding.rows.device)
        alive = filler.going(decoding.rows, columns)
        if not alive.any():
            return
        decoding = decoding.only(alive.nonzero().flatten(), 2 * size)
        fill_block(decoding, filler, columns - size if number else columns[:0], columns, number)


def fill_block(decoding: Decoding, filler: Filler, before: Tensor, columns: Tensor, number: int) -> None:
    """Fill one block of every row of it; rows whose block is full leave the batch once half have."""
    uniform = filler.uniforms(number, decoding.rows).to(columns.device)  # (b, steps, w)
    going = torch.ones_like(decoding.rows, dtype=torch.bool)
    for step in range(filler.unmasking.steps):
        hidden, before = decoding.masked(filler.canvas, before, columns)[going], before[:0]
        rows = decoding.rows[going]
        open_slots = filler.masked[rows][:, columns]
        filler.decide(rows, columns, decoding.logits(hidden[open_slots]), uniform[going, step], step)
        going = filler.going(decoding.rows, columns)
        if not going.any():
            return
        if 2 * int(going.sum()) <= len(going):
            kept = going.nonzero().flatten()
            decoding, uniform, going = decoding.only(kept, len(columns)), uniform[kept], going[kept]
