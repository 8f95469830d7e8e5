"""Whole answers of text and images in one call of the decoder: the states of their tokens, the velocities in noisy versions of images.

The prompt is read once for all the answers of its group. Noisy versions lie behind the answer in the same call and attend to what
comes before their image: the answer is read once for all of its denoising steps.
Axes: b rows, P prompts of L tokens, J images of N tokens at most, J + 1 texts of T tokens, M noisy versions, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from pipelines.hybrid_layout import Pair, Room, Shape, alive, attention, positions
from pipelines.hybrid_model import Hybrid


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call, each once."""

    token: Tensor  # (P, L) int64, padded on the right
    there: Tensor  # (P, L) bool
    rows: Tensor  # (b,) int64: the prompt of each row


@dataclass(frozen=True)
class Answers:
    """What was answered."""

    token: Tensor  # (b, J + 1, T) int64
    shape: Shape
    clean: Tensor  # (b, J, C, H, W) finished images

    def take(self, rows: Tensor) -> "Answers":
        shape = Shape(self.shape.length[rows], self.shape.drawn[rows])
        return Answers(self.token[rows], shape, self.clean[rows])

    def to(self, device: torch.device) -> "Answers":
        shape = Shape(*(part.to(device) for part in self.shape))
        return Answers(self.token.to(device), shape, self.clean.to(device))


class Noisy(NamedTuple):
    """Versions of the answers' images with noise."""

    image: Tensor  # (M,) int64: which image each is a version of
    latent: Tensor  # (b, M, C, H, W)
    t: Tensor  # (b, M) in [0, 1], 1 = noise


def versions(pairs: Sequence[Pair], states: Sequence[tuple[Tensor, Tensor]], clean: Tensor) -> Noisy:
    """Noisy versions from the state (b, C, H, W) and the time (b,) of each; clean (b, J, C, H, W) is like them."""
    latents, times = [latent.to(clean) for latent, _ in states], [t for _, t in states]
    return Noisy(
        torch.tensor([pair.image for pair in pairs], dtype=torch.int64),
        torch.stack(latents, 1) if pairs else clean[:, :0],
        torch.stack(times, 1) if pairs else clean[:, :0, 0, 0, 0],
    )


class Read(NamedTuple):
    """What a call found."""

    text: Tensor  # (b, J + 1, T, D) the states that predict the tokens
    velocity: Tensor  # (b, M, C, H, W)


def collate(texts: Sequence[Sequence[int]], rows: Tensor, device: torch.device) -> Prompts:
    """Prompts of different lengths in one tensor."""
    length = torch.tensor([len(text) for text in texts])
    token = torch.zeros(len(texts), int(length.max()), dtype=torch.int64)
    for place, text in enumerate(texts):
        token[place, : len(text)] = torch.tensor(text)
    there = torch.arange(token.shape[1]) < length.unsqueeze(1)
    return Prompts(token.to(device), there.to(device), rows.to(device))


def encode(model: Hybrid, prompts: Prompts) -> tuple[Tensor, Cache]:
    """Read every prompt and repeat what is remembered for its rows; -> the states that predict the first tokens (b, D)."""
    there, cache = prompts.there, model.empty()
    place = torch.arange(there.shape[1], device=there.device)
    seen = (place.unsqueeze(1) >= place) & there.unsqueeze(1)  # (P, L, L)
    hidden = model.run(model.embed_text(prompts.token), (there.cumsum(1) - 1).clamp(min=0), seen, cache)
    last = hidden[torch.arange(len(there), device=there.device), there.sum(1) - 1]
    cache.batch_select_indices(prompts.rows)
    return last[prompts.rows], cache


def read(model: Hybrid, room: Room, prompts: Prompts, answers: Answers, noisy: Noisy, end: int) -> Read:
    """Read answers and noisy versions of their images; `end` is the mark behind an image."""
    last, cache = encode(model, prompts)
    there, filled = prompts.there[prompts.rows], alive(room, answers.shape)
    rows, count = noisy.t.shape
    versions = model.embed_image(noisy.latent.flatten(0, 1), noisy.t.flatten()) if count else None
    parts = [embed(model, room, answers, end)]
    if versions is not None:
        parts.append(versions.view(rows, count * room.tokens, -1))
    place = positions(room, there, filled, noisy.image)
    hidden = model.run(torch.cat(parts, 1), place, attention(room, there, filled, noisy.image), cache)
    text = torch.stack([predicting(room, last, hidden, number) for number in range(room.images + 1)], 1)
    if versions is None:
        return Read(text, noisy.latent)
    states = hidden[:, room.slots :].reshape(rows * count, room.tokens, -1)
    return Read(text, model.velocity(states, noisy.t.flatten()).view(noisy.latent.shape))


def embed(model: Hybrid, room: Room, answers: Answers, end: int) -> Tensor:
    """The tokens of whole answers; -> (b, A, D)."""
    parts, rows = [], len(answers.token)
    for number in range(room.images + 1):
        parts.append(model.embed_text(answers.token[:, number]))
        if number < room.images:
            clean = answers.clean[:, number]
            parts.append(model.embed_image(clean, clean.new_zeros(rows)))
            parts.append(model.embed_text(answers.token.new_full((rows, 1), end)))
    return torch.cat(parts, dim=1)


def predicting(room: Room, last: Tensor, hidden: Tensor, number: int) -> Tensor:
    """The states that predict the tokens of one text: of the prompt's end or an image's, then of each token; -> (b, T, D)."""
    start = room.text_at(number)
    first = last if number == 0 else hidden[:, start - 1]
    return torch.cat([first.unsqueeze(1), hidden[:, start : start + room.text - 1]], dim=1)


def trimmed(room: Room, answers: Answers) -> tuple[Room, Answers]:
    """The room that these answers need, and the answers in it."""
    shape = answers.shape
    images = int(shape.drawn.any(0).sum())
    text = int(shape.length.max())
    smaller = replace(room, images=max(1, images), text=text)
    kept = Shape(shape.length[:, : smaller.images + 1], shape.drawn[:, : smaller.images])
    token, clean = answers.token[:, : smaller.images + 1, :text], answers.clean[:, : smaller.images]
    return smaller, Answers(token, kept, clean)
