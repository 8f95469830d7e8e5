"""Writes the answers to prompts and reads them again: the part of a language policy that runs the model.

Axes: B answers, b those of one batch, P prompts, S tokens at most, T those of the longest answer of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmgrpo.types import Batch, Prompt, Trajectory
from pipelines import guidance, prefix, token_probabilities
from pipelines.checkpointing import checkpointed
from pipelines.composing import Composer
from pipelines.conversation import Encoded, Reader, collated
from pipelines.decoding import Chooses, Writer, Written, write, write_by_library
from pipelines.guidance import Guide
from pipelines.prefix import Prefix
from pipelines.sampling import End, Sampling, end_of, uniforms
from pipelines.token_batches import batches, families
from pipelines.token_probabilities import Head, Scores
from pipelines.vocabularies import Grammar

SAME_LOGITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # relative to the largest

MARKED = ("image", "video", "audio")
W = TypeVar("W")  # a record of tensors, as `Written`


@dataclass(frozen=True)
class Options:
    """How much is computed at once, and with what."""

    rollout_tokens: int = 65536  # prompt and answer tokens remembered while answers are written
    replay_tokens: int = 8192  # tokens of prompts and answers whose graph is held at once
    gradient_checkpointing: bool = False
    autocast: torch.dtype | None = None


class States(NamedTuple):
    """The tokens of a batch of answers, one after the other, and what they are predicted from."""

    hidden: Tensor  # (N, D)
    token: Tensor  # (N,) int64
    there: Tensor  # (b, T) bool: where they stand
    support: Tensor | None = None  # N rows, as `token_probabilities.packed` gives it
    vocabulary: Tensor | None = None  # (N,) which of the grammar's vocabularies


class Answers:
    """A model, its way of reading prompts, and how tokens are sampled."""

    def __init__(self, model: PreTrainedModel, reader: Reader, sampling: Sampling, options: Options) -> None:
        self.model, self.reader, self.sampling, self.options = model, reader, sampling, options
        self.shared = True  # the prompt is read once for all its answers
        self.head_form: tuple[float, float | None] = (1.0, None)  # scale and cap of the logits
        tokenizer = reader.tokenizer
        self.end: End = end_of(model.generation_config.eos_token_id, tokenizer, sampling.stop, model.device)
        self.never = media_marks(model)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.grammar: Grammar | None = None  # of answers of texts and images: what may stand where
        self.negative = Prompt(-1, "")  # what guidance leads away from

    # -- what is computed with ------------------------------------------------------------------------------------

    def precision(self) -> AbstractContextManager[object]:
        """The context in which the model runs."""
        wanted = self.options.autocast
        return nullcontext() if wanted is None else torch.autocast(self.model.device.type, dtype=wanted)

    def fine(self, hidden: Tensor) -> Tensor:
        """Hidden states in the precision of the last layer."""
        return hidden if self.options.autocast is None else hidden.to(self.options.autocast)

    @contextmanager
    def saving_memory(self) -> Iterator[None]:
        """Layers keep little for backward, where that was asked for and a graph is built."""
        with (
            checkpointed(self.model)
            if self.options.gradient_checkpointing and torch.is_grad_enabled()
            else nullcontext()
        ):
            yield

    @property
    def head(self) -> Head:
        """The model's last layer, as `find_head` found it to compute."""
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias, *self.head_form, self.never)

    @torch.no_grad()
    def find_head(self, prompt: Prompt) -> None:
        """Find how the model's logits follow from the states before its last layer; raises ValueError if not as `Head`."""
        layer = self.model.get_output_embeddings()
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"the last layer is a {type(layer).__name__}; expected a plain Linear, without an adapter or packing"
            )
        inputs = collated([self.reader.read(prompt)], self.pad, self.model.device)
        prepared = self.model.prepare_inputs_for_generation(
            inputs["input_ids"], use_cache=False, is_first_iteration=True, **prefix.opened(self.model, inputs)
        )
        hidden = prefix.hidden_states(self.model, prepared)[0, -1:]
        true = self.model(**prepared).logits[0, -1:].float()
        plain = token_probabilities.logits(Head(layer.weight, layer.bias), hidden)
        cap = self.model.config.get_text_config().to_dict().get("final_logit_softcapping")
        tried = []
        for form in ((1.0, None), (1.0, cap), (float((true * plain).sum() / plain.square().sum()), None)):
            error = (
                token_probabilities.logits(Head(layer.weight, layer.bias, *form), hidden) - true
            ).abs().max() / true.abs().max()
            if error < SAME_LOGITS[layer.weight.dtype]:
                self.head_form = form
                return
            tried.append(f"{float(error):.1e}")
        raise ValueError(f"the logits are no linear map of the last layer's input (relative errors {', '.join(tried)})")

    # -- rollout --------------------------------------------------------------------------------------------------

    def write(self, batch: Batch, explore: bool = True) -> Written:
        """An answer for each row; without exploration the likeliest token each time. Everything on the CPU."""
        encoded = [self.reader.read(prompt) for prompt in batch.prompts]
        twice = 2 if self.guided else 1  # a guide remembers what it reads as well
        reach = [part.length + twice * self.sampling.max_new_tokens for part in encoded]
        together = families(batch.group, [part.kind for part in encoded], [0] * len(batch), reach)
        parts = batches(together, self.options.rollout_tokens)
        found = [self._write_rows(batch.take(rows), [encoded[row] for row in rows], explore) for rows in parts]
        return in_order(found, torch.cat(parts))

    def _write_rows(self, batch: Batch, encoded: Sequence[Encoded], explore: bool) -> Written:
        device, steps = self.model.device, self.sampling.max_new_tokens
        writer = self._writer(batch, explore)
        with torch.no_grad(), self.precision():
            if not self.shared:
                inputs = collated(encoded, self.pad, device)
                return write_by_library(self.model, inputs, writer, self.never, self.reader.tokenizer)
            firsts, rows = shared_prompts(batch.group)
            prompt = prefix.encode(self.model, collated([encoded[row] for row in firsts], self.pad, device))
            guide = None
            if self.guided:
                assert isinstance(writer, Composer)
                guide = Guide(self.model, self.unasked(), writer, len(batch))
            return write(self.model, self.logits, prefix.with_room(prompt, rows.to(device), steps), writer, guide)

    def _writer(self, batch: Batch, explore: bool) -> Chooses:
        device = self.model.device
        drawn = uniforms(batch.seed, batch.sample.tolist(), self.sampling.max_new_tokens).to(device)
        writer = Writer(drawn if explore else None, self.sampling, self.end, len(batch), device)
        return writer if self.grammar is None else Composer(self.grammar, drawn, writer, explore)

    @property
    def guided(self) -> bool:
        """Whether images are led away from what the model expects without the prompt."""
        return self.grammar is not None and self.grammar.guidance != 1

    def unasked(self) -> Prefix:
        """The negative prompt, read."""
        return prefix.encode(self.model, collated([self.reader.read(self.negative)], self.pad, self.model.device))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V) float32, outside of autocast."""
        with torch.autocast(self.model.device.type, enabled=False):
            return token_probabilities.logits(self.head_for(self.fine(hidden)), self.fine(hidden))

    def head_for(self, hidden: Tensor) -> Head:
        """The last layer in the precision of the states that come to it."""
        head = self.head
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        return head._replace(weight=head.weight.to(hidden.dtype), bias=bias)

    # -- replay ---------------------------------------------------------------------------------------------------

    def batches(self, trajectory: Trajectory) -> list[Tensor]:
        """Rows that are read together, within the budget of tokens; the answers of a group side by side."""
        encoded = [self.reader.read(prompt) for prompt in trajectory.batch.prompts]
        together = families(
            trajectory.group,
            [part.kind for part in encoded],
            [part.length for part in encoded],
            (trajectory.record["length"] + self._read_twice(trajectory)).tolist(),
        )
        return batches(together, self.options.replay_tokens)

    def _read_twice(self, trajectory: Trajectory) -> Tensor:
        """Tokens of each answer's images that guidance reads once more; (B,) int64."""
        if not self.guided or self.grammar is None:
            return torch.zeros(len(trajectory), dtype=torch.int64)
        rows, _ = guidance.places(self.grammar, trajectory.record["token"], trajectory.record["length"])
        return rows.bincount(minlength=len(trajectory)) * len(self.grammar.pattern)

    def read(self, part: Trajectory) -> Scores:
        """Log-prob and entropy of every token of the answers under today's weights; (b, T) each, 0 behind their ends."""
        states = self.states(part)
        found = self._scores(*states[:2], states.support, states.vocabulary)
        empty = torch.zeros(states.there.shape, dtype=found.log_prob.dtype, device=states.there.device)
        return Scores(*(empty.masked_scatter(states.there, values) for values in found))

    def states(self, part: Trajectory) -> States:
        """What predicts the tokens of the answers, those behind their ends left out."""
        device, longest = self.model.device, int(part.record["length"].max())
        token = part.record["token"][:, :longest].to(device)
        there = torch.arange(longest, device=device) < part.record["length"].to(device).unsqueeze(1)  # (b, T)
        chosen = {
            name: part.record[name][:, :longest].to(device)[there]
            for name in ("support", "vocabulary")
            if name in part.record
        }
        with self.precision(), self.saving_memory():
            states = self._hidden(part, token)
            if self.guided:
                assert self.grammar is not None
                length = part.record["length"]
                states = guidance.replayed(self.model, self.grammar, self.unasked(), states, token, length)
            return States(self.fine(states[there]), token[there], there, **chosen)

    def _scores(
        self, hidden: Tensor, token: Tensor, support: Tensor | None = None, vocabulary: Tensor | None = None
    ) -> Scores:
        """(N, D) and (N,) -> (N,) each."""
        head = self.head_for(hidden)
        if self.grammar is None:
            return token_probabilities.scores(head, hidden, token, self.sampling.temperature, support)
        assert vocabulary is not None
        return self.grammar.scores(head, hidden, token, vocabulary.long(), support)

    def _hidden(self, part: Trajectory, token: Tensor) -> Tensor:
        """The states that predict the tokens; (b, T) -> (b, T, D)."""
        encoded = [self.reader.read(prompt) for prompt in part.batch.prompts]
        if not self.shared:
            return prefix.read_whole(self.model, collated(encoded, self.pad, token.device), token)
        firsts, rows = shared_prompts(part.group)
        prompt = prefix.encode(self.model, collated([encoded[row] for row in firsts], self.pad, token.device))
        prompt = prefix.repeat(prompt, rows.to(token.device))
        if token.shape[1] == 1:
            return prompt.last.unsqueeze(1)
        further, _ = prefix.read_on(self.model, prompt, token[:, :-1])
        return torch.cat([prompt.last.unsqueeze(1), further], dim=1)


def media_marks(model: PreTrainedModel) -> Tensor:
    """Ids of the marks of pictures, videos and sounds: an answer that held one would ask for a medium; (m,) int64."""
    named = model.config.to_dict()
    ids = {
        named[f"{medium}_token_{suffix}"]
        for medium in MARKED
        for suffix in ("id", "index")
        if f"{medium}_token_{suffix}" in named
    }
    return torch.tensor(sorted(item for item in ids if item is not None), dtype=torch.int64, device=model.device)


def shared_prompts(group: Tensor) -> tuple[list[int], Tensor]:
    """The first row of each group, and the number of each row's group among them; (B,) int64."""
    ids, number = group.unique(return_inverse=True)
    return [int((number == place).nonzero()[0]) for place in range(len(ids))], number


def in_order(parts: Sequence[W], order: Tensor) -> W:
    """The answers of several batches as one, row `order[i]` of it being the i-th of them; on the CPU."""
    joined: dict[str, Any] = {}
    for name in vars(parts[0]):
        values = [getattr(part, name) for part in parts]
        joined[name] = None if values[0] is None else torch.cat([value.cpu() for value in values])[order.argsort()]
    return type(parts[0])(**joined)
