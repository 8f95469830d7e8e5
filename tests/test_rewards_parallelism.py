"""Rewards of tokens per forward and of letters in any order, with answers worked out by hand."""

import pytest
import torch

from mmgrpo.data import requests
from mmgrpo.types import Prompt, Samples
from rewards.letters import same_letters
from rewards.parallelism import tokens_per_forward, within


def samples(texts: list[str], target: object = "abca", **fields: list[int]) -> Samples:
    asked = requests([Prompt(0, "abca=", target=target)], [0], group_size=len(texts), seed=0, iteration=0)
    return Samples(asked, text=tuple(texts), **{name: torch.tensor(values) for name, values in fields.items()})


def test_tokens_per_forward_are_a_quotient_and_nothing_without_forwards():
    found = tokens_per_forward(samples([""] * 4, length=[8, 8, 5, 3], forwards=[2, 8, 4, 0]))
    assert found.tolist() == [4.0, 1.0, 1.25, 0.0] and found.dtype == torch.float32


def test_samples_without_a_number_of_forwards_are_refused():
    with pytest.raises(ValueError, match="do not say how many forwards they took"):
        tokens_per_forward(samples([""], length=[8]))


def test_answers_near_the_limit_are_wrong():
    given = samples(["abca", "abca", "aabc", "aa"], length=[4, 10, 11, 20])
    assert within(given, reward=same_letters, limit=16).tolist() == [1, 1, 0, 0]
    assert within(given, reward=same_letters, limit=16, margin=0).tolist() == [1, 1, 1, 0]
    silent = within(samples(["a"], target=None, length=[16]), reward=same_letters, limit=16)
    assert silent.isnan().all()
    with pytest.raises(ValueError, match="limit is 5 and margin 5 tokens"):
        within(given, reward=same_letters, limit=5)
    with pytest.raises(ValueError, match="components"):
        within(given, reward=lambda given: {"a": torch.zeros(4)}, limit=16)


def test_letters_count_in_any_order_each_as_often_as_asked():
    found = same_letters(samples(["abca", "caab", "aabc ", "abc", "abcaa", "abcc", ""]))
    assert found.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert same_letters(samples(["a"], target=None)).isnan().all()
    with pytest.raises(ValueError, match="prompt 0 has the target 5 of type int; expected a text"):
        same_letters(samples(["a"], target=5))
