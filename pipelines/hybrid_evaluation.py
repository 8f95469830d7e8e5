"""What today's weights say of recorded decisions, tokens and those of images, beside what those that sampled said.

Axes: B samples, b rows, J images at most, J + 1 texts of T tokens, K decisions of an image, M of them in a call, D features or elements
of a latent, s decisions of a call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmgrpo.matching import OUTPUTS
from mmgrpo.types import Batch, Evaluation, Kind
from pipelines import token_probabilities
from pipelines.hybrid_layout import Pair, Room
from pipelines.hybrid_model import Hybrid
from pipelines.hybrid_reading import Answers, Noisy, Prompts, read, trimmed
from pipelines.hybrid_writing import Marks, Written


class Outputs(NamedTuple):
    """Velocities in the state of one decision; (b, C, H, W) each."""

    new: Tensor  # with gradient
    old: Tensor
    reference: Tensor | None


class ImageDecisions(Protocol):
    """What is decided about an image: planned denoising steps, or draws of it noised again."""

    @property
    def count(self) -> int:
        """K of an image."""
        ...

    @property
    def kind(self) -> Kind: ...

    @property
    def fields(self) -> tuple[str, ...]:
        """Of every evaluation, also where a call holds no such decision or nothing else."""
        ...

    @property
    def referring(self) -> tuple[str, ...]:
        """Likewise, beside a reference."""
        ...

    def planned(self, batch: Batch) -> Tensor:
        """The steps of a rollout that are stochastic, bool."""
        ...

    def probed(self) -> Tensor:
        """Likewise, all of them that can be."""
        ...

    def trained(self, planned: Tensor) -> Tensor:
        """Which decisions of an image are; (K,) bool."""
        ...

    def record(self, batch: Batch, written: Written) -> dict[str, Tensor]:
        """What a replay needs of the images; each leads with B."""
        ...

    def clean(self, record: Mapping[str, Tensor]) -> Tensor:
        """The finished images; (b, J, C, H, W)."""
        ...

    def noisy(self, record: Mapping[str, Tensor], pairs: Sequence[Pair], clean: Tensor) -> Noisy:
        """The states in which M decisions are evaluated; clean (b, J, C, H, W) gives dtype and device."""
        ...

    def evaluated(self, record: Mapping[str, Tensor], pair: Pair, outputs: Outputs) -> Evaluation:
        """One decision of every row; (b, 1)."""
        ...


@dataclass
class Found:
    """Under one set of weights, with gradient."""

    pairs: tuple[Pair, ...]  # M
    velocity: Tensor  # (b, M, C, H, W)
    log_prob: Tensor | None  # (b, j + 1, t), as far as the answers go; 0 where there is no token; None: not evaluated
    entropy: Tensor | None  # likewise

    def keep(self, record: dict[str, Tensor], rows: Tensor, room: Room) -> None:
        """Note it as the anchor of some rows of a record, whose other rows are NaN until they are noted."""
        count = len(record["token"])
        if self.log_prob is not None:
            _, texts, longest = self.log_prob.shape
            kept = opened(record, "log_prob", record["log_prob"].shape, self.log_prob.dtype)
            kept[rows, :texts, :longest] = self.log_prob.detach().cpu()
        for place, (image, number) in enumerate(self.pairs):
            shape = (count, room.images, room.per_image, *self.velocity.shape[2:])
            kept = opened(record, "velocity", shape, self.velocity.dtype)
            kept[rows, image, number] = self.velocity[:, place].detach().cpu()


def opened(record: dict[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The anchor of a name, in place."""
    anchor = f"anchor.{name}"
    if anchor not in record:
        record[anchor] = torch.full(tuple(shape), torch.nan, dtype=dtype)
    return record[anchor]


def found_of(
    model: Hybrid, room: Room, prompts: Prompts, answers: Answers, noisy: Noisy, pairs: Sequence[Pair], tokens: bool,
    marks: Marks, temperature: float,
) -> Found:  # fmt: skip
    """Read a call's answers with the noisy states of some decisions."""
    smaller, answers = trimmed(room, answers)
    found = read(model, smaller, prompts, answers, noisy, marks.end)
    if not tokens:
        return Found(tuple(pairs), found.velocity, None, None)
    scored = scores(model, found.text, answers, marks, room, temperature)
    return Found(tuple(pairs), found.velocity, *scored)


