"""What today's weights say of recorded decisions, tokens and denoising steps, beside what those that sampled said.

Axes: b rows, J images at most, J + 1 texts of T tokens, M denoising steps of a call, D features, s decisions of a call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.transitions import log_ratio
from mmgrpo.types import Evaluation
from pipelines import decisions, token_probabilities
from pipelines.hybrid_layout import Room
from pipelines.hybrid_model import Hybrid
from pipelines.hybrid_reading import Answers, Noisy, Prompts, read, trimmed
from pipelines.hybrid_steps import Steps
from pipelines.hybrid_writing import Marks

ALWAYS = ("entropy", "sampler_gap", "drift", "step_std", "dt")  # of a call without tokens, or without steps, as well


class Pair(NamedTuple):
    """One denoising step of one image."""

    image: int
    step: int


@dataclass
class Found:
    """Under one set of weights, with gradient."""

    pairs: tuple[Pair, ...]  # M
    velocity: Tensor  # (b, M, C, H, W)
    log_prob: Tensor | None  # (b, j + 1, t), as far as the answers go; 0 where there is no token; None: not evaluated
    entropy: Tensor | None  # likewise

    def keep(self, record: dict[str, Tensor], rows: Tensor) -> None:
        """Note it as the anchor of some rows of a record, whose other rows are NaN until they are noted."""
        if self.log_prob is not None:
            _, texts, longest = self.log_prob.shape
            opened(record, "log_prob", self.log_prob.dtype)[rows, :texts, :longest] = self.log_prob.detach().cpu()
        for place, (image, step) in enumerate(self.pairs):
            kept = opened(record, "velocity", self.velocity.dtype)
            kept[rows, image, step] = self.velocity[:, place].detach().cpu()


def opened(record: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The anchor of what was recorded under a name, in place."""
    like = record[name]
    return record.setdefault(f"anchor.{name}", torch.full(like.shape, torch.nan, dtype=dtype))


def found_of(
    model: Hybrid, room: Room, prompts: Prompts, answers: Answers, state: Tensor, pairs: Sequence[Pair], tokens: bool,
    steps: Steps, marks: Marks, temperature: float,
) -> Found:  # fmt: skip
    """Read a call's answers with the noisy states of the named steps; state (b, J, K + 1, C, H, W)."""
    smaller, answers = trimmed(room, answers)
    clean = answers.clean
    latent = [state[:, image, step].to(clean) for image, step in pairs]
    noisy = Noisy(
        torch.tensor([image for image, _ in pairs], dtype=torch.int64),
        torch.stack(latent, 1) if pairs else clean[:, :0],
        torch.stack([steps.time(step, clean) for _, step in pairs], 1) if pairs else clean[:, :0, 0, 0, 0],
    )
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
    found: Found, held: Found | None, record: Mapping[str, Tensor], room: Room, steps: Steps
) -> tuple[Tensor, Evaluation]:
    """The columns of a call's decisions, (s,), and what they are under today's weights, (b, s).

    What only one kind of decision has is 0 for the other: entropy of steps; KL, drift, std and dt of tokens.
    """
    parts = []
    if found.log_prob is not None:
        parts.append(_tokens(found, held, record, room))
    for place, pair in enumerate(found.pairs):
        parts.append(_step(found, held, record, room, steps, place, pair))
    names = {*ALWAYS, *(name for _, evaluation in parts for name in evaluation.tensors())}
    values = {}
    for name in names:
        columns = []
        for _, evaluation in parts:
            own = evaluation.tensors()
            columns.append(own[name] if name in own else torch.zeros_like(evaluation.log_ratio))
        values[name] = torch.cat(columns, 1)
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


def _step(
    found: Found, held: Found | None, record: Mapping[str, Tensor], room: Room, steps: Steps, place: int, pair: Pair
) -> tuple[Tensor, Evaluation]:
    velocity = found.velocity[:, place]

    def recorded(name: str) -> Tensor:
        return record[name][:, pair.image, pair.step].to(velocity)

    x, following = (record["state"][:, pair.image, pair.step + ahead].to(velocity) for ahead in (0, 1))
    old = anchored(record, "velocity", recorded, velocity)
    new_one, old_one, sampled = (steps.gaussian(x, one, pair.step) for one in (velocity, old, recorded("velocity")))
    reference = None if held is None else steps.gaussian(x, held.velocity[:, place], pair.step)
    part = decisions.Part(following, new_one, old_one, reference, steps.dt(pair.step).to(velocity.device))
    gap = log_ratio(following, old_one, sampled, steps.reduction).unsqueeze(1)
    found_here = decisions.evaluate([part], steps.reduction)
    drawn = record["drawn"][:, pair.image, None].to(velocity.device)
    values = {
        name: torch.where(drawn, value, 0) for name, value in {**found_here.tensors(), "sampler_gap": gap}.items()
    }
    return room.steps_decided()[pair.image, pair.step].unsqueeze(0), Evaluation(**values)


def anchored(record: Mapping[str, Tensor], name: str, recorded: Callable[[str], Tensor], found: Tensor) -> Tensor:
    """What a decision is compared with: the anchor where there is one, else its own value."""
    old = found.detach()
    if f"anchor.{name}" not in record:
        return old
    kept = recorded(f"anchor.{name}")
    return torch.where(kept.isnan(), old, kept)  # NaN: replayed before any update
