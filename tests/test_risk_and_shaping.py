"""Bundles under risk, rewards that likelihood shrinks, entropy held at a target, hard prompts: worked examples and memories."""

import math
from pathlib import Path

import pytest
import torch
from test_advantages import close, ids, numbers
from torch import Tensor

from mmgrpo import checkpoint
from mmgrpo.advantages import standardized
from mmgrpo.comparing import Remembering, column_of, teaching
from mmgrpo.risk import LEVELS, Risk, bundle_risk, mixed_value_at_risk, tracked
from mmgrpo.shaping import (
    clause_hardness,
    difficulty_scaled,
    distribution_centric,
    shrunk_by_likelihood,
    steering_share,
    unlikeliness,
    without_outliers,
)
from mmgrpo.types import Feedback, Prompt

F64 = torch.float64


def told(scores: Tensor, group: Tensor, columns=(), mask: Tensor | None = None, **facts: Tensor) -> Feedback:
    prompts = tuple(Prompt(number, "a", columns=values) for number, values in enumerate(columns))
    return Feedback({"r": scores}, {"r": 1.0}, group, prompts=prompts, mask=mask, facts=facts)


# ---- RiskPO

BUNDLE = told(numbers(1, 0, 0, 1, 1, 1, 0, 0), ids(0, 0, 0, 0, 1, 1, 1, 1))


def test_a_bundle_equals_the_worked_example():
    values = bundle_risk(size=2)(BUNDLE).values
    close(values, *[0, -0.848524, -5.151742, -0.848524] * 2, tolerance=1e-5)


def test_tracked_quantiles_without_scale_equal_the_worked_example():
    at = torch.where(LEVELS < 0.5, 0.5, 1.5)
    compare = bundle_risk(size=2, scale=False, credit="uniform")
    compare.memory = {"quantiles": at}
    close(compare(BUNDLE).values, *[0, -0.285714, -2.071420, -0.285714] * 2, tolerance=1e-5)


def test_the_tracker_starts_at_the_papers_quantiles_and_follows_the_pinball_step():
    compare = bundle_risk(size=2)
    compare(BUNDLE)
    papers = numbers(2, 1, 0, 1)
    torch.testing.assert_close(compare.memory["quantiles"], papers.quantile(LEVELS))
    compare(BUNDLE)
    before = papers.quantile(LEVELS)
    below = torch.stack([(papers < value).double().mean() for value in before])
    torch.testing.assert_close(compare.memory["quantiles"], before + 0.1 * (LEVELS - below))
    torch.testing.assert_close(tracked(before, papers, 0.0), before)


def test_risk_never_falls_with_the_score_and_is_flat_above_the_upper_quantile():
    papers, low, high, risk = torch.linspace(-2, 4, 61, dtype=F64), numbers(0.5)[0], numbers(1.5)[0], Risk()
    values = mixed_value_at_risk(papers, low, high, risk)
    slopes = values.diff() / papers.diff()
    assert (slopes >= -1e-9).all() and not values[papers >= 1.5].diff().any()
    assert slopes[papers[1:] <= 0.5][0] == pytest.approx(1.5 / (2.5 * 0.2), rel=1e-4)
    assert slopes[(papers[:-1] >= 0.5) & (papers[1:] <= 1.5)][0] == pytest.approx(1 / (2.5 * 0.7), rel=1e-4)


def test_samples_without_a_paper_have_value_zero_and_a_single_paper_teaches_nothing():
    uneven = told(numbers(1, 0, 1, 0, 1), ids(0, 0, 0, 1, 1))
    assert bundle_risk(size=2)(uneven).values[2] == 0
    assert not bundle_risk(size=1)(told(numbers(0.3), ids(0))).values.any()
    assert teaching(bundle_risk(), told(numbers(1, 1), ids(0, 0))).all()


def test_prompts_of_a_bundle_may_change_places():
    group = ids(1, 1, 1, 1, 0, 0, 0, 0)
    values = bundle_risk(size=2, credit="uniform")(told(BUNDLE.rewards["r"], group)).values
    torch.testing.assert_close(values, bundle_risk(size=2, credit="uniform")(BUNDLE).values)


# ---- likelihood

LIKELY = numbers(-0.2, -0.5, -1.5, -0.9)


def test_likely_right_answers_earn_less_as_in_the_worked_example():
    group, scores = ids(0, 0, 0, 0), numbers(1, 1, 1, 0)
    close(shrunk_by_likelihood(scores, LIKELY, group, 0.25), 0.8125, 0.875, 1, 0)
    log_prob = LIKELY[:, None].repeat(1, 2)
    found = unlikeliness()(told(scores, group, log_prob=log_prob))
    close(found.values, 0.309304, 0.446772, 0.721709, -1.477785, tolerance=1e-5)
    plain = standardized(told(scores, group), eps=1e-6)
    torch.testing.assert_close(unlikeliness(share=0.0)(told(scores, group, log_prob=log_prob)).values, plain.values)


def test_untrained_decisions_do_not_count_in_the_likelihood_and_equal_rewards_teach_nothing():
    log_prob = torch.stack([LIKELY, torch.full((4,), -math.inf, dtype=F64)], 1)
    mask = torch.tensor([[True, False]] * 4)
    judged = told(numbers(1, 1, 1, 0), ids(0, 0, 0, 0), mask=mask, log_prob=log_prob)
    close(unlikeliness()(judged).values, 0.309304, 0.446772, 0.721709, -1.477785, tolerance=1e-5)
    assert not teaching(unlikeliness(), told(numbers(1, 1), ids(0, 0))).any()
    with pytest.raises(ValueError, match="a score is -1; expected none below 0"):
        shrunk_by_likelihood(numbers(-1, 0), numbers(0, 0), ids(0, 0), 0.25)


