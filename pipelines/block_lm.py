"""Block-diffusion language models as policies: blocks of masked tokens are filled in, several tokens in one forward.

Any decoder of transformers whose attention takes a mask of four dimensions is run with block-causal ones (`pipelines/blocks.py`);
it must have been trained so. A token is predicted at its own, masked, place, as by BD3-LM and SDAR; models whose outputs are shifted
by one are not read. Each token is one decision. Axes: B answers, S tokens at most (`max_new_tokens`).
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
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmgrpo.types import KINDS, Batch, Consumer, Finding, Lesson, Prompt, Reference, Samples, Trajectory
from pipelines import block_check, token_replay, weights
from pipelines.answers import Answers, Options
from pipelines.block_answers import BlockAnswers, Likelihood
from pipelines.block_decoding import Filled, Unmasking
from pipelines.conversation import Reader, Reading
from pipelines.sampling import Sampling
from pipelines.vlm import LINEAR
from pipelines.weights import Half, Precision

OWN_CODE = (
    "model_type",
    "architectures",
    "auto_map",
    "attn_implementation",
    "transformers_version",
)  # of a configuration
ATTENTION = ("sdpa", "eager")  # implementations that take an additive mask of four dimensions


class BlockPolicy:
    """A block-diffusion language model as a policy; `prepare` must have seen the run's prompts before anything else."""

    whole_samples = True

    def __init__(self, blocks: BlockAnswers, *, lora: Mapping[str, Any] | None = None) -> None:
        self.blocks, self.lora = blocks, lora
        self.notes: list[str] = []

    @property
    def model(self) -> PreTrainedModel:
        return self.blocks.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.blocks.answers.reader.tokenizer

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Add adapters or train everything; raises ValueError naming what cannot be used."""
        self.blocks.answers.reader.check(prompts)
        require_whole_attention(self.model)
        self.model.requires_grad_(self.lora is None)
        if self.lora is not None:
            weights.add_adapter("model", self.model, self.lora, LINEAR)
        self.model.eval()  # dropout would turn the ratio into noise
        self.blocks.answers.find_head(prompts[0])
        trained = sum(parameter.numel() for parameter in self.trainable().values())
        self.notes.append(f"{trained:,} trained parameters in {type(self.model).__name__}")

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One answer per row; each depends on the run's seed, its sample id and its prompt alone, up to rounding."""
        filled = self.blocks.write(batch)
        mask = torch.arange(filled.token.shape[1]) < filled.length.unsqueeze(1)
        record = {"token": filled.token, "step": filled.step, "length": filled.length}
        if self.blocks.likelihood == "order":  # otherwise the sampler's distribution is not the one that is replayed
            record["log_prob"] = filled.log_prob
        kind = torch.full_like(filled.token, KINDS["token"])
        return Trajectory(batch, mask, kind, record), self._samples(batch, filled)

    def generate(self, batch: Batch) -> Samples:
        """One answer per row, the likeliest token at each place; what stays is decided as in a rollout."""
        return self._samples(batch, self.blocks.write(batch, explore=False))

    def _samples(self, batch: Batch, filled: Filled) -> Samples:
        ids = [row[:length] for row, length in zip(filled.token.tolist(), filled.length.tolist(), strict=True)]
        text = tuple(self.tokenizer.batch_decode(ids, skip_special_tokens=True))
        return Samples(batch, text=text, length=filled.length, finished=filled.finished, forwards=filled.forwards)

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with the tokens' log-probs under today's weights, in the batches of the coming replays."""
        return token_replay.anchored(self.blocks, trajectory, parts)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate answers within the budget of tokens at a time, with gradient; `consume` may run backward."""
        token_replay.replay(self.blocks, trajectory, consume, reference)

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """The block-diffusion loss of each row's target, chunk by chunk; `consume` may run backward."""
        self.blocks.teach(batch, consume)

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
        return [*(Finding(True, "model", note) for note in self.notes), *block_check.findings(self, prompts)]

    def save(self, folder: Path) -> None:
        """The adapter, or the whole model, with its tokenizer, as `from_pretrained` loads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def require_whole_attention(model: PreTrainedModel) -> None:
    """Raise ValueError if a layer looks back over a window or keeps a state, which the masks of blocks do not describe."""
    kinds = set(model.config.to_dict().get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"policy.model: {type(model).__name__} has layers of {', '.join(sorted(kinds))}; expected full_attention alone"
        )


def token_of_masks(tokenizer: PreTrainedTokenizerBase, named: str | None, vocabulary: int) -> int:
    """The id of the token that stands for a masked place; raises ValueError if there is none."""
    written = tokenizer.mask_token if named is None else named
    found = None if written is None else tokenizer.get_vocab().get(written)
    if found is None or found >= vocabulary:
        wanted = "expected the token that the model was trained with, such as '<|MASK|>'"
        raise ValueError(f"policy.mask_token is {named!r}, and the tokenizer has no such token; {wanted}")
    return int(found)


def config_of(model: str, revision: str | None, architecture: str | None) -> PreTrainedConfig:
    """The model's configuration; with an architecture, as that of transformers in the place of the model's own code."""
    if architecture is None:
        return AutoConfig.from_pretrained(model, revision=revision)
    written, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    kept = {key: value for key, value in written.items() if key not in OWN_CODE}
    return AutoConfig.for_model(architecture, **kept)


def load(
    *,
    model: str,
    max_new_tokens: int,
    block_size: int,
    steps: int | None = None,
    threshold: float = 0.9,
    temperature: float = 1.0,
    likelihood: Likelihood = "block",
    likelihood_size: int | None = None,
    mask_token: str | None = None,
    architecture: str | None = None,
    revision: str | None = None,
    dtype: Precision = "bfloat16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    autocast: Half | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
    chat: bool = True,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    rollout_tokens: int = 65536,
    replay_tokens: int = 8192,
    gradient_checkpointing: bool = False,
) -> BlockPolicy:
    """A policy from a transformers decoder that was trained to fill in masked blocks.

    model: folder or hub name. block_size: tokens that are filled in together; steps: forwards for a block at most (block_size
    without it); threshold: tokens of a higher probability are decided at once. likelihood: "block" or "order", see
    `BlockAnswers.scored`; likelihood_size: of the blocks of "block" (block_size without it). mask_token: as the tokenizer writes
    it (its own without it). architecture: of transformers, such as "qwen3", for weights of that form that come with code of their
    own, which is not run (SDAR). dtype: of the weights; autocast: of the computation. chat, system, template: the chat template, a
    message before each prompt's own, further arguments of the template. lora: rank, alpha and targets of adapters; without it
    the model is trained whole. rollout_tokens, replay_tokens: of prompts, answers and masked copies computed at once.
    """
    if attention not in ATTENTION:
        raise ValueError(
            f"policy.attention is {attention!r}; expected {' or '.join(ATTENTION)}, which take masks of blocks"
        )
    if Path(model).is_absolute() and not Path(model).is_dir():
        raise ValueError(f"policy.model is {model!r}, and there is no such folder")
    sampling = Sampling(max_new_tokens, temperature)
    unmasking = Unmasking(block_size, block_size if steps is None else steps, threshold)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = getattr(torch, dtype)
    config = config_of(model, revision, architecture)
    found: dict[str, Any] = {"revision": revision, "config": config}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=kind, attn_implementation=attention, **found)
    tokenizer = AutoTokenizer.from_pretrained(model, **found)
    computed = None if autocast is None else getattr(torch, autocast)
    options = Options(rollout_tokens, replay_tokens, gradient_checkpointing, computed)
    reader = Reader(tokenizer, loaded, Reading(chat, system, template or {}))
    mask = token_of_masks(tokenizer, mask_token, loaded.config.vocab_size)
    answers = Answers(loaded.to(place), reader, sampling, options)
    size = block_size if likelihood_size is None else likelihood_size
    return BlockPolicy(BlockAnswers(answers, mask, unmasking, likelihood, size), lora=lora)
