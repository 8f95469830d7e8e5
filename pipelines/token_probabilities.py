"""Log-probability and entropy of tokens from the hidden states before a language model's last layer.

Logits are never held for a whole batch: where they would be large they come in blocks of tokens and of the vocabulary, and
are computed again in the backward pass. Axes: N tokens, D features, V vocabulary, n and C blocks of tokens and vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_TOKENS = 1024  # n
BLOCK_VOCABULARY = 8192  # C, a multiple of 8
NEVER = -1e30  # a logit whose probability is 0, and 0 times which is 0
AT_ONCE = 2**23  # logits up to which a batch is computed whole, 32 MB each in float32


class Head(NamedTuple):
    """The last layer as arithmetic: logits = soft-cap of scale * (h W^T + b)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None  # z -> cap * tanh(z / cap)
    never: Tensor | None = None  # (m,) int64 ids that are never chosen


class Scores(NamedTuple):
    """What the policy thinks of the tokens that were chosen; (N,) float32 each."""

    log_prob: Tensor
    entropy: Tensor  # of the whole distribution, nats


def logits(head: Head, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """(N, D) -> (N, C) at least float32, of the vocabulary from `start` to `stop`."""
    bias = None if head.bias is None else head.bias[start:stop]
    raw = functional.linear(hidden, head.weight[start:stop], bias)
    scaled = raw.to(torch.promote_types(raw.dtype, torch.float32)) * head.scale
    capped = scaled if head.cap is None else head.cap * torch.tanh(scaled / head.cap)
    return capped if head.never is None else without(capped, head.never - start)


def without(logits: Tensor, never: Tensor) -> Tensor:
    """Logits (n, C) in which the given columns, as far as they exist, have probability 0."""
    columns = never[(never >= 0) & (never < logits.shape[1])]
    return logits.index_fill(1, columns, NEVER) if len(columns) else logits


def scores(
    head: Head, hidden: Tensor, token: Tensor, temperature: float = 1.0, support: Tensor | None = None
) -> Scores:
    """Scores of the given tokens under softmax(logits / temperature), restricted to the support where there is one.

    hidden (N, D); token (N,) int64; support as `packed` gives it, N rows.
    """
    if len(token) * len(head.weight) <= AT_ONCE:
        return _at_once(head, hidden, token, temperature, support)
    return Scores(*_Blocks.apply(hidden, *head, token, support, temperature))


def packed(kept: Tensor, most: int) -> Tensor:
    """The tokens that a truncated distribution keeps, in the smaller of two forms; (n, V) bool ->

    (n, most) int32 ids, the first repeated where fewer than `most` are kept, or (n, V / 8) uint8 bits.
    """
    vocabulary = kept.shape[1]
    if 0 < most * 4 <= vocabulary // 8:
        values, ids = kept.int().topk(most, dim=1)
        return torch.where(values > 0, ids, ids[:, :1]).int()
    padded = functional.pad(kept, (0, -vocabulary % 8)).view(len(kept), -1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(2, dtype=torch.uint8)


def unpacked(support: Tensor, vocabulary: int) -> Tensor:
    """What `packed` packed; -> (n, V) bool."""
    if support.dtype == torch.int32:
        kept = torch.zeros(len(support), vocabulary, dtype=torch.bool, device=support.device)
        return kept.scatter_(1, support.long(), True)
    bits = (support.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=support.device)) & 1
    return bits.flatten(1)[:, :vocabulary].bool()


def _at_once(head: Head, hidden: Tensor, token: Tensor, temperature: float, support: Tensor | None) -> Scores:
    z = logits(head, hidden)  # (N, V)
    if temperature != 1:
        z = z / temperature
    if support is not None:
        z = z.masked_fill(~unpacked(support, z.shape[1]), NEVER)
    return Scores(*_Whole.apply(z, token))


class _Whole(torch.autograd.Function):
    """Log-prob of the tokens and entropy of softmax(z); keeps one (N, V) tensor for backward, where plain autograd keeps three."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        log_prob = z.log_softmax(1)
        entropy = -torch.linalg.vecdot(log_prob.exp(), log_prob, dim=1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_prob, token, entropy)
        return log_prob.gather(1, token.unsqueeze(1)).squeeze(1), entropy

    @staticmethod
    def backward(ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor, None]:
        log_prob, token, entropy = ctx.saved_tensors
        by_own = torch.zeros_like(entropy) if by_log_prob is None else by_log_prob
        slope = log_prob.exp()
        if by_entropy is None:
            slope.mul_(-by_own.unsqueeze(1))
        else:
            surprise = (log_prob + entropy.unsqueeze(1)).mul_(by_entropy.unsqueeze(1))
            slope.mul_(surprise.add_(by_own.unsqueeze(1)).neg_())
        return slope.scatter_add_(1, token.unsqueeze(1), by_own.unsqueeze(1)), None


class _Blocks(torch.autograd.Function):
    """`_at_once` in blocks: one pass for the normaliser and the mean of z, one more in backward for the probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        cap: float | None,
        never: Tensor | None,
        token: Tensor,
        support: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, scale, cap, never)
        parts = [
            _summed(head, hidden[rows], token[rows], temperature, None if support is None else support[rows])
            for rows in _spans(len(hidden), BLOCK_TOKENS)
        ]
        log_prob, entropy, normaliser = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, never, token, support, normaliser, entropy)
        ctx.options = scale, cap, temperature
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, never, token, support, normaliser, entropy = ctx.saved_tensors
        scale, cap, temperature = ctx.options
        wanted = ctx.needs_input_grad
        into_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
        into_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        into_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        head = Head(weight, bias, scale, cap, never)
        for rows in _spans(len(hidden), BLOCK_TOKENS):
            kept = None if support is None else unpacked(support[rows], len(weight))
            for part in _spans(len(weight), BLOCK_VOCABULARY):
                z = logits(head, hidden[rows], part.start, part.stop)
                log_prob = (z / temperature).sub_(normaliser[rows].unsqueeze(1))
                prob = log_prob.exp()
                if kept is not None:
                    prob.masked_fill_(~kept[:, part], 0)
                slope = torch.zeros_like(prob)
                if by_log_prob is not None:
                    slope.addcmul_(prob, by_log_prob[rows].unsqueeze(1), value=-1)
                    _add_chosen(slope, token[rows], part, by_log_prob[rows])
                if by_entropy is not None:
                    surprise = log_prob.add_(entropy[rows].unsqueeze(1)).mul_(by_entropy[rows].unsqueeze(1))
                    slope.addcmul_(prob, surprise, value=-1)
                slope *= scale / temperature
                if cap is not None:
                    slope *= (1 - (z / cap).square()).clamp(min=0)  # below 0 only at what is never chosen
                if into_hidden is not None:
                    into_hidden[rows] += slope.to(weight.dtype) @ weight[part]
                if into_weight is not None:
                    into_weight[part] += slope.to(hidden.dtype).T @ hidden[rows]
                if into_bias is not None:
                    into_bias[part] += slope.sum(0)
        grads = (into_hidden, hidden), (into_weight, weight), (into_bias, bias)
        return *(None if grad is None else grad.to(like.dtype) for grad, like in grads), *[None] * 6


