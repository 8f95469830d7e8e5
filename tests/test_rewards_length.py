"""Length, overlong and repetition rewards against values worked out by hand."""

import time

import pytest
import torch
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples
from rewards.length import envelope, length_penalty, overlong, repeated, repetition_penalty


def written(*texts: str, length: list[int] | None = None) -> Samples:
    size = len(length) if length is not None else len(texts)
    ids = torch.arange(size)
    batch = Batch(tuple(Prompt(row, "tell") for row in range(size)), ids, ids, seed=0, iteration=0)
    return Samples(batch, text=texts or ("",) * size, length=None if length is None else torch.tensor(length))


def same(values: Tensor, expected: list[float]) -> None:
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_overlong_shaping_has_the_values_of_dapo():
    lengths = [0, 15000, 16384, 17000, 18432, 20480, 20481, 10**9]
    same(overlong(written(length=lengths)), [0, 0, 0, -0.150391, -0.5, -1, -1, -1])
    same(overlong(written(length=[5, 6, 8, 10, 11]), limit=10, cache=4), [0, 0, -0.5, -1, -1])


@pytest.mark.parametrize(("limit", "cache"), [(10, 0), (10, 11), (0, 0)])
def test_overlong_shaping_refuses_a_cache_that_does_not_fit_its_limit(limit: int, cache: int):
    with pytest.raises(ValueError, match=f"limit is {limit} and cache {cache} tokens; expected 0 < cache <= limit"):
        overlong(written(length=[1]), limit=limit, cache=cache)


def test_the_envelope_has_the_values_of_the_worked_example():
    count = [40, 50, 75, 100, 300, 400, 500, 501]
    scores = envelope(written(length=count), least=50, low=100, high=300, most=500)
    same(scores, [0, 0, 0.5, 1, 1, 0.5, 0, 0])
    with pytest.raises(ValueError, match="are 50, 40, 300, 500 tokens; expected an increasing order"):
        envelope(written(length=[1]), least=50, low=40, high=300, most=500)


def test_a_length_penalty_counts_tokens_above_the_wanted_or_on_both_sides():
    batch = written(length=[0, 90, 100, 110, 1100])
    same(length_penalty(batch, wanted=100, rate=0.01), [0, 0, 0, -0.1, -10])
    same(length_penalty(batch, wanted=100, rate=0.01, shorter=True), [-1, -0.1, 0, -0.1, -10])
    same(length_penalty(batch, wanted=100), [0, 0, 0, -0.003, -0.3])


@pytest.mark.parametrize(("wanted", "rate"), [(-1, 0.1), (1, -0.1), (1, float("inf")), (1, float("nan"))])
def test_a_length_penalty_that_rewards_length_is_refused(wanted: int, rate: float):
    with pytest.raises(ValueError, match=f"wanted is {wanted} tokens and rate {rate} per token"):
        length_penalty(written(length=[1]), wanted=wanted, rate=rate)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d e", 0),
        ("a b c a b c", 1 / 4),  # abc bca cab abc
        ("A b C  a B c", 1 / 4),
        ("a a a a a", 2 / 3),  # aaa three times
        ("a b c", 0),
        ("a b", 0),  # no three words
        ("", 0),
    ],
)
def test_the_share_of_repeated_triples_of_words_is_that_counted_by_hand(text: str, share: float):
    assert repeated(text, 3, "word") == pytest.approx(share, abs=1e-12)
    same(repetition_penalty(written(text)), [-share])
    same(repetition_penalty(written(text), most=0.5), [-share / 2])


def test_repetition_is_counted_in_characters_where_words_have_no_blanks():
    same(repetition_penalty(written("天地天地天地"), size=2, unit="character"), [-3 / 5])  # 天地 地天 天地 地天 天地
    same(repetition_penalty(written("天地天地天地"), size=2), [0])


@pytest.mark.parametrize(("size", "most"), [(0, 1.0), (3, -1.0), (3, float("inf"))])
def test_a_repetition_penalty_refuses_no_words_and_a_reward_for_repeating(size: int, most: float):
    with pytest.raises(ValueError, match=f"size is {size} and most {most}"):
        repetition_penalty(written("a"), size=size, most=most)


@pytest.mark.parametrize("unit", ["word", "character"])
@pytest.mark.parametrize("text", ["a " * 2**19, "a" * 2**20, "".join(f"{n} " for n in range(150_000)), " " * 2**20])
def test_a_megabyte_is_scored_within_two_seconds(text: str, unit: str):
    begin = time.process_time()
    value = float(repetition_penalty(written(text), unit=unit))  # type: ignore[arg-type]
    assert time.process_time() - begin < 2
    assert -1 < value <= 0


def test_the_rewards_follow_a_permutation():
    batch = written("a a a a", "a b c", "", length=[4, 30000, 18432])
    order = torch.tensor([2, 0, 1])
    for reward in (overlong, repetition_penalty):
        same(reward(batch.take(order)), reward(batch)[order].tolist())


def test_samples_without_a_length_or_without_text_are_refused():
    with pytest.raises(ValueError, match="the samples do not say how long their texts are"):
        overlong(written("a"))
    with pytest.raises(ValueError, match="the samples carry no text"):
        repetition_penalty(Samples(written("a").batch))
