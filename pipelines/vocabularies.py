"""What may stand at each place of an answer of texts and images, and how likely it is there.

A text is written with the tokens of text and the mark that begins an image; an image, once begun, is of one size, so that
its marks are known and only its codes are chosen. Axes: B answers, S tokens at most, N tokens, D features, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipelines import token_probabilities
from pipelines.picture_tokens import Layout
from pipelines.sampling import Sampling
from pipelines.token_probabilities import Head, Scores

FORCED = 0  # no choice
TEXT = 1  # words, an end, the begin of an image
TEXT_ALONE = 2  # words and an end, where no image may begin
CODE = 3  # the codes of an image


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that are chosen from at a kind of place: those of a span of ids that are not left out."""

    first: int
    stop: int  # the id behind the span
    never: Tensor  # (m,) int64, places of the span that are left out
    sampling: Sampling

    def head(self, head: Head) -> Head:
        """The last layer for the span alone; token `first` is number 0 of it."""
        bias = None if head.bias is None else head.bias[self.first : self.stop]
        weight = head.weight[self.first : self.stop]
        return head._replace(weight=weight, bias=bias, never=self.never)

    def of(self, logits: Tensor) -> Tensor:
        """The logits of the span; (n, V) -> (n, stop - first)."""
        return token_probabilities.without(logits[:, self.first : self.stop], self.never)


def vocabulary(allowed: Tensor, sampling: Sampling) -> Vocabulary:
    """The smallest span with the given ids, (a,) int64, and what to leave out of it."""
    first, stop = int(allowed.min()), int(allowed.max()) + 1
    span = torch.arange(first, stop, device=allowed.device)
    return Vocabulary(first, stop, (~torch.isin(span, allowed)).nonzero().flatten(), sampling)


@dataclass(frozen=True)
class Grammar:
    """Answers of texts and at most `most` images."""

    layout: Layout
    vocabularies: Mapping[int, Vocabulary]  # for each kind of place but FORCED
    most: int
    guidance: float = 1.0  # of the codes' logits: without the prompt + guidance * (with it - without it)

    @cached_property
    def pattern(self) -> Tensor:
        return self.layout.pattern

    def scores(self, head: Head, hidden: Tensor, token: Tensor, kinds: Tensor, support: Tensor | None) -> Scores:
        """Log-prob and entropy of tokens among those that were to choose from, 0 of forced ones; (N,) each.

        hidden (N, D); token, kinds (N,) int64; support as `composing.Composer` recorded it, N rows.
        """
        log_prob = torch.zeros(len(token), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = torch.zeros_like(log_prob)
        for kind, known in self.vocabularies.items():
            rows = (kinds == kind).nonzero().flatten()
            if len(rows) == 0:
                continue
            kept = support[rows] if support is not None and known.sampling.truncates else None
            narrow, chosen = known.head(head), token[rows] - known.first
            found = token_probabilities.scores(narrow, hidden[rows], chosen, known.sampling.temperature, kept)
            log_prob = log_prob.index_put((rows,), found.log_prob.to(log_prob.dtype))
            entropy = entropy.index_put((rows,), found.entropy.to(entropy.dtype))
        return Scores(log_prob, entropy)


def grammar(
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    ends: Tensor,
    text: Sampling,
    code: Sampling,
    most: int,
    guidance: float,
) -> Grammar:
    """The grammar of a model whose special tokens never stand in a text, but for those that end it, (e,) int64."""
    special: set[int | None] = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids, layout.begin, layout.row_end, *layout.after, *layout.codes.tolist()}
    plain = torch.tensor([number for number in range(len(tokenizer)) if number not in special])
    words = torch.cat([plain.to(ends.device), ends]).unique()
    known = {
        TEXT: vocabulary(torch.cat([words, words.new_tensor([layout.begin])]), text),
        TEXT_ALONE: vocabulary(words, text),
        CODE: vocabulary(layout.codes.to(ends.device), code),
    }
    return Grammar(layout, known, most, guidance)
