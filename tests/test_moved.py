"""Held-out scores before and now: paired changes against their standard errors, worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmgrpo.moved import compared, keep, kept

NAN = math.nan


def scores(*values: float) -> dict[str, Tensor]:
    return {"clarity": torch.tensor(values)}


def test_the_change_is_paired() -> None:
    """Changes 0.1, 0.2, 0.3, 0.2: mean 0.2, sample std sqrt(0.02 / 3), standard error that over 2."""
    (one,) = compared(scores(1, 5, 9, 3), scores(1.1, 5.2, 9.3, 3.2), {"clarity": 1.0})
    assert one.errors == pytest.approx(0.2 / (math.sqrt(0.02 / 3) / 2), rel=1e-5)
    assert (one.before, one.now, one.prompts, one.trained) == (4.5, pytest.approx(4.7), 4, True)
    assert one.said() == "clarity (trained on): 4.5 -> 4.7, +4.9 standard errors over 4 prompts, rose"


def test_a_prompt_without_an_opinion_counts_on_neither_side() -> None:
    (one,) = compared(scores(1, NAN, 3, 2), scores(0.5, 7, NAN, 1.7), {"clarity": 0.0})
    assert (one.before, one.now, one.prompts, one.trained) == (1.5, pytest.approx(1.1), 2, False)
    assert one.said().endswith("-4.0 standard errors over 2 prompts, fell")


def test_a_small_change_is_not_called_one() -> None:
    (one,) = compared(scores(1, 2, 3), scores(2, 1, 3.1), {})
    assert one.said().endswith("no change seen")


@pytest.mark.parametrize(("before", "now", "errors"), [((1.0, 2.0), (1.0, 2.0), 0.0), ((1.0,), (2.0,), NAN)])
def test_without_spread_nothing_is_invented(before: tuple[float, ...], now: tuple[float, ...], errors: float) -> None:
    (one,) = compared(scores(*before), scores(*now), {})
    assert one.errors == errors or (math.isnan(one.errors) and math.isnan(errors))
    assert one.said().endswith("no change seen")


def test_what_was_not_trained_on_comes_first_and_a_component_has_the_weight_of_its_reward() -> None:
    before = {"b": torch.rand(3), "judge.tone": torch.rand(3), "a": torch.rand(3)}
    found = compared(before, before, {"b": 1.0, "judge": 0.5, "a": 0.0})
    assert [(one.name, one.trained) for one in found] == [("a", False), ("b", True), ("judge.tone", True)]


def test_the_start_is_read_back_as_it_was(tmp_path: Path) -> None:
    keep(tmp_path, scores(0.25, NAN, 3))
    torch.testing.assert_close(kept(tmp_path), scores(0.25, NAN, 3), equal_nan=True)
    assert kept(tmp_path / "elsewhere") == {}
