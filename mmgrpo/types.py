"""Records that cross the borders between policies, rewards and the optimizer, and the protocols that join them.

Axes: P prompts, G samples per prompt, B = P * G samples, S decisions per sample (denoising steps, tokens, ...),
C channels, H, W height and width, F frames, N audio samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter


def same_shape(**tensors: Tensor) -> None:
    """Refuse accidental broadcasting: every named tensor must have the shape of the first; raises ValueError."""
    (first, expected), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected.shape)}, that of {first}"
            )


def require_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Check a tensor against a shape in which None stands for any size; raises ValueError."""
    if len(tensor.shape) != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({wanted})")


@dataclass(frozen=True)
class Prompt:
    """One row of the data."""

    id: int  # row number in the data, unique
    text: str
    media: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)  # "image", "video", "audio", ... -> files
    target: object = None  # what a verifiable reward compares with
    columns: Mapping[str, object] = field(default_factory=dict)  # every further column of the data
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # precomputed pipeline inputs, without a batch axis
    messages: tuple[Mapping[str, Any], ...] = ()  # of a chat, if the data holds one; `text` is then what they say


def consecutive(rows: Tensor) -> Tensor | slice:
    """The rows (b,) as a slice if each follows the one before, which indexes without copying."""
    if len(rows) == 0 or (rows.diff() != 1).any():
        return rows
    return slice(int(rows[0]), int(rows[-1]) + 1)


@dataclass(frozen=True)
class Batch:
    """What is to be generated: B requests, the G samples of a prompt sharing a group."""

    prompts: tuple[Prompt, ...]  # B, one per sample
    group: Tensor  # (B,) int64; equal ids are compared with each other
    sample: Tensor  # (B,) int64 global sample id, unique in the run
    seed: int  # of the run
    iteration: int  # rollouts so far in the run, from 0

    def __post_init__(self) -> None:
        for name, ids in (("group", self.group), ("sample", self.sample)):
            require_shape(name, ids, len(self.prompts))
            if ids.dtype != torch.int64:
                raise ValueError(f"{name} has dtype {ids.dtype}; expected torch.int64, ids never pass through floats")

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Tensor) -> "Batch":
        """The given rows; like every `take`, a view of the tensors if the rows are consecutive, a copy otherwise."""
        prompts, index = tuple(self.prompts[row] for row in rows.tolist()), consecutive(rows)
        return replace(self, prompts=prompts, group=self.group[index], sample=self.sample[index])


@dataclass(frozen=True)
class Samples:
    """Decoded media that rewards look at; the fields of other modalities stay None."""

    batch: Batch
    image: Tensor | None = None  # (B, 3, H, W) float32 in [0, 1]
    video: Tensor | None = None  # (B, F, 3, H, W) float32 in [0, 1]
    source_video: Tensor | None = None  # (B, F, 3, H, W) float32 in [0, 1]: what was to be edited, as the policy saw it
    audio: Tensor | None = None  # (B, C, N) float32 in [-1, 1]
    rate: int | None = None  # of the audio, Hz
    reference_audio: Tensor | None = None  # (B, C, N) float32: what the audio should have been, at its rate
    audio_length: Tensor | None = None  # (B,) int64 audio samples that count, the rest is padding; None: all N
    text: tuple[str, ...] | None = None  # B
    length: Tensor | None = None  # (B,) int64 tokens of the text, its end included
    finished: Tensor | None = None  # (B,) bool: the text ended by itself, not at the limit
    forwards: Tensor | None = (
        None  # (B,) int64 evaluations of the model that the text took, where they are not its tokens
    )
    interleaved: tuple[tuple[str | Tensor, ...], ...] | None = None  # B answers: texts and images (3, H, W) in [0, 1]
    part_end: Tensor | None = None  # (B, J) int64 decision with which each part of the answer ends, -1: no such part

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.batch.prompts

    def take(self, rows: Tensor) -> "Samples":
        """The given rows of every field."""
        index, order = consecutive(rows), rows.tolist()
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        taken: dict[str, Any] = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        taken |= {
            name: tuple(value[row] for row in order) for name, value in values.items() if isinstance(value, tuple)
        }
        return replace(self, batch=self.batch.take(rows), **taken)


Kind = Literal["step", "token", "draw"]  # of a decision: a denoising step, a token, a clean sample noised again
KINDS: Mapping[Kind, int] = {"step": 0, "token": 1, "draw": 2}


