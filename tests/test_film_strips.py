"""Clips on paper: every pixel of every frame in its place, frames framed by whether they are right."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from pipelines.film_strips import BETWEEN, Scene, Strip, drawn_strip, film
from pipelines.pictures import BAD, BORDER, GOOD, PLAIN

CLIP = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_strip_shows_the_frames_in_order_and_marks_each():
    page = np.asarray(drawn_strip(Strip("clip", CLIP, [("given", None), ("up", True), ("left", False)]), 5))
    step = 4 * 5 + 2 * BORDER + BETWEEN
    for place, colour in enumerate((PLAIN, GOOD, BAD)):
        left = place * step
        frame = page[BORDER + 2 : BORDER + 20 : 5, left + BORDER + 2 : left + BORDER + 20 : 5]
        np.testing.assert_array_equal(frame, (CLIP[place] * 255).round().byte().permute(1, 2, 0).numpy())
        assert tuple(page[1, left + 1]) == ImageColor.getrgb(colour)


def test_scenes_stand_side_by_side_and_below_each_other():
    scene = Scene("a title", [Strip("before", CLIP), Strip("after", CLIP)])
    one, four = film([scene], 2, 5), film([scene] * 4, 2, 5)
    assert four.width == 2 * one.width and four.height > 1.8 * one.height
    half = four.crop((0, 0, one.width, one.height))
    assert np.array_equal(np.asarray(half), np.asarray(one))
    assert np.asarray(film([scene._replace(title="another")], 2, 5)).tobytes() != np.asarray(one).tobytes()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        film([])
    with pytest.raises(ValueError, match="nothing to draw"):
        film([Scene("empty", [])])
    with pytest.raises(ValueError, match="2 lines for the 3 frames of the clip 'before'"):
        drawn_strip(Strip("before", CLIP, [("up", None)] * 2), 5)
    with pytest.raises(ValueError, match=r"the clip 'flat' has shape \(3, 4, 4\)"):
        drawn_strip(Strip("flat", CLIP[0]), 5)
