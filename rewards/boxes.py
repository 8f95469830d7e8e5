"""Rewards for places named in a text: overlap of boxes, distance of points, in the coordinates of the target. B samples.

A box is (left, top, right, bottom), a point (x, y). Answers are read by `coordinates`; an answer without a place has the
score 0, a prompt without a target NaN. The option `tag` is that of `rewards.answers.answer`.
"""

import math
import re
from functools import cache
from typing import Literal

from torch import Tensor

from mmgrpo.types import Prompt, Samples
from rewards.answers import FREE, POWER, SIGN, score_answers, to_number, unusable

COORDINATE = rf"{FREE}{SIGN}(?:\d++(?:\.\d++)?|\.\d++){POWER}"  # a comma stands between two
BETWEEN = r"[\s,;()\[\]]++"
Box = tuple[float, float, float, float]
Point = tuple[float, float]
Form = Literal["corners", "size"]
FORMS = {"corners": "left, top, right, bottom", "size": "left, top, width, height"}


@cache
def run_of(size: int) -> re.Pattern[str]:
    """A run of numbers as long as it goes, in group 1 if it has exactly `size`; atomic, so that none is cut short."""
    exactly = rf"(?>{COORDINATE}(?:{BETWEEN}{COORDINATE}){{{size - 1}}})(?!{BETWEEN}{COORDINATE})"
    return re.compile(rf"({exactly})|{COORDINATE}(?:{BETWEEN}{COORDINATE})*+")


def coordinates(text: str, size: int) -> list[float] | None:
    """The last run of exactly `size` numbers with nothing but brackets, commas, semicolons and blanks between them.

    So [1, 2, 3, 4] and (1,2),(3,4) are boxes, and five numbers in a row are none. None: no such run, or not finite.
    """
    last = ""
    for run in run_of(size).finditer(text):
        last = run[1] or last
    values = [value for item in re.findall(COORDINATE, last) if (value := to_number(item)) is not None]
    return values if len(values) == size else None


def read_box(text: str, form: Form) -> Box | None:
    """A box of positive width and height, written as its corners or as left, top, width, height; None: no such box."""
    values = coordinates(text, 4)
    if values is None:
        return None
    left, top, right, bottom = values
    if form == "size":
        right, bottom = left + right, top + bottom
    return (left, top, right, bottom) if right > left and bottom > top else None


def read_point(text: str) -> Point | None:
    values = coordinates(text, 2)
    return None if values is None else (values[0], values[1])


def wanted_text(prompt: Prompt, size: int) -> str | None:
    """The target, a list of `size` numbers or a text with them, as a text; raises ValueError for another type."""
    target = prompt.target
    if target is None or isinstance(target, str):
        return target
    if not isinstance(target, list | tuple) or [type(item) in (int, float) for item in target] != [True] * size:
        raise unusable(prompt, f"a list of {size} numbers, or a text with them")
    return repr(list(target))


def wanted_box(prompt: Prompt, form: Form) -> Box | None:
    text = wanted_text(prompt, 4)
    box = None if text is None else read_box(text, form)
    if text is not None and (box is None or not math.isfinite((box[2] - box[0]) * (box[3] - box[1]))):
        raise unusable(prompt, "a box of positive, finite area, " + FORMS[form])
    return box


def overlap(found: Box, right: Box) -> float:
    """Intersection over union of two boxes, the second of finite area; in [0, 1]."""
    width = min(found[2], right[2]) - max(found[0], right[0])
    height = min(found[3], right[3]) - max(found[1], right[1])
    if width <= 0 or height <= 0:
        return 0.0
    area, target = ((box[2] - box[0]) * (box[3] - box[1]) for box in (found, right))
    return width * height / (area + target - width * height)


def box_iou(samples: Samples, *, tag: str | None = None, form: Form = "corners") -> Tensor:
    """Intersection over union of the answer's box with the target's; in [0, 1], (B,).

    `form` is how both are written: "corners" or "size". A box without width or height, or upside down, is 0. Source: the
    grounding rewards of Mixed-R1 (arXiv 2505.24164) and VLAA-Thinker (2504.11468).
    """

    def score(found: str, right: Box) -> float:
        box = read_box(found, form)
        return 0.0 if box is None else overlap(box, right)

    return score_answers(samples, tag, lambda prompt: wanted_box(prompt, form), score)


def point_distance(samples: Samples, *, tag: str | None = None, scale: float = 1.0) -> Tensor:
    """exp(-d / scale), d the distance of the answer's point from the target's; in [0, 1], (B,).

    At a distance of `scale`, in the units of the coordinates, it is 0.37. Source: the position reward of MLLM-4D.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; expected a finite length above 0")

    def wanted(prompt: Prompt) -> Point | None:
        text = wanted_text(prompt, 2)
        point = None if text is None else read_point(text)
        if text is not None and point is None:
            raise unusable(prompt, "a point, x, y")
        return point

    def score(found: str, right: Point) -> float:
        point = read_point(found)
        return 0.0 if point is None else math.exp(-math.dist(point, right) / scale)

    return score_answers(samples, tag, wanted, score)


def point_in_box(samples: Samples, *, tag: str | None = None, form: Form = "corners") -> Tensor:
    """1 if the answer's point lies in the target's box or on its edge, else 0; (B,)."""

    def score(found: str, right: Box) -> float:
        point = read_point(found)
        left, top, far, bottom = right
        return float(point is not None and left <= point[0] <= far and top <= point[1] <= bottom)

    return score_answers(samples, tag, lambda prompt: wanted_box(prompt, form), score)