@dataclass(frozen=True)
class Trajectory:
    """S recorded decisions of each of B samples, and what the policy needs to evaluate them again."""

    batch: Batch
    mask: Tensor  # (B, S) bool: the decision is trained
    kind: Tensor  # (B, S) int64: which kind of decision, a number of KINDS
    record: Mapping[str, Tensor]  # the policy's own, every tensor leading with B

    def __post_init__(self) -> None:
        require_shape("mask", self.mask, len(self.batch), None)
        same_shape(mask=self.mask, kind=self.kind)
        for name, tensor in self.record.items():
            if tensor.shape[:1] != (len(self.batch),):
                raise ValueError(f"record {name!r} has shape {tuple(tensor.shape)}; expected {len(self.batch)} rows")

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def group(self) -> Tensor:
        return self.batch.group

    def take(self, rows: Tensor) -> "Trajectory":
        index = consecutive(rows)
        record = {name: tensor[index] for name, tensor in self.record.items()}
        return Trajectory(self.batch.take(rows), self.mask[index], self.kind[index], record)


@dataclass(frozen=True)
class Feedback:
    """What the rewards said; NaN means no opinion."""

    rewards: Mapping[str, Tensor]  # name -> (B,) float32
    weights: Mapping[str, float]  # name -> weight in the total; 0 is watched but not trained on
    group: Tensor  # (B,) int64
    step_rewards: Tensor | None = None  # (B, S) the weighted sum at the end of each part of an answer, NaN elsewhere
    prompts: tuple[Prompt, ...] = ()  # B, whose columns may name bundles, tasks, categories
    mask: Tensor | None = None  # (B, S) bool: the decision is trained
    facts: Mapping[str, Tensor] = field(default_factory=dict)  # what an advantage asks for by name, leading with B

    def __post_init__(self) -> None:
        if self.rewards.keys() != self.weights.keys():
            raise ValueError(
                f"rewards {sorted(self.rewards)} and weights {sorted(self.weights)} name different components"
            )
        for name, values in self.rewards.items():
            require_shape(f"reward {name!r}", values, len(self.group))

    def total(self) -> Tensor:
        """Weighted sum over the components that have an opinion; NaN where none has; -> (B,)."""
        trained = [(self.rewards[name], weight) for name, weight in self.weights.items() if weight != 0]
        if not trained:
            raise ValueError("every reward has weight 0: there is nothing to train on")
        matrix = torch.stack([values * weight for values, weight in trained], dim=1)  # (B, K)
        return torch.where(matrix.isnan().all(1), torch.nan, matrix.nansum(1))


class Advantage(NamedTuple):
    """How much better each sample, or each of its decisions, was than its group."""

    values: Tensor  # (B,) or (B, S), finite
    keep: Tensor  # (B,) bool: the sample counts in the loss and in its denominators
    metrics: Mapping[str, float] = {}
    imitate: Tensor | None = None  # (B,) bool: what loss.anchor_weight makes likelier, such as correct answers
    decisions: Tensor | None = (
        None  # (B, S) bool: of the trained decisions, those that stay in the loss and its denominators
    )
    separate: Tensor | None = None  # (K, B) or (K, B, S), of sum `values`: the objective is taken of each, then added


@dataclass(frozen=True)
class Evaluation:
    """Recorded decisions under today's weights, at least float32, with gradient; (B, S) each, three fields (B, S, D).

    Of a draw, a clean sample noised again at some level, the model's output (a velocity on a flow's path, the noise or whatever
    else a denoiser predicts) is compared with what it should have been: `error` is the mean over D latent elements of the
    squared difference. Its log_ratio is old_error - error, the surrogate of AWM (arXiv 2509.25050); kl and drift are mean squared
    differences of outputs.
    """

    log_ratio: Tensor  # log new - log old, nats (per event dimension if the reduction is a mean)
    kl: Tensor | None = None  # to the reference policy
    entropy: Tensor | None = None
    to_reference: Tensor | None = None  # log new - log reference of the recorded decision, nats as in log_ratio
    sampler_gap: Tensor | None = (
        None  # log-prob under the weights that sampled: of the replay - of the sampler, no gradient
    )
    drift: Tensor | None = None  # KL of a Gaussian decision from the policy that sampled it
    error: Tensor | None = None  # of a draw
    old_error: Tensor | None = None  # of a draw under the weights that sampled, no gradient
    reference_error: Tensor | None = None  # of a draw under the reference, no gradient
    clean_scale: Tensor | None = (
        None  # |change of the predicted clean sample by the output|: t on a flow's path, no gradient
    )
    prediction: Tensor | None = None  # (B, S, D) a draw's output
    old_prediction: Tensor | None = None  # (B, S, D) under the weights that sampled, no gradient
    target: Tensor | None = None  # (B, S, D) what it should have been, no gradient
    step_std: Tensor | None = None  # S of a Gaussian decision, no gradient
    dt: Tensor | None = None  # positive length of a denoising step, no gradient
    log_prob: Tensor | None = None  # log new itself, where the decision is one of countably many, nats
    mask: Tensor | None = None  # bool: the decision is trained; set for objectives by `ratios.masked`
    kind: Tensor | None = None  # int64: which kind of decision; this and the next two are set by `improve.accumulate`
    group: Tensor | None = None  # int64: of the decision's sample
    reward: Tensor | None = None  # total reward of the decision's sample, no gradient

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def take(self, rows: Tensor) -> "Evaluation":
        return Evaluation(**{name: value[rows.to(value.device)] for name, value in self.tensors().items()})


