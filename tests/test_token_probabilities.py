"""Scores of tokens in blocks against the plain formula, worked numbers and memory."""

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from pipelines import token_probabilities
from pipelines.token_probabilities import Head, logits, packed, scores, unpacked

N, D, V = 37, 8, 103


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def some_support(most: int) -> Tensor:
    """At most `most` of the vocabulary, the tokens 3 and 5 among them."""
    kept = torch.zeros(N, V, dtype=torch.bool)
    for row in range(N):
        kept[row, torch.randperm(V, generator=torch.Generator().manual_seed(row))[: 1 + row % (most - 2)]] = True
    kept[:, [3, 5]] = True
    return kept


def plain(head: Head, hidden: Tensor, token: Tensor, temperature: float, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    z = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    z = (z if head.cap is None else head.cap * torch.tanh(z / head.cap)) / temperature
    z = z if head.never is None else z.index_fill(1, head.never, -1e30)
    z = z if kept is None else z.masked_fill(~kept, -1e30)
    log_prob = z.log_softmax(1)
    return log_prob[torch.arange(N), token], -(log_prob.exp() * log_prob).sum(1)


@pytest.mark.parametrize("cap", [None, 3.0], ids=["no cap", "soft-cap"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("never", [None, [0, 17, 102]], ids=["all", "some never"])
@pytest.mark.parametrize("blocks", [(N, V + 1), (5, 16), (1, 8), (64, 1000)], ids=str)
def test_blocks_give_value_and_gradient_of_the_plain_formula(monkeypatch, cap, bias, truncated, never, blocks) -> None:
    kept = some_support(7) if truncated else None
    token = torch.where(torch.arange(N) % 2 == 0, 3, 5)
    found = []
    for way in ("plain", "whole", "blocks"):
        hidden, weight, shift = (numbers(*shape, seed=place) for place, shape in enumerate([(N, D), (V, D), (V,)]))
        leaves = [leaf.requires_grad_() for leaf in (hidden, weight, shift)]
        head = Head(weight, shift if bias else None, 0.7, cap, None if never is None else torch.tensor(never))
        if way == "plain":
            result = plain(head, hidden, token, 0.8, kept)
        else:
            if way == "blocks":
                monkeypatch.setattr(token_probabilities, "AT_ONCE", 0)
                monkeypatch.setattr(token_probabilities, "BLOCK_TOKENS", blocks[0])
                monkeypatch.setattr(token_probabilities, "BLOCK_VOCABULARY", blocks[1])
            result = scores(head, hidden, token, 0.8, None if kept is None else packed(kept, 0))
        by_log_prob, by_entropy = numbers(N, seed=7), numbers(N, seed=8)
        (result[0] * by_log_prob + result[1] * by_entropy).sum().backward()
        found.append([*(value.detach() for value in result), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for ours in found[1:]:
        assert len(ours) == len(found[0])
        for value, expected in zip(ours, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [0, 10**6])
def test_scores_equal_the_worked_example(monkeypatch, at_once) -> None:
    monkeypatch.setattr(token_probabilities, "AT_ONCE", at_once)
    monkeypatch.setattr(token_probabilities, "BLOCK_VOCABULARY", 2)
    head = Head(torch.tensor([[2.0], [-1.0], [0.5], [3.0], [1.0]]))
    found = scores(head, torch.ones(1, 1), torch.tensor([3]))
    assert found.log_prob.item() == pytest.approx(-0.472261, abs=1e-6)
    assert found.entropy.item() == pytest.approx(1.044109, abs=1e-6)


def test_only_one_of_two_gradients_may_be_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(token_probabilities, "AT_ONCE", 0)
    weight, hidden, token = numbers(V, D, seed=0), numbers(N, D, seed=1), torch.full((N,), 3)
    for place in (0, 1):
        leaf = hidden.clone().requires_grad_()
        scores(Head(weight), leaf, token)[place].sum().backward()
        again = hidden.clone().requires_grad_()
        plain(Head(weight), again, token, 1.0, None)[place].sum().backward()
        torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient(monkeypatch) -> None:
    monkeypatch.setattr(token_probabilities, "AT_ONCE", 0)
    weight, hidden = numbers(V, D, seed=0), numbers(N, D, seed=1).requires_grad_()
    scores(Head(weight), hidden, torch.zeros(N, dtype=torch.int64)).log_prob.sum().backward()
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("most", [0, 3], ids=["bits", "ids"])
@pytest.mark.parametrize("vocabulary", [103, 104])
def test_a_support_comes_back_as_it_was_packed(most, vocabulary) -> None:
    kept = torch.zeros(5, vocabulary, dtype=torch.bool)
    for row in range(5):
        kept[row, [row, 50 + row, 102][: 1 + row % 3]] = True
    small = packed(kept, most)
    assert torch.equal(unpacked(small, vocabulary), kept)
    assert small.shape == ((5, 3) if most else (5, 13))


def test_logits_in_bfloat16_come_back_in_float32() -> None:
    head = Head(numbers(V, D, seed=0).bfloat16())
    assert logits(head, numbers(N, D, seed=1).bfloat16()).dtype == torch.float32


def test_logits_are_never_held_for_a_whole_batch() -> None:
    tokens, width, vocabulary = 1500, 16, 20000
    weight = numbers(vocabulary, width, seed=0).requires_grad_()
    hidden = numbers(tokens, width, seed=1).requires_grad_()
    with profile(profile_memory=True) as recorded:
        found = scores(Head(weight), hidden, torch.zeros(tokens, dtype=torch.int64))
        (found.log_prob.sum() + found.entropy.sum()).backward()
    level = peak = 0
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    blocks = 4 * token_probabilities.BLOCK_TOKENS * token_probabilities.BLOCK_VOCABULARY
    assert 0 < peak < 7 * blocks  # a few temporaries of one block, whatever the number of tokens
    assert peak < 2 * 4 * tokens * vocabulary
