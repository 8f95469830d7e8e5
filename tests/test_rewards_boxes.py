"""Boxes and points named in a text, against values worked out by hand."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples
from rewards.boxes import box_iou, coordinates, point_distance, point_in_box

NAN = float("nan")
TARGET = [0, 0, 10, 10]


def said(*texts: str, target: object = None, targets: tuple[object, ...] = ()) -> Samples:
    wanted = targets or (target,) * len(texts)
    prompts = tuple(Prompt(row, "where?", target=item) for row, item in enumerate(wanted))
    ids = torch.arange(len(texts))
    return Samples(Batch(prompts, ids, ids, seed=0, iteration=0), text=texts)


def same(values: Tensor, expected: list[float]) -> None:
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1, 2, 3, 4]", [1, 2, 3, 4]),
        ("[100,200,300,400]", [100, 200, 300, 400]),  # no thousands
        ('{"bbox_2d": [1, 2, 3.5, 4], "label": "cat"}', [1, 2, 3.5, 4]),
        ("<box>(1,2),(3,4)</box>", [1, 2, 3, 4]),
        ("1 2 3 4", [1, 2, 3, 4]),
        ("[-1, .5, 2e1, +4]", [-1, 0.5, 20, 4]),
        ("first [1,2,3,4], then [5,6,7,8]", [5, 6, 7, 8]),
        ("[[1,2,3,4],[5,6,7,8]]", None),  # eight in a row
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("1 2 3 4.5 6", None),  # five, not 1 2 3 4
        ("[1, 2, 3, 1e999]", None),
        ("x1=1 y1=2 x2=3 y2=4", None),
        ("[1, 2, nan, 4]", None),
        ("", None),
    ],
)
def test_a_box_is_the_last_run_of_exactly_four_numbers(text: str, box: list[float] | None):
    assert coordinates(text, 4) == box


@pytest.mark.parametrize(
    ("text", "iou"),
    [
        ("[0, 0, 10, 10]", 1),
        ("[5, 0, 15, 10]", 1 / 3),
        ("[2, 2, 4, 4]", 4 / 100),
        ("[10, 0, 20, 10]", 0),  # they touch
        ("[20, 20, 30, 30]", 0),
        ("[10, 10, 0, 0]", 0),  # upside down
        ("[0, 0, 0, 10]", 0),  # no width
        ("[-1e308, -1e308, 1e308, 1e308]", 0),  # its area is infinite
        ("there is no cat", 0),
        ("", 0),
    ],
)
def test_the_iou_is_that_worked_out_by_hand(text: str, iou: float):
    same(box_iou(said(text, target=TARGET)), [iou])
    same(box_iou(said(text, target="(0, 0), (10, 10)")), [iou])


def test_a_box_may_be_written_with_its_size():
    same(box_iou(said("[5, 0, 10, 10]", target=TARGET), form="size"), [1 / 3])


def test_the_box_is_looked_for_in_the_tag():
    batch = said("<think>[0,0,10,10]</think><answer>[5,0,15,10]</answer>", "[0,0,10,10]", target=TARGET)
    same(box_iou(batch, tag="answer"), [1 / 3, 0])


corner = st.integers(-50, 50)
boxes = st.tuples(corner, corner, st.integers(1, 50), st.integers(1, 50)).map(
    lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
)


@settings(deadline=None, derandomize=True)
@given(boxes, boxes)
def test_the_iou_is_symmetric_and_equals_the_count_of_unit_squares(one: list[int], other: list[int]):
    squares = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (one, other)]
    expected = len(squares[0] & squares[1]) / len(squares[0] | squares[1])
    same(box_iou(said(str(one), str(other), targets=(other, one))), [expected, expected])


def test_the_point_distance_is_that_of_the_position_reward_and_falls_by_e_at_the_scale():
    batch = said("(0, 0)", "(0, 0.25)", "(3, 4)", "(1, 2, 3)", "here", "(1e308, -1e308)", target=[0, 0])
    same(point_distance(batch), [1, 0.778801, math.exp(-5), 0, 0, 0])
    same(point_distance(batch, scale=5.0), [1, math.exp(-0.05), 0.367879, 0, 0, 0])
    with pytest.raises(ValueError, match="scale is 0.0; expected a finite length above 0"):
        point_distance(batch, scale=0.0)


def test_a_point_is_in_a_box_up_to_its_edge():
    batch = said("(5, 5)", "(10, 0)", "(10.1, 0)", "[1, 1, 2, 2]", "", target=TARGET)
    same(point_in_box(batch), [1, 1, 0, 0, 0])


REWARDS: dict[str, tuple[Callable[[Samples], Tensor], object, str]] = {
    "box_iou": (box_iou, TARGET, "[0,0,10,10]"),
    "point_in_box": (point_in_box, TARGET, "[1,1]"),
    "point_distance": (point_distance, [1, 1], "[1,1]"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_missing_target_is_nan_and_a_permutation_is_followed(name: str):
    reward, target, right = REWARDS[name]
    batch = said(right, "", right, targets=(target, target, None))
    same(reward(batch), [1, 0, NAN])
    same(reward(batch.take(torch.tensor([2, 0, 1]))), [NAN, 1, 0])


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    "target", [[1, 2, 3], [3, 3, 3, "3"], {"x": 1}, "here", 7, [True, True], [0, 0, float("nan"), 1]]
)
def test_an_unusable_target_is_refused_with_the_prompts_number_and_type(name: str, target: object):
    reward, _, right = REWARDS[name]
    with pytest.raises(ValueError, match=rf"prompt 0 has the target .* of type {type(target).__name__}; expected a"):
        reward(said(right, target=target))


@pytest.mark.parametrize("target", [[10, 10, 0, 0], [0, 0, 0, 5], [-1e308, 0, 1e308, 1]])
def test_a_target_box_without_a_finite_area_is_refused(target: object):
    with pytest.raises(ValueError, match="expected a box of positive, finite area, left, top, right, bottom"):
        box_iou(said("[0,0,1,1]", target=target))


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    "text",
    ["1" * 2**20, "1," * 2**19, "1" + " " * 2**20, ("1" + " " * 99) * 2**13, "[" * 2**20, "-" * 2**20, "1.e" * 2**18, "1-" * 2**19],
    ids=["digits", "run", "blanks", "spread", "brackets", "signs", "powers", "ranges"],
)  # fmt: skip
def test_a_megabyte_of_anything_is_scored_within_a_second(name: str, text: str):
    reward, target, _ = REWARDS[name]
    begin = time.process_time()
    scores = reward(said(text, target=target))
    assert time.process_time() - begin < 1
    assert scores.tolist() == [0]


@settings(deadline=None, derandomize=True)
@given(st.text("0123456789.,-+e()[] \n", max_size=60))
def test_any_text_has_a_score_in_the_range(text: str):
    for reward, target, _ in REWARDS.values():
        assert 0 <= float(reward(said(text, target=target))) <= 1
