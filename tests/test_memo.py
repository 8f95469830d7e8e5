"""Remembered encodings are those of the module, also where a call continues from a state that it changes."""

import torch
from tiny_pipelines.parts import fresh
from transformers import GPT2Config, GPT2LMHeadModel

from pipelines.memo import Memo


def language_model() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    return fresh(GPT2LMHeadModel, config)


def continued(call, tokens: torch.Tensor) -> torch.Tensor:
    """The scores of three greedy tokens, each from the cache of those before; (B, L) -> (B, 3, V)."""
    answer, scores = call(input_ids=tokens), []
    for _ in range(3):
        scores.append(answer.logits[:, -1])
        tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], 1)
        cache = answer.past_key_values
        answer = call(input_ids=tokens if cache is None else tokens[:, -1:], past_key_values=cache)
    return torch.stack(scores, 1)


def test_a_language_model_that_continues_from_its_cache_says_the_same_remembered_or_not():
    model, memo = language_model(), Memo("test")
    tokens = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = continued(model, tokens)

    def remembered(**kwargs: object) -> object:
        return memo.call("language_model", model.forward, (), kwargs)

    for rows in ([0], [1, 2], [0, 1, 2], [2], [0]):  # first seen alone, first seen together, and seen before
        torch.testing.assert_close(continued(remembered, tokens[rows]), expected[rows])
    assert memo.hits > 0


def test_what_a_caller_changes_in_an_answer_is_not_remembered():
    model, memo = language_model(), Memo("test")
    tokens = torch.arange(5).unsqueeze(0)
    first = memo.call("language_model", model.forward, (tokens,), {})
    length = first.past_key_values.get_seq_length()
    model(tokens[:, :1], past_key_values=first.past_key_values)
    first.logits.zero_()
    again = memo.call("language_model", model.forward, (tokens,), {})
    assert memo.hits == 1 and again.past_key_values.get_seq_length() == length and again.logits.abs().max() > 0


def test_what_was_not_used_for_longest_is_forgotten_at_the_limit_in_bytes():
    memo = Memo("test", limit=3 * 40)
    for row in (0, 1, 2, 0, 3, 0, 1):  # ten numbers of four bytes each
        memo.call("double", lambda x: 2 * x, (torch.full((1, 10), float(row)),), {})
    assert (memo.hits, memo.misses, memo.held, len(memo.rows)) == (2, 5, 120, 3)