class Chunk(NamedTuple):
    """A part of a replay that fits in memory; its graph is alive until the consumer has run backward."""

    rows: Tensor  # (b,) int64 rows of the trajectory
    steps: Tensor  # (s,) int64 columns of the trajectory
    evaluation: Evaluation  # (b, s)


Consumer = Callable[[Chunk], None]
# (B,); or (B, J), a reward of each part of an answer, NaN where there is no part; or named components of either
Reward = Callable[[Samples], Tensor | Mapping[str, Tensor]]
AdvantageFunction = Callable[[Feedback], Advantage]


Lesson = Callable[
    [Tensor, Tensor], None
]  # (b,) int64 rows of a batch, (b,) their supervised losses with gradient, whose parts add up


class Finding(NamedTuple):
    """One line of a check."""

    ok: bool
    name: str
    detail: str  # what was measured, with numbers


class Policy(Protocol):
    """A generator whose decisions can be recorded and evaluated again."""

    whole_samples: bool  # a chunk of a replay holds every trained decision of its samples

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Look at the run's prompts before anything else; raises ValueError if they cannot be used."""
        ...

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """Generate one sample per row without gradient; results depend on the batch's seed and ids alone."""
        ...

    def generate(self, batch: Batch) -> Samples:
        """Generate one sample per row as a user would: without exploration, recording nothing."""
        ...

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with what a replay compares with, under today's weights, for rows that are replayed part by part.

        Called before the first update if more than one is made, and for groups that are kept for a later iteration. What is
        added to the record is floating point, NaN for rows that no part names. A policy that recorded it in the rollout
        returns the trajectory itself.
        """
        ...

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: "Reference | None" = None) -> None:
        """Evaluate the trained decisions again, chunk by chunk; `consume` may run backward, then the graph is freed."""
        ...

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes, by name."""
        ...

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What must hold before training: exact replay, true gradients, the sampler's own behaviour."""
        ...

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within the context the policy computes without its adapters; raises ValueError if it has none."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights in the format of the policy's own library."""
        ...


@runtime_checkable
class Informative(Protocol):
    """A policy that knows more of its decisions than an objective asks for."""

    def facts(self, trajectory: Trajectory, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Facts by name, each leading with B, under today's weights, no gradient; raises ValueError for an unknown name."""
        ...


class Preview(NamedTuple):
    """The data that a policy predicts in one step behind a decision, as rewards look at it."""

    step: int  # column of the trajectory: the decision behind which it was predicted
    rows: Tensor  # (b,) int64 rows of the trajectory
    samples: Samples  # b


@runtime_checkable
class Previewing(Protocol):
    """A policy that can show what it predicts of a sample while it makes it."""

    def keep_predictions(self) -> None:
        """Have rollouts record what `previews` needs; called before `prepare`; raises ValueError if there is no such thing."""
        ...

    def previews(self, trajectory: Trajectory) -> Iterator[Preview]:
        """What the weights that sampled predicted behind each decision but a sample's last, one at a time in their order."""
        ...


@runtime_checkable
class Teachable(Protocol):
    """A policy that also learns from data: supervised, for those who have no trained weights to align."""

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """The supervised loss of each row, chunk by chunk; `consume` may run backward, then the graph is freed."""
        ...


class Reference(Protocol):
    """Weights that the policy is held close to: a schedule, not a flag."""

    def applied(self) -> AbstractContextManager[object]:
        """Within the context the policy computes with the reference's weights."""
        ...
