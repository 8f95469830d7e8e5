"""Any transformers language model, with eyes or without, as a policy: each token of an answer is one decision.

`pipelines/answers.py` writes and reads the answers; this file holds what an optimizer asks of it. Axes: B answers, S tokens
at most (`max_new_tokens`), b and T those of one batch of a replay.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from mmgrpo.types import KINDS, Batch, Consumer, Finding, Prompt, Reference, Samples, Trajectory
from pipelines import answers_check, patches, token_facts, token_replay, weights
from pipelines.answers import Answers, Options
from pipelines.conversation import Processor, Reader, Reading
from pipelines.decoding import Written
from pipelines.sampling import Sampling
from pipelines.vocabularies import FORCED
from pipelines.weights import Half, Precision

CODEBOOK = "vqmodel"  # the picture encoder of models that read pictures as tokens of their vocabulary
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that adapters go to by default


class LanguagePolicy:
    """A language model as a policy; `prepare` must have seen the run's prompts before anything else."""

    whole_samples = True

    def __init__(
        self,
        answers: Answers,
        processor: Processor,
        *,
        vision: bool = False,
        lora: Mapping[str, Any] | None = None,
        drop_truncated: bool = False,
    ) -> None:
        self.answers = answers
        self.processor = processor
        self.vision = vision  # the picture encoder is trained too
        self.lora = lora
        self.drop_truncated = drop_truncated  # answers that were cut off are not trained on
        self.notes: list[str] = []

    @property
    def model(self) -> PreTrainedModel:
        return self.answers.model

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Look at the media, freeze what is not trained, add adapters, and find out whether prompts can be shared.

        Raises ValueError naming the prompt, the file or the option that cannot be used.
        """
        self.answers.reader.check(prompts)
        self.model.eval()  # dropout would turn the ratio into noise
        patches.as_products(self.model)
        self.notes.append(self._make_trainable())
        self.answers.find_head(prompts[0])
        self.notes.append(answers_check.share(self.answers, prompts))

    def _make_trainable(self) -> str:
        encoder = eyes(self.model)
        self.model.requires_grad_(self.lora is None)
        if self.lora is not None:
            spared = None if encoder is None or self.vision else rf".*\b{encoder[0]}\b.*"
            weights.add_adapter("model", self.model, self.lora, LINEAR, spared)
            self.model.eval()
        elif encoder is not None and not self.vision:
            encoder[1].requires_grad_(False)
        trained = sum(parameter.numel() for parameter in self.trainable().values())
        seen = "" if encoder is None or self.vision else f"; {encoder[0]} is frozen"
        return f"{trained:,} trained parameters in {type(self.model).__name__}{seen}"

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One answer per row; each depends on the run's seed, its sample id and its prompt alone, up to rounding."""
        written = self.answers.write(batch)
        return self.trajectory(batch, written), self._samples(batch, written)

    def trajectory(self, batch: Batch, written: Written) -> Trajectory:
        """Every token of the answers as a decision; trained are those that were chosen."""
        steps = torch.arange(written.token.shape[1])
        mask = steps < written.length.unsqueeze(1)
        if self.drop_truncated:
            mask &= written.finished.unsqueeze(1)
        record = {"token": written.token, "log_prob": written.log_prob, "length": written.length}
        if written.support is not None:
            record["support"] = written.support
        if written.vocabulary is not None:
            record["vocabulary"] = written.vocabulary
            mask &= written.vocabulary != FORCED
        return Trajectory(batch, mask, torch.full_like(written.token, KINDS["token"]), record)

    def generate(self, batch: Batch) -> Samples:
        """One answer per row, the likeliest token each time."""
        return self._samples(batch, self.answers.write(batch, explore=False))

    def _samples(self, batch: Batch, written: Written) -> Samples:
        ids = [row[:length] for row, length in zip(written.token.tolist(), written.length.tolist(), strict=True)]
        text = tuple(self.answers.reader.tokenizer.batch_decode(ids, skip_special_tokens=True))
        return Samples(batch, text=text, length=written.length, finished=written.finished)

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with the tokens' log-probs under today's weights, in the batches of the coming replays."""
        return token_replay.anchored(self.answers, trajectory, parts)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate answers within the budget of tokens at a time, with gradient; `consume` may run backward."""
        token_replay.replay(self.answers, trajectory, consume, reference)

    def facts(self, trajectory: Trajectory, names: Sequence[str]) -> Mapping[str, Tensor]:
        """What `token_facts.told` lists, under today's weights; raises ValueError for another name."""
        return token_facts.told(self.answers, trajectory, names)

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within the context the model computes without its adapters; raises ValueError if it has none."""
        if self.lora is None:
            raise ValueError("reference.kind is 'adapters_off', but policy.lora is not set; expected 'frozen'")
        return weights.adapters_off([self.model])

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What must hold before training, on a few of the run's prompts."""
        return [*(Finding(True, "model", note) for note in self.notes), *answers_check.findings(self, prompts)]

    def save(self, folder: Path) -> None:
        """The adapter, or the whole model, with its processor, as `from_pretrained` loads them."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def eyes(model: PreTrainedModel) -> tuple[str, torch.nn.Module] | None:
    """The module that encodes pictures and the last part of its name; None if the model reads text alone."""
    encoder = model.get_encoder(modality="image")
    alone = encoder is model or encoder is model.base_model
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return next((pair for pair in named if (pair[0] == CODEBOOK if alone else pair[1] is encoder)), None)


def load(
    *,
    model: str,
    max_new_tokens: int,
    revision: str | None = None,
    dtype: Precision = "bfloat16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    autocast: Half | None = None,
    attention: str = "sdpa",
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: tuple[str, ...] = (),
    chat: bool = True,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    video_frames: int | None = None,
    video_rate: float | None = None,
    vision: bool = False,
    lora: Mapping[str, Any] | None = None,
    drop_truncated: bool = False,
    rollout_tokens: int = 65536,
    replay_tokens: int = 8192,
    gradient_checkpointing: bool = False,
) -> LanguagePolicy:
    """A policy from a transformers model that answers in text, to pictures and videos if it has eyes.

    model: folder or hub name. max_new_tokens, temperature, top_p, top_k, min_p, stop: how answers are sampled. dtype: of the
    weights; autocast: of the computation. attention: transformers' attn_implementation. chat, system, template: the chat
    template, a message before each prompt's own, further arguments of the template. processor: arguments of the
    processor's loading (min_pixels, max_pixels, ...). video_frames or video_rate: frames of a video, in all or a second.
    vision: train the picture encoder too. lora: rank, alpha and targets of adapters; without it the model is trained whole.
    drop_truncated: answers that were cut off at max_new_tokens are not trained on (overlong filtering of DAPO).
    rollout_tokens, replay_tokens: of prompts and answers computed at once.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, stop)
    if Path(model).is_absolute() and not Path(model).is_dir():
        raise ValueError(f"policy.model is {model!r}, and there is no such folder")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    sees = type(AutoConfig.from_pretrained(model, revision=revision)) in AutoModelForImageTextToText._model_mapping
    kind, reads = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    loaded = kind.from_pretrained(model, revision=revision, dtype=getattr(torch, dtype), attn_implementation=attention)
    reading = reads.from_pretrained(model, revision=revision, **(processor or {}))
    how = Reading(chat, system, template or {}, video_frames, video_rate)
    options = Options(
        rollout_tokens, replay_tokens, gradient_checkpointing, None if autocast is None else getattr(torch, autocast)
    )
    answers = Answers(loaded.to(place), Reader(reading, loaded, how), sampling, options)
    return LanguagePolicy(answers, reading, vision=vision, lora=lora, drop_truncated=drop_truncated)
