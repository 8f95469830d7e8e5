"""Each part of an answer in words and pictures is judged by what was expected in its place."""

import math

import pytest
import torch
from torch import Tensor

from mmgrpo.scoring import score
from mmgrpo.types import Batch, Prompt, Samples
from pipelines.tiny_interleaved import IMAGES, LONGEST, SPLITS, SUMS, WORDS, careless, said, split_of, tokenizer
from rewards.drawn_sums import form, picture_distance, picture_exact, picture_soft, text_exact
from rewards.shapes import WISHES, render

TEXTS = ["two red circles", "three red circles"]


def drawn(text: str) -> Tensor:
    """A true rendering."""
    return render([next(wish for wish in WISHES if wish.text == text)], torch.Generator().manual_seed(0))[0]


def samples_of(*answers: tuple[str | Tensor, ...], ends: Tensor | None = None) -> Samples:
    prompts = tuple(Prompt(0, "two plus one red circles", columns={"texts": TEXTS}) for _ in answers)
    ids = torch.arange(len(answers))
    return Samples(Batch(prompts, ids, ids, 0, 0), interleaved=answers, part_end=ends)


RIGHT = (TEXTS[0], drawn(TEXTS[0]), TEXTS[1], drawn(TEXTS[1]))
WRONG_RESULT = (TEXTS[0], drawn(TEXTS[0]), "four red circles", drawn("four red circles"))
STOPPED = (TEXTS[0], drawn(TEXTS[0]))
TOO_MANY = (*RIGHT, "one red circle")


def test_words_and_pictures_are_judged_in_their_places():
    samples = samples_of(RIGHT, WRONG_RESULT, STOPPED, TOO_MANY)
    nan = math.nan
    words = torch.tensor(
        [[0.5, nan, 0.5, nan, nan], [0.5, nan, 0, nan, nan], [0.5, *[nan] * 4], [0.5, nan, 0.5, nan, 0]]
    )
    assert torch.equal(text_exact(samples).nan_to_num(-1), words.nan_to_num(-1))
    exact = torch.tensor(
        [[nan, 0.5, nan, 0.5, nan], [nan, 0.5, nan, 0, nan], [nan, 0.5, *[nan] * 3], [nan, 0.5, nan, 0.5, nan]]
    )
    assert torch.equal(picture_exact(samples).nan_to_num(-1), exact.nan_to_num(-1))
    soft = picture_soft(samples)
    assert torch.equal(soft[[0, 0], [1, 3]], torch.tensor([0.5, 0.5]))
    assert soft[1, 3] == pytest.approx(0.5 * 0.5 * (1 - 1 / 3))  # four of three, all of them good
    assert form(samples).tolist() == [1, 1, 0, 0]


def test_the_sums_over_the_parts_lie_between_0_and_1_and_what_is_missing_counts_0():
    ends = torch.tensor([[3, 8, 13, 18], [3, 8, -1, -1]])
    samples = samples_of(RIGHT, STOPPED, ends=ends)
    found = score({"text": text_exact, "picture": picture_exact}, {"text": 0.5, "picture": 0.5}, samples, decisions=20)
    assert found.total().tolist() == [1, 0.5]
    placed = found.step_rewards
    assert placed[0, ends[0]].tolist() == [0.25] * 4 and int((~placed.isnan()).sum()) == 6


def test_a_picture_of_something_else_is_farther_from_a_true_rendering():
    right, wrong = picture_distance(samples_of(RIGHT, WRONG_RESULT)).tolist()
    assert right < 0.03 < wrong
    assert picture_distance(samples_of(("two red circles",))).isnan().all()


def test_prompts_without_texts_and_samples_of_another_kind_are_refused():
    ids = torch.arange(1)
    with pytest.raises(ValueError, match="expected a list of texts like 'two red circles'"):
        text_exact(Samples(Batch((Prompt(0, "draw"),), ids, ids, 0, 0), interleaved=(RIGHT,)))
    with pytest.raises(ValueError, match="these samples have none"):
        form(Samples(Batch((Prompt(0, "draw"),), ids, ids, 0, 0)))


def test_sums_are_right_and_each_is_in_one_split_with_every_kind_in_all_of_them():
    assert len(SUMS) == 144 and {one.prompt for one in SUMS} != set() and len({one.prompt for one in SUMS}) == 144
    assert (SUMS[0].prompt, SUMS[0].texts) == ("one plus one red circles", ("one red circle", "two red circles"))
    for split, count in zip(SPLITS, (96, 24, 24), strict=True):
        own = [one for one in SUMS if split_of(one) == split]
        assert len(own) == count
        assert len({(one.first, one.sign, one.second) for one in own}) == 12
        assert len({one.colour for one in own}) == 4 and len({one.shape for one in own}) == 3


def test_every_text_is_known_to_the_tokenizer_and_fits():
    reader = tokenizer()
    for one in SUMS:
        for text in (one.prompt, *one.texts):
            assert reader.decode(reader(text).input_ids) == text
            assert reader.unk_token_id not in reader(text).input_ids
        assert max(len(reader(text).input_ids) for text in one.texts) + 1 == LONGEST and len(one.texts) == IMAGES
    assert len(set(WORDS)) == len(WORDS)


def test_careless_answers_have_other_results_only():
    one = SUMS[0]
    found = [careless(one, 0.5, seed) for seed in range(400)]
    assert {first for first, _ in found} == {one.texts[0]}
    assert {second for _, second in found} == {said(count, one.colour, one.shape) for count in (1, 2, 3, 4)}
    assert sum(second == one.texts[1] for _, second in found) / 400 == pytest.approx(0.5 + 0.5 / 4, abs=0.08)
