"""A model that writes text and denoises images in one answer, as a policy: each token and each denoising step, or draw, is one decision.

`pipelines/hybrid_model.py` holds the model, `hybrid_layout.py` where an answer's tokens lie, `hybrid_writing.py` and
`hybrid_reading.py` the two ways through it; this file holds what an optimizer asks. Of UnifiedGRPO (arXiv 2603.09538), whose images are
discrete tokens, it keeps the trajectory, the rewards of parts and the warm-up; an image is one part, of Gaussian decisions.
Axes: B samples, b those of one call, J images at most, J + 1 texts of T tokens, K decisions of an image, S = J (T + K + 1) + T of an
answer: of each text its tokens, of each image its steps or draws and the mark behind it, which the decoder writes and nothing trains.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmgrpo.components import locate
from mmgrpo.draws import Draws
from mmgrpo.schedules import Plan
from mmgrpo.transitions import flow_sde
from mmgrpo.types import (
    KINDS,
    Batch,
    Chunk,
    Consumer,
    Evaluation,
    Finding,
    Lesson,
    Prompt,
    Reference,
    Samples,
    Trajectory,
)
from pipelines import flow_draws, hybrid_check, hybrid_lessons, hybrid_model
from pipelines.answers import shared_prompts
from pipelines.decisions import Sampler
from pipelines.hybrid_draws import ImageDraws
from pipelines.hybrid_evaluation import Found, ImageDecisions, evaluated, found_of
from pipelines.hybrid_layout import Pair, Room, Shape
from pipelines.hybrid_options import Options, marks_of
from pipelines.hybrid_parts import samples_of
from pipelines.hybrid_reading import Answers, Prompts, collate
from pipelines.hybrid_steps import ImageSteps, Steps
from pipelines.hybrid_writing import Written, write
from pipelines.weights import Half, Precision, choose_trained


class Piece(NamedTuple):
    """What one call of a replay evaluates."""

    rows: Tensor  # (b,) int64 of the trajectory
    pairs: tuple[Pair, ...]  # decisions of images
    tokens: bool  # the tokens too


class HybridPolicy:
    """A model that writes and draws, as a policy."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: Mapping[str, Any],
        room: Room,
        steps: Steps,
        decided: ImageDecisions,
        options: Options,
        *,
        train: Sequence[str] = (),
    ) -> None:
        self.model, self.tokenizer, self.config = (
            model,
            tokenizer,
            dict(config),
        )  # a module with the members of `Hybrid`
        self.room, self.steps, self.decided, self.options = room, steps, decided, options
        self.marks = marks_of(tokenizer, config["marks"])
        self.whole_samples = options.replay_steps is None  # a chunk of a replay holds every decision of its samples
        names = {name.split(".")[0] for name, _ in model.named_parameters()} - {"vae"}
        self.notes = [choose_trained(model, train or [f"{name}*" for name in sorted(names)])]

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    def precision(self) -> AbstractContextManager[object]:
        """The context in which the model runs."""
        wanted = self.options.autocast
        return nullcontext() if wanted is None else torch.autocast(self.device.type, dtype=wanted)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Read every prompt and every answer that a lesson would teach; raises ValueError naming what cannot be used."""
        lengths = [len(self.encoded(prompt)) for prompt in prompts]
        taught = hybrid_lessons.check(self, prompts)
        self.notes.append(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {taught} with answers")

    def encoded(self, prompt: Prompt) -> list[int]:
        """A prompt as tokens."""
        if not self.options.chat:
            return list(self.tokenizer(prompt.text).input_ids)
        messages = [dict(one) for one in prompt.messages] or [{"role": "user", "content": prompt.text}]
        found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(found["input_ids"])

    def prompts(self, batch: Batch) -> Prompts:
        """The prompts of a call, each group's once."""
        firsts, rows = shared_prompts(batch.group)
        return collate([self.encoded(batch.prompts[row]) for row in firsts], rows, self.device)

    # -- rollout ------------------------------------------------------------------------------------------------

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One answer per row; each depends on the run's seed, its sample id and its prompt alone, up to rounding."""
        return self.walked(batch, self.decided.planned(batch))

    def walked(self, batch: Batch, planned: Tensor) -> tuple[Trajectory, Samples]:
        """One answer per row and its decisions; the planned denoising steps of every image, bool, are stochastic."""
        written = self.written(batch, planned)
        shape, answers = written.answers.shape, written.answers
        mask = torch.zeros(len(batch), self.room.decisions, dtype=torch.bool)
        kind = torch.full(mask.shape, KINDS["token"])
        mask[:, self.room.tokens_decided()] = torch.arange(self.room.text) < shape.length.unsqueeze(2)
        mask[:, self.room.images_decided()] = shape.drawn.unsqueeze(2) & self.decided.trained(planned)
        kind[:, self.room.images_decided()] = KINDS[self.decided.kind]
        record = {"token": answers.token, "length": shape.length, "drawn": shape.drawn, "log_prob": written.log_prob}
        record |= self.decided.record(batch, written)
        return Trajectory(batch, mask, kind, record), self.samples(batch, written)

    def generate(self, batch: Batch) -> Samples:
        """One answer per row: the likeliest tokens, and images without the sampler's noise."""
        return self.samples(batch, self.written(batch, None))

    def written(self, batch: Batch, planned: Tensor | None) -> Written:
        """Answers, with the planned steps stochastic or, without a plan, nothing drawn at random but the start of images."""
        parts = []
        for rows in torch.arange(len(batch)).split(self.options.rollout_rows):
            part = batch.take(rows)
            with self.precision():
                parts.append(
                    write(
                        self.model, self.room, self.prompts(part), self.steps, self.marks, part, planned,
                        self.options.temperature,
                    )
                )  # fmt: skip
        return Written.joined(parts)

    def samples(self, batch: Batch, written: Written) -> Samples:
        """The answers as rewards see them."""
        clean = written.answers.clean
        with torch.no_grad():
            images = self.model.decode(clean.flatten(0, 1).to(self.device)).cpu().unflatten(0, clean.shape[:2])
        return samples_of(batch, written, images, self.room, self.tokenizer)

    # -- replay -------------------------------------------------------------------------------------------------

    def pieces(self, trajectory: Trajectory) -> Iterator[Piece]:
        """The calls of a replay: a few answers, with all trained decisions of their images or a few of them at a time."""
        columns = self.room.images_decided()
        for rows in torch.arange(len(trajectory)).split(self.options.replay_rows):
            if len(rows) == 0:  # no sample is left to replay
                return
            trained = trajectory.mask[rows][:, columns].any(0)  # (J, K)
            pairs = [Pair(*pair) for pair in trained.nonzero().tolist()]
            most = self.options.replay_steps or max(1, len(pairs))
            for start in range(0, max(1, len(pairs)), most):
                yield Piece(rows, tuple(pairs[start : start + most]), start == 0)

    def found(self, trajectory: Trajectory, piece: Piece) -> Found:
        """What the model thinks of a piece's decisions under today's weights."""
        part = trajectory.take(piece.rows)
        record = part.record
        shape = Shape(record["length"], record["drawn"])
        answers = Answers(record["token"], shape, self.decided.clean(record)).to(self.device)
        noisy = self.decided.noisy(record, piece.pairs, answers.clean)
        with self.precision():
            return found_of(
                self.model, self.room, self.prompts(part.batch), answers, noisy, piece.pairs, piece.tokens, self.marks,
                self.options.temperature,
            )  # fmt: skip

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with log-probs and velocities under today's weights, in the calls of the coming replays."""
        record = dict(trajectory.record)
        for part in parts:
            taken = trajectory.take(part)
            for piece in self.pieces(taken):
                with torch.enable_grad():  # the kernels of a replay, which may differ from those without a gradient
                    found = self.found(taken, piece)
                found.keep(record, part[piece.rows], self.room)
        return replace(trajectory, record=record)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate a few answers at a time, with gradient; `consume` may run backward.

        Without an anchor today's weights are those that sampled: a log-ratio compares each decision with its own value.
        """
        for piece in self.pieces(trajectory):
            held = None
            if reference is not None:
                with torch.no_grad(), reference.applied():
                    held = self.found(trajectory, piece)
            columns, evaluation = self._evaluated(trajectory, piece, held)
            if len(columns):
                consume(Chunk(piece.rows, columns, evaluation))

    def _evaluated(self, trajectory: Trajectory, piece: Piece, held: Found | None) -> tuple[Tensor, Evaluation]:
        found = self.found(trajectory, piece)
        return evaluated(found, held, trajectory.take(piece.rows).record, self.room, self.decided)

    # -- training -----------------------------------------------------------------------------------------------

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """The loss of each row's answer, tokens and velocities, a few at a time; times and noise follow from the sample ids."""
        for rows in torch.arange(len(batch)).split(self.options.replay_rows):
            consume(rows, hybrid_lessons.loss(self, batch.take(rows)))

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def adapters_off(self) -> AbstractContextManager[None]:
        """Raises ValueError: the policy has no adapters."""
        raise ValueError("reference.kind is 'adapters_off', but a hybrid policy has no adapters; expected 'frozen'")

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What must hold before training, on a few of the run's prompts."""
        return [*(Finding(True, "model", note) for note in self.notes), *hybrid_check.findings(self, prompts)]

    def save(self, folder: Path) -> None:
        """The model's folder, as `pipelines.hybrid_model.load` reads it."""
        hybrid_model.save(folder, self.model, self.config, self.tokenizer)