def scores(
    model: Hybrid, hidden: Tensor, answers: Answers, marks: Marks, room: Room, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of every token, 0 where there is none; hidden (b, j + 1, t, D) -> (b, j + 1, t) each."""
    place = torch.arange(hidden.shape[2], device=hidden.device)
    there = place < answers.shape.length.unsqueeze(2)
    closing = (torch.arange(hidden.shape[1], device=hidden.device) == room.images).view(1, -1, 1)
    kind = torch.promote_types(hidden.dtype, torch.float32)
    found = [torch.zeros(there.shape, dtype=kind, device=hidden.device) for _ in range(2)]
    for last in (False, True):
        where = there & (closing == last)
        if where.any():
            head = model.head._replace(never=marks.never(last).to(hidden.device))
            said = token_probabilities.scores(head, hidden[where], answers.token[where], temperature)
            found = [whole.masked_scatter(where, part.to(whole)) for whole, part in zip(found, said, strict=True)]
    return found[0], found[1]


def evaluated(
    found: Found, held: Found | None, record: Mapping[str, Tensor], room: Room, decided: ImageDecisions
) -> tuple[Tensor, Evaluation]:
    """The columns of a call's decisions, (s,), and what they are under today's weights, (b, s), three fields (b, s, D).

    What only one kind of decision has is 0 for the other: entropy of an image's; of tokens KL, drift and what steps or draws have.
    """
    parts = [] if found.log_prob is None else [_tokens(found, held, record, room)]
    parts += [_image(found, held, record, room, decided, place) for place in range(len(found.pairs))]
    known = [evaluation.tensors() for _, evaluation in parts]
    told = {*decided.fields, *(() if held is None else decided.referring), *(name for own in known for name in own)}
    elements = found.velocity.shape[2:].numel()  # D

    def of(own: Mapping[str, Tensor], name: str) -> Tensor:
        if name in own:
            return own[name]
        nothing = torch.zeros_like(own["log_ratio"])
        return nothing.unsqueeze(2).expand(-1, -1, elements) if name in OUTPUTS else nothing

    values = {name: torch.cat([of(own, name) for own in known], 1) for name in told}
    return torch.cat([columns for columns, _ in parts]), Evaluation(**values)


def _tokens(found: Found, held: Found | None, record: Mapping[str, Tensor], room: Room) -> tuple[Tensor, Evaluation]:
    assert found.log_prob is not None and found.entropy is not None
    log_prob = found.log_prob
    _, texts, longest = log_prob.shape

    def recorded(name: str) -> Tensor:
        return record[name][:, :texts, :longest].to(log_prob)

    there = torch.arange(longest, device=log_prob.device) < record["length"][:, :texts, None].to(log_prob.device)
    old = anchored(record, "log_prob", recorded, log_prob)
    columns = room.tokens_decided()[:texts, :longest].flatten()
    to_reference = None if held is None or held.log_prob is None else (log_prob - held.log_prob).flatten(1)
    gap = torch.where(there, old - recorded("log_prob"), 0)
    return columns, Evaluation(
        log_ratio=(log_prob - old).flatten(1),
        to_reference=to_reference,
        sampler_gap=gap.flatten(1),
        entropy=found.entropy.flatten(1),
    )


def _image(
    found: Found, held: Found | None, record: Mapping[str, Tensor], room: Room, decided: ImageDecisions, place: int
) -> tuple[Tensor, Evaluation]:
    velocity, pair = found.velocity[:, place], found.pairs[place]

    def recorded(name: str) -> Tensor:
        return record[name][:, pair.image, pair.number].to(velocity)

    old = anchored(record, "velocity", recorded, velocity)
    outputs = Outputs(velocity, old, None if held is None else held.velocity[:, place])
    drawn = record["drawn"][:, pair.image].to(velocity.device)
    values = {
        name: torch.where(drawn.view(-1, *[1] * (value.dim() - 1)), value, 0)
        for name, value in decided.evaluated(record, pair, outputs).tensors().items()
    }
    return room.images_decided()[pair.image, pair.number].unsqueeze(0), Evaluation(**values)


def anchored(record: Mapping[str, Tensor], name: str, recorded: Callable[[str], Tensor], found: Tensor) -> Tensor:
    """What a decision is compared with: the anchor where there is one, else its own value."""
    old = found.detach()
    if f"anchor.{name}" not in record:
        return old
    kept = recorded(f"anchor.{name}")
    return torch.where(kept.isnan(), old, kept)  # NaN: replayed before any update
