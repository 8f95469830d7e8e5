"""Answers of text and images written one decision at a time: tokens, and at the mark of an image its denoising steps.

What was read is remembered by the decoder; a noisy image is forgotten after each step, the finished one is read and remembered.
Axes: b rows, J images at most, J + 1 texts of T tokens, K denoising steps, N tokens of an image, L tokens so far, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache

from mmgrpo import seeds
from mmgrpo.types import Batch
from pipelines import token_probabilities
from pipelines.hybrid_layout import Room, Shape
from pipelines.hybrid_model import Hybrid
from pipelines.hybrid_reading import Answers, Prompts, encode
from pipelines.hybrid_steps import Steps
from pipelines.sampling import draw, uniforms


@dataclass(frozen=True)
class Marks:
    """Tokens with a meaning of their own."""

    start: int  # asks for an image
    end: int  # behind an image, written by the decoder
    stop: tuple[int, ...]  # each ends the answer

    def never(self, closing: bool) -> Tensor:
        """What a text never holds: the mark behind an image and, where there is no room for one more, that in front."""
        return torch.tensor([self.end, self.start] if closing else [self.end])


@dataclass
class Written:
    """Answers and the decisions that made them; what is not there is 0."""

    answers: Answers
    log_prob: Tensor  # (b, J + 1, T) float32 of the tokens
    state: Tensor  # (b, J, K + 1, C, H, W) float32, from noise to the finished image
    velocity: Tensor  # (b, J, K, C, H, W) at least float32, in each state but the last
    finished: Tensor  # (b,) bool: the answer ended by itself

    @staticmethod
    def joined(parts: Sequence["Written"]) -> "Written":
        """The rows of several calls, on the CPU."""

        def cat(of: Callable[["Written"], Tensor]) -> Tensor:
            return torch.cat([of(part).cpu() for part in parts])

        shape = Shape(cat(lambda part: part.answers.shape.length), cat(lambda part: part.answers.shape.drawn))
        state = cat(lambda part: part.state)
        answers = Answers(cat(lambda part: part.answers.token), shape, state[:, :, -1])
        rest = (cat(lambda part: part.velocity), cat(lambda part: part.finished))
        return Written(answers, cat(lambda part: part.log_prob), state, *rest)


@dataclass
class Going:
    """The rows that are still written, and what the decoder remembers of them."""

    rows: Tensor  # (n,) int64 of the call
    last: Tensor  # (n, D) the state that predicts the next token
    cache: Cache
    seen: Tensor = field(repr=False)  # (n, L) bool: which remembered tokens count

    def keep(self, kept: Tensor) -> None:
        """Go on with some rows, (n,) bool."""
        if kept.all():
            return
        index = kept.nonzero().flatten()
        self.rows, self.last, self.seen = self.rows[index], self.last[index], self.seen[index]
        self.cache.batch_select_indices(index)

    def read(self, model: Hybrid, embedded: Tensor, counts: Tensor, own: Tensor) -> Tensor:
        """Read Q more tokens; embedded (n, Q, D), counts (n, Q) bool: they are there, own (Q, Q): among themselves -> (n, Q, D)."""
        position = (self.seen.sum(1, keepdim=True) + counts.cumsum(1) - 1).clamp(min=0)
        before = self.seen.unsqueeze(1).expand(-1, len(own), -1)
        among = own & counts.unsqueeze(1)
        hidden = model.run(embedded, position, torch.cat([before, among], 2), self.cache)
        self.seen = torch.cat([self.seen, counts], 1)
        return hidden

    def forget(self, count: int) -> None:
        """The last tokens of every row."""
        self.seen = self.seen[:, : self.seen.shape[1] - count]
        self.cache.crop(-count)


@torch.no_grad()
def write(
    model: Hybrid, room: Room, prompts: Prompts, steps: Steps, marks: Marks, batch: Batch, planned: Tensor | None,
    temperature: float,
) -> Written:  # fmt: skip
    """An answer for each row; planned steps (K,) bool are stochastic, and without a plan the likeliest tokens are taken."""
    rows, device = len(batch), prompts.token.device
    written, latent = blank(room, rows, steps.count, model.latent, device), model.latent
    drawn = None
    if planned is not None:
        drawn = uniforms(batch.seed, batch.sample.tolist(), (room.images + 1) * room.text).to(device)
    last, cache = encode(model, prompts)
    going = Going(torch.arange(rows, device=device), last, cache, prompts.there[prompts.rows])
    for number in range(room.images + 1):
        at = number * room.text
        choose = chooser(model, marks.never(number == room.images).to(device), temperature)
        chance = None if drawn is None else drawn[:, at : at + room.text]
        write_text(model, going, written, number, marks, choose, chance)
        wants = written.answers.token[going.rows, number, written.answers.shape.length[going.rows, number] - 1]
        going.keep(wants == marks.start)
        if number == room.images or len(going.rows) == 0:
            break
        written.answers.shape.drawn[going.rows, number] = True
        ids = batch.sample[going.rows.cpu()].tolist()

        def fresh(what: str | int, ids: Sequence[int] = ids, number: int = number) -> Tensor:
            return seeds.normal([seeds.derive(batch.seed, one, "image", number, what) for one in ids], latent)

        write_image(model, going, written, number, steps, planned, fresh)
        read_image(model, going, written.answers.clean[going.rows, number], marks.end)
    return written


def blank(room: Room, rows: int, steps: int, latent: tuple[int, int, int], device: torch.device) -> Written:
    """Answers in which nothing is written yet."""
    texts = torch.zeros(rows, room.images + 1, room.text, dtype=torch.int64, device=device)
    state = torch.zeros(rows, room.images, steps + 1, *latent, device=device)
    shape = Shape(texts[..., 0].clone(), state[:, :, 0, 0, 0, 0].bool())
    answers = Answers(texts, shape, state[:, :, -1])  # finished images are the last states
    return Written(answers, texts.float(), state, torch.zeros_like(state[:, :, 1:]), shape.length[:, 0].bool())


def chooser(model: Hybrid, never: Tensor, temperature: float) -> Callable[[Tensor], Tensor]:
    """States (n, D) -> log-probs of the next token, (n, V) float32."""
    head = model.head._replace(never=never)
    return lambda hidden: (token_probabilities.logits(head, hidden) / temperature).log_softmax(1)


def write_text(
    model: Hybrid, going: Going, written: Written, number: int, marks: Marks, choose: Callable[[Tensor], Tensor],
    chance: Tensor | None,
) -> None:  # fmt: skip
    """Write text number `number` of every row that goes on; chance (b, T) in [0, 1), without it the likeliest tokens."""
    token, length = written.answers.token, written.answers.shape.length
    active, ends = torch.ones_like(going.rows, dtype=torch.bool), torch.tensor(marks.stop, device=token.device)
    own = torch.ones(1, 1, dtype=torch.bool, device=token.device)
    for place in range(token.shape[2]):
        log_prob = choose(going.last)
        chosen = log_prob.argmax(1) if chance is None else draw(log_prob, chance[going.rows, place])
        rows = going.rows[active]
        token[rows, number, place] = chosen[active]
        written.log_prob[rows, number, place] = log_prob.gather(1, chosen.unsqueeze(1))[active, 0].float()
        length[rows, number] = place + 1
        stopped = torch.isin(chosen, ends)
        written.finished[going.rows[active & stopped]] = True
        goes_on = active & ~stopped
        if not goes_on.any():
            return
        hidden = going.read(model, model.embed_text(chosen.unsqueeze(1)), goes_on.unsqueeze(1), own)
        going.last = torch.where(goes_on.unsqueeze(1), hidden[:, -1], going.last)
        active = goes_on & (chosen != marks.start)
        if not active.any():
            return


def write_image(
    model: Hybrid, going: Going, written: Written, number: int, steps: Steps, planned: Tensor | None,
    fresh: Callable[[str | int], Tensor],
) -> None:  # fmt: skip
    """Denoise image number `number` of every row that goes on; `fresh` gives standard-normal noise, (n, C, H, W)."""
    state, velocity, rows = written.state, written.velocity, going.rows
    x = fresh("start").to(state)
    state[rows, number, 0] = x
    for step in range(state.shape[2] - 1):
        stochastic = planned is not None and bool(planned[step])
        t = steps.time(step, x)
        embedded = model.embed_image(x, t)
        there = embedded.new_ones(embedded.shape[:2], dtype=torch.bool)
        hidden = going.read(model, embedded, there, there.new_ones(embedded.shape[1], embedded.shape[1]))
        going.forget(embedded.shape[1])
        found = model.velocity(hidden, t)
        mean, std = steps.gaussian(x, found, step, stochastic)
        x = (mean + std * fresh(step).to(mean) if stochastic else mean).float()
        velocity[rows, number, step] = found.to(velocity)
        state[rows, number, step + 1] = x


def read_image(model: Hybrid, going: Going, clean: Tensor, end: int) -> None:
    """Read a finished image back, (n, C, H, W), and the mark behind it."""
    image = model.embed_image(clean, clean.new_zeros(len(clean)))
    mark = model.embed_text(torch.full((len(clean), 1), end, device=clean.device))
    embedded = torch.cat([image, mark], 1)
    count = embedded.shape[1]
    own = torch.ones(count, count, dtype=torch.bool, device=clean.device)
    own[:-1, -1] = False  # the image does not see the mark
    there = own.new_ones(len(clean), count)
    going.last = going.read(model, embedded, there, own)[:, -1]
