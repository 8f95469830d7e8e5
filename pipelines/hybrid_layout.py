"""Where the tokens of an answer lie: texts and images in turn, in slots that all rows of a call share.

An answer is text, image, text, image, ..., text. A text ends with the token that asks for an image or with one that ends the
answer; behind an image the decoder writes the mark of its end itself. Rows differ in the lengths of their texts and in the number
of their images: slots that a row does not fill are dead, nobody attends to them and they take no position.
Axes: b rows, J images at most, J + 1 texts of T slots, N tokens of an image, A = J (T + N + 1) + T slots of an answer, L of a prompt,
K decisions of an image, S = J (T + K + 1) + T of an answer, M noisy versions of images.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Room:
    """How much an answer may hold."""

    images: int  # J
    text: int  # T tokens of each text, that which ends it included
    tokens: int  # N of an image
    per_image: int  # K decisions of an image: its denoising steps, or draws of it

    def __post_init__(self) -> None:
        for name in ("images", "text"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; expected at least 1")

    @property
    def slots(self) -> int:
        """A."""
        return self.images * self.text_to_text + self.text

    @property
    def text_to_text(self) -> int:
        """Slots from the start of one text to that of the next."""
        return self.text + self.tokens + 1

    @property
    def decisions(self) -> int:
        """S."""
        return self.images * (self.text + self.per_image + 1) + self.text

    def text_at(self, number: int) -> int:
        """The first slot of a text."""
        return number * self.text_to_text

    def image_at(self, number: int) -> int:
        """The first slot of an image."""
        return self.text_at(number) + self.text

    def tokens_decided(self) -> Tensor:
        """The columns of the tokens of each text; (J + 1, T) int64."""
        start = torch.arange(self.images + 1) * (self.text + self.per_image + 1)
        return start.unsqueeze(1) + torch.arange(self.text)

    def images_decided(self) -> Tensor:
        """The columns of each image, in front of the mark that the decoder writes; (J, K) int64."""
        return self.tokens_decided()[:-1, -1:] + 1 + torch.arange(self.per_image)


class Pair(NamedTuple):
    """One decision of one image."""

    image: int
    number: int  # of the denoising step, or of the draw


class Shape(NamedTuple):
    """How far the answers of b rows go."""

    length: Tensor  # (b, J + 1) int64 tokens of each text, 0 where the answer does not get there
    drawn: Tensor  # (b, J) bool: the image is there


def alive(room: Room, shape: Shape) -> Tensor:
    """Which slots of the answers are filled; (b, A) bool."""
    place = torch.arange(room.text, device=shape.length.device)
    parts = []
    for number in range(room.images + 1):
        parts.append(place < shape.length[:, number : number + 1])
        if number < room.images:
            parts.append(shape.drawn[:, number : number + 1].expand(-1, room.tokens + 1))
    return torch.cat(parts, dim=1)


def images_of(room: Room) -> Tensor:
    """Which image each slot belongs to, -1 for text and marks; (A,) int64."""
    owner = torch.full((room.slots,), -1)
    for number in range(room.images):
        start = room.image_at(number)
        owner[start : start + room.tokens] = number
    return owner


def attention(room: Room, prompt: Tensor, answer: Tensor, versions: Tensor) -> Tensor:
    """Who attends to whom in one call for whole answers and noisy versions of their images; -> (b, A + M N, L + A + M N) bool.

    Text is causal; the tokens of one image attend to each other both ways; a noisy version attends to what comes before its
    image, and to itself. prompt (b, L) bool and answer (b, A) bool: filled slots; versions (M,) int64: the image of each.
    """
    rows, device, count = len(answer), answer.device, len(versions)
    owner, slot = images_of(room).to(device), torch.arange(room.slots, device=device)
    together = (owner.unsqueeze(1) == owner) & (owner >= 0)
    plain = (slot.unsqueeze(1) >= slot) | together  # (A, A)
    starts = torch.tensor([room.image_at(number) for number in versions.tolist()], dtype=torch.int64, device=device)
    before = (slot < starts.unsqueeze(1)).repeat_interleave(room.tokens, 0)  # (M N, A)
    own = torch.arange(count, device=device).repeat_interleave(room.tokens)
    clean = torch.cat([plain, before]).unsqueeze(0) & answer.unsqueeze(1)  # (b, A + M N, A)
    noisy = torch.cat([own.new_zeros(room.slots, len(own), dtype=torch.bool), own.unsqueeze(1) == own])
    start = prompt.unsqueeze(1).expand(-1, clean.shape[1], -1)
    return torch.cat([start, clean, noisy.expand(rows, -1, -1)], dim=2)


def positions(room: Room, prompt: Tensor, answer: Tensor, versions: Tensor) -> Tensor:
    """Places of the answers' slots and of the noisy versions, which stand where their images do; -> (b, A + M N) int64.

    Counted over filled slots, from the prompt on.
    """
    clean = prompt.sum(1, keepdim=True) + answer.cumsum(1) - 1
    parts = [clean[:, room.image_at(number) : room.image_at(number) + room.tokens] for number in versions.tolist()]
    return torch.cat([clean, *parts], dim=1).clamp(min=0)
