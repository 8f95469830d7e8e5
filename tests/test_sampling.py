"""Draws of tokens against their probabilities, truncations against worked examples, ends of texts."""

import pytest
import torch
from tiny_vlms import NAMED

from pipelines.sampling import Sampling, draw, end_of, uniforms

CPU = torch.device("cpu")


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    log_prob = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    drawn = draw(log_prob.expand(20000, 4), uniforms(0, range(20000), 1)[:, 0])
    shares = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), rtol=0, atol=0.012)  # over three deviations


def test_the_ends_of_the_unit_interval_give_the_first_and_last_possible_token() -> None:
    log_prob = torch.tensor([[-torch.inf, 0.3, 0.2, -1e30, -1e30]]).log_softmax(1)
    assert draw(log_prob, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert (
        draw(log_prob, torch.tensor([1.0], dtype=torch.float64)).item() == 2
    )  # beyond any draw: rounding at its worst


def test_random_numbers_depend_on_the_seed_and_the_sample_alone() -> None:
    both = uniforms(3, [7, 11], 5)
    assert torch.equal(uniforms(3, [11], 5)[0], both[1]) and torch.equal(uniforms(3, [11], 9)[0, :5], both[1])
    assert not torch.equal(both[0], both[1]) and not torch.equal(uniforms(4, [7], 5)[0], both[0])
    assert (both >= 0).all() and (both < 1).all()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [1, 1, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),  # 0.5 alone reaches it
        ({"top_p": 0.6}, [1, 1, 0, 0]),
        ({"min_p": 0.3}, [1, 1, 0, 0]),  # 0.3 of 0.5 is 0.15
        ({"min_p": 0.1}, [1, 1, 1, 1]),
        ({"top_k": 3, "top_p": 0.9}, [1, 1, 1, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # of what the first leaves, 0.5 / 0.8
    ],
    ids=str,
)
def test_truncations_keep_what_they_say(options, kept) -> None:
    scaled = torch.tensor([[0.5, 0.3, 0.12, 0.08]]).log()
    found = Sampling(4, **options).kept(scaled)
    assert found is not None and found.int().tolist() == [kept]
    assert Sampling(4).kept(scaled) is None


def test_a_text_ends_at_any_end_token_or_where_a_stop_string_is_complete() -> None:
    tokenizer = NAMED["Qwen3ForCausalLM"].build().tokenizer
    ids = tokenizer("a stop b", add_special_tokens=False).input_ids
    end = end_of([3, 5], tokenizer, ["stop"], CPU)
    reached = [bool(end.reached(torch.tensor([ids[:count]]))) for count in range(1, len(ids) + 1)]
    assert reached == [count == len("a stop") for count in range(1, len(ids) + 1)]
    assert end.reached(torch.tensor([[9, 5], [5, 9]])).tolist() == [True, False]
    assert end_of(None, tokenizer, [], CPU).tokens.tolist() == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-text token and policy\.stop is empty"):
        end_of(None, tokenizer, [], CPU)