def _summed(
    head: Head, hidden: Tensor, token: Tensor, temperature: float, support: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the tokens, entropy and log-normaliser of one block of tokens, over running sums; (n,) each."""
    kept = None if support is None else unpacked(support, len(head.weight))
    top = torch.full((len(hidden),), -torch.inf, device=hidden.device)  # the largest z so far
    total, weighted, chosen = (
        torch.zeros_like(top) for _ in range(3)
    )  # sum e^(z - top), sum e^(z - top) z, z of the token
    for part in _spans(len(head.weight), BLOCK_VOCABULARY):
        z = (logits(head, hidden, part.start, part.stop) / temperature).float()
        inside = (token >= part.start) & (token < part.stop)
        place = (token - part.start).clamp(0, z.shape[1] - 1).unsqueeze(1)
        chosen = torch.where(inside, z.gather(1, place).squeeze(1), chosen)
        allowed = z if kept is None else z.masked_fill(~kept[:, part], NEVER)
        higher = torch.maximum(top, allowed.amax(1))
        base = higher.clamp(min=torch.finfo(torch.float32).min)  # nothing kept so far: e^-inf, not e^nan
        shrink, raised = (top - base).exp(), (allowed - base.unsqueeze(1)).exp()
        total = total * shrink + raised.sum(1)
        weighted = weighted * shrink + (raised * torch.where(raised > 0, z, 0)).sum(1)
        top = higher
    normaliser = top + total.log()
    return chosen - normaliser, normaliser - weighted / total, normaliser


def _add_chosen(slope: Tensor, token: Tensor, part: slice, value: Tensor) -> None:
    """Add each row's value at its token, where that lies in this part of the vocabulary; slope (n, C) in place."""
    rows = ((token >= part.start) & (token < part.stop)).nonzero().flatten()
    slope[rows, token[rows] - part.start] += value[rows]


def _spans(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
