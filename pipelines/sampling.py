"""One token at a time: the distribution that is sampled, the draw, and when a text ends. Axes: n rows, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StopStringCriteria

from mmgrpo import seeds


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the log-probs of a policy are those of this distribution."""

    max_new_tokens: int  # S, where a text is cut off
    temperature: float = 1.0  # logits are divided by it
    top_p: float = 1.0  # of the most likely tokens, those that reach this probability together; 1 is all
    top_k: int = 0  # the most likely tokens; 0 is all
    min_p: float = 0.0  # tokens at least this likely relative to the most likely one; 0 is all
    stop: tuple[str, ...] = ()  # a text ends with the token that completes one of these

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": (self.max_new_tokens < 1, "at least 1"),
            "temperature": (
                not 0 < self.temperature < float("inf"),
                "a positive number; greedy texts are for evaluation",
            ),
            "top_p": (not 0 < self.top_p <= 1, "a number above 0, at most 1"),
            "top_k": (self.top_k < 0, "0 for all, or a number of tokens"),
            "min_p": (not 0 <= self.min_p < 1, "a number from 0, below 1"),
            "stop": ("" in self.stop, "no empty text"),
        }
        for name, (bad, expected) in wrong.items():
            if bad:
                raise ValueError(f"policy.{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def truncates(self) -> bool:
        """Whether the distribution leaves tokens out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def kept(self, scaled: Tensor) -> Tensor | None:
        """Which tokens the distribution keeps, None for all; logits / temperature (n, V) -> (n, V) bool."""
        if not self.truncates:
            return None
        steps = LogitsProcessorList()
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            steps.append(MinPLogitsWarper(self.min_p))
        return ~steps(scaled.new_zeros(len(scaled), 0, dtype=torch.int64), scaled).isneginf()


def uniforms(seed: int, samples: Sequence[int], steps: int) -> Tensor:
    """The random numbers of each sample's tokens, in [0, 1); (n, S) float64, from the run's seed and the sample's id alone."""
    rows = [
        torch.rand(
            steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds.derive(seed, "tokens", sample))
        )
        for sample in samples
    ]
    return torch.stack(rows)


def draw(log_prob: Tensor, uniform: Tensor) -> Tensor:
    """Tokens by inversion of the distribution function; (n, V) log-probs, (n,) in [0, 1) -> (n,) int64."""
    reached = log_prob.exp().cumsum(1, dtype=torch.float64)  # (n, V)
    total = reached[:, -1:].contiguous()
    token = torch.searchsorted(reached, uniform.unsqueeze(1) * total, right=True)
    last = torch.searchsorted(reached, total)  # rounding may lead past the last possible token
    return torch.minimum(token, last).squeeze(1)


@dataclass(frozen=True)
class End:
    """When a text ends: at one of the model's end tokens, or with the token that completes a stop string."""

    tokens: Tensor  # (e,) int64
    strings: StopStringCriteria | None = field(default=None)

    def reached(self, text: Tensor) -> Tensor:
        """Whether the last token of each row ends it; (n, t) int64 ids of the completion -> (n,) bool."""
        ended = torch.isin(text[:, -1], self.tokens)
        return ended if self.strings is None else ended | self.strings(text, None)


def end_of(
    tokens: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], device: torch.device
) -> End:
    """The end tokens of the model's generation settings, else the tokenizer's; raises ValueError if there is no end."""
    named = tokenizer.eos_token_id if tokens is None else tokens
    if named is None and not stop:
        raise ValueError("the model names no end-of-text token and policy.stop is empty; expected one of them")
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    strings = StopStringCriteria(tokenizer, list(stop)) if stop else None
    return End(torch.tensor(listed, dtype=torch.int64, device=device), strings)