# ---- entropy at a target

LOGITS = numbers(2, 0, 0)
TOKENS = ids(0, 1, 0, 0).view(2, 2)


def log_probs(temperature: float) -> Tensor:
    return (LOGITS / temperature).log_softmax(0)[TOKENS]


def steered(entropy: float) -> Remembering:
    compare = distribution_centric()
    compare.memory = {"entropy": torch.tensor(entropy, dtype=F64)}
    return compare


def test_the_virtual_temperature_equals_the_worked_example():
    close((log_probs(1.2) - log_probs(1.0)).exp()[0], 0.922279, 1.287144)
    close((log_probs(0.8) - log_probs(1.0)).exp()[0], 1.091482, 0.662017)
    assert steering_share(0.15, 0.5) == pytest.approx(1 / 6)
    facts = {f"log_prob at {t:g}": log_probs(t) for t in (1.0, 1.2, 0.8)} | {"entropy": torch.full((2, 2), 0.4)}
    judged = told(numbers(1, 0), ids(0, 0), **facts)
    own = standardized(judged, eps=1e-6).values
    alpha = 1 / 6
    expected = (1 - alpha) * own[:, None] + alpha * numbers(1, 0)[:, None] * (log_probs(1.2) - log_probs(1.0)).exp()
    compare = steered(0.1)
    torch.testing.assert_close(compare(judged).values, expected)
    # with advantages of 0.7 and -0.7, as printed
    close((1 - alpha) * 0.7 + alpha * (log_probs(1.2) - log_probs(1.0)).exp()[0], 0.737046, 0.797857)
    assert float(compare.memory["entropy"]) == pytest.approx(0.4)
    cold = compare(judged)  # the entropy is now above the target
    assert float(cold.values[0, 1]) < float(steered(0.1)(judged).values[0, 1])


def test_at_the_target_or_without_a_right_answer_it_is_grpo():
    facts = {f"log_prob at {t:g}": log_probs(t) for t in (1.0, 1.2, 0.8)} | {"entropy": torch.full((2, 2), 0.4)}
    judged = told(numbers(1, 0), ids(0, 0), **facts)
    own = standardized(judged, eps=1e-6).values[:, None].expand(2, 2)
    torch.testing.assert_close(steered(0.25)(judged).values, own)
    wrong = told(numbers(0, -1), ids(0, 0), **facts)
    torch.testing.assert_close(steered(0.1)(wrong).values, standardized(wrong, eps=1e-6).values[:, None].expand(2, 2))
    assert steering_share(0.15, 0.0) == 0.0
    assert teaching(distribution_centric(), told(numbers(1, 1, 0, 0), ids(0, 0, 1, 1))).tolist() == [
        True,
        True,
        False,
        False,
    ]


# ---- hard prompts


def test_the_factor_of_a_hard_prompt_equals_the_worked_example():
    assert clause_hardness(torch.tensor([[0.9, 0.2], [0.1, 0.5]])) == pytest.approx(0.3)
    assert clause_hardness(torch.zeros(0, 2)) == 1.0
    columns = [{"hardness": 0.6, "category": "x", "demo": 1.0}] * 4
    compare = difficulty_scaled(demonstration="demo", outliers=0.0)
    # a running mean of 0.3 in hardness and 1.0 in the gap, with so much history that this batch does not move it
    compare.memory = {"hardness x": numbers(0.3e9, 1e9), "gap x": numbers(1e9, 1e9)}
    judged = told(numbers(0.2, 0.4, 0.6, 0.8), ids(0, 0, 0, 0), columns)  # the gap is 1 - 0.5
    close(compare(judged).values, -1.111934, -0.370645, 0.370645, 1.111934, tolerance=1e-5)


def test_prompts_at_the_mean_of_their_category_keep_their_advantage_and_means_go_on():
    columns = [{"hardness": 0.4, "category": "x"}] * 2 + [{"hardness": 0.9, "category": "y"}] * 2
    judged = told(numbers(1, 0, 0, 1), ids(0, 0, 1, 1), columns)
    compare = difficulty_scaled()
    torch.testing.assert_close(compare(judged).values, standardized(judged, eps=1e-6).values)
    assert compare.memory["hardness x"].tolist() == pytest.approx([0.8, 2.0])
    compare(judged)
    assert compare.memory["hardness y"].tolist() == pytest.approx([3.6, 4.0])
    close(without_outliers(numbers(1, 1, 1, 9), 0.25), 1, 1, 1)
    with pytest.raises(ValueError, match="a number in the column 'hardness' of every prompt; got \\['hard'\\]"):
        column_of(told(numbers(1), ids(0), [{"hardness": "hard"}]), "hardness")


def test_a_memory_is_part_of_a_checkpoint(tmp_path: Path):
    compare = bundle_risk(size=2)
    compare(BUNDLE)
    path = checkpoint.write(tmp_path, 1, {"advantage": dict(compare.memory)}, {}, keep=1)
    again = bundle_risk(size=2)
    again.memory = checkpoint.read(path)[0]["advantage"]
    torch.testing.assert_close(again(BUNDLE).values, compare(BUNDLE).values)
