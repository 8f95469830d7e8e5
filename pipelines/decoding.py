"""Texts written token by token, with the log-probs of the sampler. Axes: B texts, S tokens at most, V vocabulary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipelines import prefix, token_probabilities
from pipelines.prefix import Prefix
from pipelines.sampling import End, Sampling, draw

if TYPE_CHECKING:
    from pipelines.guidance import Guide


@dataclass
class Written:
    """What was sampled; what lies behind a text's end is 0."""

    token: Tensor  # (B, S) int64
    log_prob: Tensor  # (B, S) float32, of the distribution that was sampled
    length: Tensor  # (B,) int64, the end included
    finished: Tensor  # (B,) bool: ended by itself
    support: Tensor | None  # (B, S, K) as `token_probabilities.packed`, if the distribution leaves tokens out
    vocabulary: Tensor | None = None  # (B, S) uint8: which tokens there were to choose from, if that changes


class Choice(NamedTuple):
    token: Tensor  # (n,) int64
    log_prob: Tensor  # (n,)
    kept: Tensor | None  # (n, V) bool: what the distribution keeps, None for all


def choice(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Choice:
    """One token for each row, from (n, V) logits and (n,) random numbers; without these the likeliest."""
    scaled = logits / sampling.temperature
    kept = sampling.kept(scaled)
    log_prob = (scaled if kept is None else scaled.masked_fill(~kept, -torch.inf)).log_softmax(1)
    token = log_prob.argmax(1) if uniform is None else draw(log_prob, uniform)
    return Choice(token, log_prob.gather(1, token.unsqueeze(1)).squeeze(1), kept)


class Chooses(Protocol):
    """Chooses the next token of every row that is alive, and notes it."""

    written: Written
    end: End
    sampling: Sampling

    @property
    def alive(self) -> Tensor:
        """The rows that are still written; (n,) int64."""
        ...

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing is left to write."""
        ...

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row that is alive, from its logits; (n, V) -> (n,) int64."""
        ...

    def drop_finished(self) -> Tensor:
        """Which of the rows go on, after the token that was just chosen; (n,) bool."""
        ...


class Writer:
    """Chooses the next token of every row and notes what it chose."""

    def __init__(self, uniform: Tensor | None, sampling: Sampling, end: End, rows: int, device: torch.device) -> None:
        steps = sampling.max_new_tokens
        self.sampling, self.end, self.uniform = sampling, end, uniform  # without random numbers the likeliest is chosen
        zeros = torch.zeros(rows, steps, device=device)
        self.written = Written(
            zeros.long(), zeros, zeros[:, 0].long(), torch.zeros(rows, dtype=torch.bool, device=device), None
        )
        self.alive = torch.arange(rows, device=device)  # rows that are still written
        self.step = 0

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.sampling.max_new_tokens - self.step

    @property
    def done(self) -> bool:
        """Whether nothing is left to write."""
        return len(self.alive) == 0 or self.left == 0

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row that is alive, from its logits; (n, V) -> (n,) int64."""
        uniform = None if self.uniform is None else self.uniform[self.alive, self.step]
        token, log_prob, kept = choice(logits, self.sampling, uniform)
        if kept is not None:
            self._note(kept)
        self.put(token, log_prob)
        return token

    def put(self, token: Tensor, log_prob: Tensor) -> None:
        """Note the next token of each row that is alive; (n,) each."""
        self.written.token[self.alive, self.step] = token
        self.written.log_prob[self.alive, self.step] = log_prob.float()
        self.step += 1
        self.written.length[self.alive] = self.step

    def _note(self, kept: Tensor) -> None:
        small = token_probabilities.packed(kept, self.sampling.top_k)
        if self.written.support is None:
            size = (*self.written.token.shape, small.shape[1])
            self.written.support = torch.zeros(size, dtype=small.dtype, device=small.device)
        self.written.support[self.alive, self.step] = small

    def drop_finished(self) -> Tensor:
        """Which of the rows go on, after the token that was just chosen; (n,) bool."""
        ended = self.end.reached(self.written.token[self.alive, : self.step])
        self.written.finished[self.alive] = ended
        self.alive = self.alive[~ended]
        return ~ended


@torch.no_grad()
def write(
    model: PreTrainedModel,
    logits: Callable[[Tensor], Tensor],
    prompt: Prefix,
    writer: Chooses,
    guide: "Guide | None" = None,
) -> Written:
    """Continue every row of a prompt `with_room` until all have ended; ended rows leave the batch once half have."""
    last, going = prompt.last, torch.ones(len(prompt.last), dtype=torch.bool, device=prompt.last.device)
    while True:
        token = torch.zeros(len(going), dtype=torch.int64, device=going.device)
        token[going] = writer.choose(logits(last[going]))
        going[going.clone()] = writer.drop_finished()
        if writer.done:
            return writer.written
        if 2 * int(going.sum()) <= len(going):
            rows = going.nonzero().flatten()
            prompt, token = prefix.with_room(prompt, rows, writer.left), token[rows]
            if guide is not None:
                guide.keep(rows, writer.left)
            going = going[rows]
        hidden, prompt = prefix.read_on(model, prompt, token.unsqueeze(1))
        last = hidden[:, -1] if guide is None else guide.guided(hidden[:, -1], token, going)


class Chooser(LogitsProcessor):
    """Makes the library's own loop write what a `Writer` chooses."""

    def __init__(self, writer: Chooses, never: Tensor) -> None:
        self.writer, self.never = writer, never
        self.going = torch.ones(len(writer.alive), dtype=torch.bool, device=writer.alive.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        if not self.writer.done:
            allowed = token_probabilities.without(scores[self.going].float(), self.never)
            token[self.going] = self.writer.choose(allowed)
            self.going[self.going.clone()] = self.writer.drop_finished()
        return torch.full_like(scores, -torch.inf).scatter_(1, token.unsqueeze(1), 0.0)


@torch.no_grad()
def write_by_library(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    writer: Chooses,
    never: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> Written:
    """Continue whole prompts, one for each row, with the model's own loop and cache."""
    config = GenerationConfig(
        max_new_tokens=writer.sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=writer.end.tokens.tolist() or None,
        pad_token_id=0,
    )
    stop: dict[str, Any] = (
        {"stop_strings": list(writer.sampling.stop), "tokenizer": tokenizer} if writer.sampling.stop else {}
    )
    chooser = LogitsProcessorList([Chooser(writer, never)])
    model.generate(**inputs, generation_config=config, logits_processor=chooser, **stop)
    return writer.written