def load(
    *,
    plan: Plan | None = None,
    draws: Draws | None = None,
    model: str | None = None,
    new: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    network: str | None = None,
    images: int = 1,
    text: int = 256,
    steps: int = 20,
    shift: float = 1.0,
    sampler: Sampler | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    temperature: float = 1.0,
    chat: bool = False,
    train: tuple[str, ...] = (),
    rollout_rows: int = 64,
    replay_rows: int = 16,
    replay_steps: int | None = None,
    text_weight: float = 1.0,
    image_weight: float = 5.0,
    noises: int = 1,
    media: Path = Path(),
    attention: Literal["sdpa", "eager"] = "sdpa",
    dtype: Precision = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    autocast: Half | None = None,
) -> HybridPolicy:
    """A policy from a folder of `pipelines.hybrid_model`, or a new one to be pretrained.

    model: the folder. new: in its place what its config.json would hold, with a `tokenizer` (folder or hub name).
    network: "path/to/file.py:build" for a module of your own, made from the config. images, text: an answer holds so many images
    at most, and so many tokens in each text. steps, shift: denoising steps and how their times lie; plan: which of them are stochastic
    and trained, sampler: how, by default mmgrpo.transitions:flow_sde, reduction: of their log-ratios; or, with draws, images noised
    again (`mmgrpo.draws.Draws`), sampled without noise. chat: prompts go through
    the tokenizer's chat template. train: patterns of the names of trained parameters, by default all but a VAE's.
    rollout_rows: answers written at once; replay_rows, replay_steps: answers, and denoising steps or draws of each, whose graphs are
    held at once. text_weight, image_weight, noises, media: of lessons (train.stage = "pretrain"): the two losses' weights, noisy
    versions of each image, the folder of the images that answers name. dtype: of the weights; autocast: of the computation.
    """
    chosen = flow_draws.chosen(sampler is not None, plan, draws)
    source = tokenizer or model
    if source is None:
        raise ValueError("policy.new is set without policy.tokenizer; expected the folder or hub name of one")
    build = None if network is None else cast(hybrid_model.Build, locate(network, "policy.network"))
    loaded, config = hybrid_model.opened(model, new, build, attention)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded.to(place, getattr(torch, dtype))
    options = Options(
        temperature, rollout_rows, replay_rows, replay_steps, chat, text_weight, image_weight, noises, media,
        None if autocast is None else getattr(torch, autocast),
    )  # fmt: skip
    how = Steps(steps, sampler or flow_sde, shift, reduction)
    decided = ImageDraws(steps, chosen) if isinstance(chosen, Draws) else ImageSteps(how, chosen)
    room = Room(images, text, loaded.tokens, decided.count)
    return HybridPolicy(loaded, AutoTokenizer.from_pretrained(source), config, room, how, decided, options, train=train)
