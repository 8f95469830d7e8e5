"""Diagnostics against numbers counted by hand."""

import math

import pytest
import torch

from mmgrpo.diagnostics import (
    absolute_log_ratio_per_step,
    masked_mean,
    ratio_mean,
    ratio_std,
    reward_summary,
    share_above_clip,
    share_below_clip,
    share_without_spread,
)
from mmgrpo.types import Feedback

NAN = math.nan
RATIOS = torch.tensor([[0.5, 1.0, 1.5], [0.7, 1.25, 1.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
BROKEN = torch.where(MASK, RATIOS.log(), NAN).requires_grad_()


def test_clipped_shares_count_trained_decisions_on_each_side() -> None:
    assert share_below_clip(BROKEN, MASK, 0.2).item() == pytest.approx(2 / 5)
    assert share_below_clip(BROKEN, MASK, 0.4).item() == pytest.approx(1 / 5)
    assert share_above_clip(BROKEN, MASK, 0.2).item() == pytest.approx(2 / 5)
    assert share_above_clip(BROKEN, MASK, 0.28).item() == pytest.approx(1 / 5)
    assert share_below_clip(BROKEN, MASK, 1.5) == 0


def test_nothing_is_clipped_on_policy_however_narrow_the_clip() -> None:
    zeros = torch.zeros(2, 3)
    assert share_below_clip(zeros, MASK, 1e-9) == share_above_clip(zeros, MASK, 1e-9) == 0


def test_ratio_mean_and_std_are_those_of_trained_decisions() -> None:
    trained = RATIOS[MASK]
    assert ratio_mean(BROKEN, MASK).item() == pytest.approx(trained.mean().item())
    assert ratio_std(BROKEN, MASK).item() == pytest.approx(trained.std(correction=0).item(), rel=1e-5)
    narrow = torch.tensor([[1e-6, -1e-6]])
    assert ratio_std(narrow, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(1e-6, rel=1e-4)


def test_absolute_log_ratio_is_averaged_in_each_step() -> None:
    got = absolute_log_ratio_per_step(BROKEN, MASK)
    expected = [(math.log(2) - math.log(0.7)) / 2, math.log(1.25) / 2, math.log(1.5)]
    torch.testing.assert_close(got, torch.tensor(expected))
    assert not got.requires_grad


def test_a_mean_over_nothing_is_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(BROKEN, nothing) == ratio_mean(BROKEN, nothing) == ratio_std(BROKEN, nothing) == 0
    assert (absolute_log_ratio_per_step(BROKEN, nothing) == 0).all()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="mask has shape"):
        masked_mean(torch.zeros(2), torch.ones(2, 1, dtype=torch.bool))


def test_groups_without_spread_are_counted_once_each() -> None:
    scores = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, NAN, NAN])
    assert share_without_spread(scores, torch.tensor([4, 4, 4, 9, 9, 9, 2])) == pytest.approx(0.5)


def test_the_summary_describes_every_reward_and_the_total() -> None:
    rewards = {"ocr": torch.tensor([1.0, 0.0, NAN, 0.5]), "look": torch.tensor([2.0, 2.0, 4.0, 4.0])}
    summary = reward_summary(Feedback(rewards, {"ocr": 1.0, "look": 0.5}, torch.tensor([0, 0, 1, 1])))
    expected = {
        "ocr/mean": 0.5,
        "ocr/std": math.sqrt(1 / 6),
        "ocr/group_std": math.sqrt(0.5) / 2,
        "ocr/groups_without_spread": 0.5,
        "ocr/without_opinion": 0.25,
        "look/mean": 3.0,
        "look/std": 1.0,
        "look/group_std": 0.0,
        "look/groups_without_spread": 1.0,
        "look/without_opinion": 0.0,
        "total/mean": (2.0 + 1.0 + 2.0 + 2.5) / 4,
        "total/std": math.sqrt((0.125**2 + 0.875**2 + 0.125**2 + 0.625**2) / 4),
        "total/group_std": (math.sqrt(0.5) + math.sqrt(0.125)) / 2,
        "total/groups_without_spread": 0.0,
        "total/without_opinion": 0.0,
    }
    assert summary == pytest.approx(expected)
