"""A model that writes texts and images as tokens of one vocabulary, as a policy: each token of an answer is one decision.

It is a language policy whose places have vocabularies of their own (`pipelines/vocabularies.py`); tokens that could not have
been others are not trained. Axes: B answers, S tokens at most, J parts of an answer at most, b of a batch, T its longest.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from mmgrpo.types import Batch, Consumer, Finding, Lesson, Prompt, Reference, Samples, Trajectory
from pipelines import answer_parts, vlm
from pipelines.answers import Answers
from pipelines.composed import spans
from pipelines.decoding import Written
from pipelines.lessons import Lessons, Teaching
from pipelines.picture_tokens import Pictures, pictures_of
from pipelines.sampling import Sampling
from pipelines.vlm import LanguagePolicy
from pipelines.vocabularies import grammar
from pipelines.weights import Half, Precision


class InterleavedPolicy:
    """A language policy whose answers hold images; `prepare` must have seen the run's prompts before anything else."""

    whole_samples = True

    def __init__(self, words: LanguagePolicy, pictures: Pictures, teaching: Teaching) -> None:
        self.words, self.pictures = words, pictures
        self.lessons = Lessons(words.answers, pictures, teaching)

    @property
    def answers(self) -> Answers:
        return self.words.answers

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """As of a language policy, and the images of answers to learn from are opened; raises ValueError likewise."""
        answer_parts.check(prompts, self.lessons.teaching.folder)
        self.words.prepare(prompts)
        if self.answers.guided and not self.answers.shared:
            raise ValueError(f"policy.guidance needs a memory that can be shared; {self.words.notes[-1]}")
        if self.answers.guided and self.answers.head.cap is not None:
            raise ValueError(
                "policy.guidance mixes hidden states, and this model caps its logits; expected guidance = 1"
            )

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One answer per row; each depends on the run's seed, its sample id and its prompt alone, up to rounding."""
        written = self.answers.write(batch)
        return self.words.trajectory(batch, written), self._samples(batch, written)

    def generate(self, batch: Batch) -> Samples:
        """One answer per row: the likeliest words, and codes of images drawn as in a rollout."""
        return self._samples(batch, self.answers.write(batch, explore=False))

    def _samples(self, batch: Batch, written: Written) -> Samples:
        """Texts and pixels of every part, and where it ends."""
        tokens = [row[:length] for row, length in zip(written.token, written.length.tolist(), strict=True)]
        layout, tokenizer = self.pictures.layout, self.answers.reader.tokenizer
        found = [spans(row.tolist(), layout, tokenizer) for row in tokens]
        codes = [
            layout.bare(row[part.start : part.start + len(layout.pattern)].unsqueeze(0))
            for row, parts in zip(tokens, found, strict=True)
            for part in parts
            if part.text is None
        ]
        drawn = iter(self.pictures.draw(torch.cat(codes)) if codes else ())
        parts = tuple(tuple(next(drawn) if part.text is None else part.text for part in row) for row in found)
        ends = torch.full((len(batch), max(map(len, found))), -1)
        for row, listed in enumerate(found):
            ends[row, : len(listed)] = torch.tensor([part.end for part in listed])
        text = tuple(" ".join(part for part in row if isinstance(part, str)) for row in parts)
        return Samples(
            batch, text=text, length=written.length, finished=written.finished, interleaved=parts, part_end=ends
        )

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """The next-token loss of each row's answer, within the budget of tokens at a time."""
        self.lessons.teach(batch, consume)

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with the tokens' log-probs under today's weights, in the batches of the coming replays."""
        return self.words.anchor(trajectory, parts)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate answers within the budget of tokens at a time, with gradient; `consume` may run backward."""
        self.words.replay(trajectory, consume, reference)

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes, by name."""
        return self.words.trainable()

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within the context the model computes without its adapters; raises ValueError if it has none."""
        return self.words.adapters_off()

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What must hold before training, on answers of random words and codes to a few of the run's prompts."""
        return self.words.self_test(prompts)

    def save(self, folder: Path) -> None:
        """The adapter, or the whole model, with its processor, as `from_pretrained` loads them."""
        self.words.save(folder)


def load(
    *,
    model: str,
    max_new_tokens: int,
    height: int,
    width: int,
    images: int = 4,
    guidance: float = 1.0,
    negative: str = "",
    image_temperature: float = 1.0,
    image_top_p: float = 1.0,
    image_top_k: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    teaching: Teaching = Teaching(),  # noqa: B008  frozen
    revision: str | None = None,
    dtype: Precision = "bfloat16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    autocast: Half | None = None,
    attention: str = "sdpa",
    chat: bool = True,
    system: str | None = None,
    processor: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    drop_truncated: bool = False,
    rollout_tokens: int = 65536,
    replay_tokens: int = 8192,
    gradient_checkpointing: bool = False,
) -> InterleavedPolicy:
    """A policy from a transformers model whose images are tokens of its vocabulary: Emu3.

    height, width: of the images it writes, pixels. images: of one answer, at most. guidance: of the images, 1 is none;
    negative: the prompt that it leads away from. image_temperature, image_top_p, image_top_k: how codes of images are sampled;
    temperature, top_p, top_k: how words are. teaching: where images of answers to learn from are, weights of the loss. All
    others as in `pipelines.vlm.load`; max_new_tokens counts an image's tokens too.
    """
    if guidance <= 0 or images < 0:
        raise ValueError(f"policy.guidance is {guidance} and policy.images {images}; expected above 0 and at least 0")
    words = vlm.load(
        model=model,
        max_new_tokens=max_new_tokens,
        revision=revision,
        dtype=dtype,
        device=device,
        autocast=autocast,
        attention=attention,
        chat=chat,
        system=system,
        processor=processor,
        lora=lora,
        drop_truncated=drop_truncated,
        rollout_tokens=rollout_tokens,
        replay_tokens=replay_tokens,
        gradient_checkpointing=gradient_checkpointing,
    )
    text = Sampling(max_new_tokens, temperature, top_p, top_k)
    code = Sampling(max_new_tokens, image_temperature, image_top_p, image_top_k)
    pictures = pictures_of(words.model, words.processor, height, width)
    return interleaved(words, pictures, text, code, images, guidance, negative, teaching)


def interleaved(
    words: LanguagePolicy,
    pictures: Pictures,
    text: Sampling,
    code: Sampling,
    images: int,
    guidance: float = 1.0,
    negative: str = "",
    teaching: Teaching = Teaching(),  # noqa: B008
) -> InterleavedPolicy:
    """The language policy as one that writes images as well; options as of `load`, one per field of `Sampling` for each."""
    room = len(pictures.layout.pattern) + 1
    if images and text.max_new_tokens < room:
        raise ValueError(
            f"policy.max_new_tokens is {text.max_new_tokens}; expected at least {room}, an image and an end"
        )
    answers = words.answers
    tokenizer, ends = answers.reader.tokenizer, answers.end.tokens
    answers.grammar = grammar(pictures.layout, tokenizer, ends, text, code, images, guidance)
    answers.negative = Prompt(-1, negative)
    return InterleavedPolicy(words, pictures, teaching)
