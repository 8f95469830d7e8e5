"""Rewards made of rewards."""

import pytest
import torch
from torch import Tensor

from mmgrpo.advantages import gdpo, standardized
from mmgrpo.types import Batch, Feedback, Prompt, Reward, Samples
from rewards.compose import corrected, guarded, named, scale, weighted

NAN = float("nan")
A, B = [1.0, 2.0, NAN, NAN], [10.0, NAN, 30.0, NAN]


def samples(*rows: tuple[float, float]) -> Samples:
    """One sample per row; the two numbers of a row are what the rewards `first` and `second` read."""
    prompts = tuple(Prompt(index, "", columns={"first": a, "second": b}) for index, (a, b) in enumerate(rows))
    ids = torch.arange(len(rows))
    return Samples(Batch(prompts, torch.zeros_like(ids), ids, seed=0, iteration=0))


def first(samples: Samples) -> Tensor:
    return torch.tensor([prompt.columns["first"] for prompt in samples.prompts])


def second(samples: Samples) -> Tensor:
    return torch.tensor([prompt.columns["second"] for prompt in samples.prompts])


def pair(samples: Samples) -> dict[str, Tensor]:
    return {"x": first(samples), "y": second(samples)}


BOTH = {"a": first, "b": second}
ROWS = samples(*zip(A, B, strict=True))
REWARDS: dict[str, Reward] = {
    "weighted": weighted(BOTH, {"a": 2.0, "b": 0.5}),
    "require_all": weighted(BOTH, {"a": 2.0, "b": 0.5}, require_all=True),
    "scale": scale(first, 3.0),
}


def same(values: object, expected: object) -> None:
    torch.testing.assert_close(values, torch.as_tensor(expected), rtol=0, atol=1e-6, equal_nan=True)


def values(reward: Reward, samples: Samples) -> Tensor:
    found = reward(samples)
    assert isinstance(found, Tensor)
    return found


def test_a_weighted_sum_skips_missing_components_and_is_nan_only_where_none_has_an_opinion():
    same(REWARDS["weighted"](ROWS), [7.0, 4.0, 15.0, NAN])


def test_require_all_makes_the_sum_missing_wherever_one_component_is_missing():
    same(REWARDS["require_all"](ROWS), [7.0, NAN, NAN, NAN])


def test_a_weighted_sum_equals_the_total_of_the_feedback():
    weights = {"a": 2.0, "b": 0.5}
    total = Feedback({"a": first(ROWS), "b": second(ROWS)}, weights, ROWS.batch.group).total()
    same(REWARDS["weighted"](ROWS), total)


@pytest.mark.parametrize("require_all", [False, True])
def test_a_component_of_weight_zero_changes_nothing_not_even_by_missing(require_all: bool):
    same(weighted(BOTH, {"a": 1.0, "b": 0.0}, require_all=require_all)(ROWS), A)


def test_scaling_by_one_is_the_identity_and_keeps_names():
    same(scale(first, 1.0)(ROWS), A)
    assert scale(pair, 2.0)(ROWS).keys() == {"x", "y"}
    same(scale(pair, 2.0)(ROWS)["y"], [20.0, NAN, 60.0, NAN])


@pytest.mark.parametrize("name", REWARDS)
def test_raising_a_component_with_positive_weight_raises_the_reward(name: str):
    low, high = samples((1.0, 5.0), (2.0, -3.0)), samples((1.5, 5.0), (2.5, -3.0))
    assert (values(REWARDS[name], high) > values(REWARDS[name], low)).all()


@pytest.mark.parametrize("name", REWARDS)
def test_permuting_the_samples_permutes_the_composed_reward(name: str):
    order = torch.tensor([2, 0, 3, 1])
    same(REWARDS[name](ROWS.take(order)), values(REWARDS[name], ROWS)[order])


def test_named_rewards_stand_side_by_side_and_parts_carry_both_names():
    found = named({"a": second, "p": pair})(ROWS)
    assert list(found) == ["a", "p/x", "p/y"]
    same(found["a"], B)
    same(found["p/x"], A)


def test_the_parts_of_a_reward_can_be_weighted_by_their_full_names():
    same(weighted({"p": pair}, {"p/x": 1.0, "p/y": 1.0})(ROWS), [11.0, 2.0, 30.0, NAN])


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_weights_that_do_not_match_the_components_are_refused_by_name(weights: dict[str, float]):
    with pytest.raises(ValueError, match=r"expected the components \['a', 'b'\]"):
        weighted(BOTH, weights)(ROWS)


def test_weights_that_are_all_zero_and_infinite_factors_are_refused():
    with pytest.raises(ValueError, match="at least one that is not 0"):
        weighted(BOTH, {"a": 0.0, "b": 0.0})
    with pytest.raises(ValueError, match="expected a finite factor"):
        scale(first, float("inf"))


def test_a_component_of_shape_b_by_one_is_refused_with_its_name():
    with pytest.raises(ValueError, match=r"reward 'a' has shape \(4, 1\); expected \(4\)"):
        named({"a": lambda samples: first(samples)[:, None]})(ROWS)


# several labels, gates


LABELS = torch.tensor([[0.8, 0.6, 0.5, 0.9], [0.7, 0.9, 0.4, 0.2], [0.5, 0.5, 0.5, 0.5]])
NAMES = ("polite", "meaningful", "actionable", "safe")


def labels(samples: Samples) -> dict[str, Tensor]:
    """Four labels of each answer, as one model gives them."""
    return dict(zip(NAMES, LABELS[samples.batch.sample].unbind(1), strict=True))


def compared(scores: Tensor | dict[str, Tensor], weights: dict[str, float]) -> Feedback:
    named_scores = {"score": scores} if isinstance(scores, Tensor) else scores
    return Feedback(named_scores, weights, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("shares", "totals", "advantages"),
    [
        ((0.25, 0.25, 0.25, 0.25), (0.70, 0.55, 0.50), (1.120886, -0.320253, -0.800633)),
        ((0.1, 0.2, 0.2, 0.5), (0.75, 0.43, 0.50), (1.129426, -0.772765, -0.356661)),  # the last two change places
    ],
)
def test_labels_of_an_answer_equal_the_worked_example_of_safe_multi_objective_grpo(
    shares: tuple[float, ...], totals: tuple[float, ...], advantages: tuple[float, ...]
) -> None:
    weights = dict(zip(NAMES, shares, strict=True))
    three = samples((0, 0), (0, 0), (0, 0))
    said = compared(labels(three), weights)
    same(said.total(), totals)
    summed = weighted({"labels": labels}, {f"labels/{name}": share for name, share in weights.items()})
    same(values(summed, three), totals)
    torch.testing.assert_close(standardized(said, eps=1e-6).values, torch.tensor(advantages), rtol=0, atol=3e-6)
    doubled = compared(labels(three), {name: 2 * share for name, share in weights.items()})
    torch.testing.assert_close(standardized(doubled, eps=0.0).values, standardized(said, eps=0.0).values)


def test_one_label_alone_is_grpo_of_that_label_and_a_gate_keeps_an_unsafe_answer_from_trading() -> None:
    three = samples((0, 0), (0, 0), (0, 0))
    one_hot = compared(labels(three), {"polite": 0.0, "meaningful": 1.0, "actionable": 0.0, "safe": 0.0})
    alone = compared(LABELS[:, 1], {"score": 1.0})
    assert torch.equal(standardized(one_hot).values, standardized(alone).values)

    def safe(samples: Samples) -> Tensor:
        return labels(samples)["safe"]

    helpful = weighted({"labels": labels}, {f"labels/{name}": 1.0 if name != "safe" else 0.0 for name in NAMES})
    same(values(helpful, three), [1.9, 2.0, 1.5])  # the unsafe answer would win
    gated = guarded(quality=helpful, guards={"safe": safe}, least={"safe": 0.4}, floor=0.0)
    same(values(gated, three), [1.9, 0.0, 1.5])


def test_a_conditioned_reward_counts_where_the_hard_one_is_reached_and_changes_what_gdpo_prefers() -> None:
    """Easy 1 1 0 0, hard 0 1 0 1: conditioned on hard >= 1 the easy one is 0 1 0 0."""
    four = samples((1, 0), (1, 1), (0, 0), (0, 1))
    conditioned = guarded(quality=first, guards={"hard": second}, least={"hard": 1.0}, floor=0.0)
    same(values(conditioned, four), [0.0, 1.0, 0.0, 0.0])

    def advantages(easy: Tensor) -> Tensor:
        rewards = {"easy": easy, "hard": second(four)}
        said = Feedback(rewards, dict.fromkeys(rewards, 1.0), torch.zeros(4, dtype=torch.int64))
        return gdpo(said, eps=0.0, batch_scale=False).values

    half, high, low = 0.75**0.5, 1.5, -0.5  # (0.5 / 0.577350), (0.75, -0.25) / 0.5
    same(advantages(first(four)), [0.0, 2 * half, -2 * half, 0.0])  # easy and wrong ties with hard and right
    same(advantages(values(conditioned, four)), [low - half, high + half, low - half, low + half])
    missing = samples((1, NAN), (NAN, 1))
    same(values(conditioned, missing), [NAN, NAN])


def test_a_corrected_score_equals_the_worked_example_and_falls_where_quality_is_lost():
    hacked = samples((0.8721, 3.4245), (0.9, 2.0), (0.0, 1.0), (NAN, 4.0), (0.5, NAN))
    found = corrected(reward=first, quality=second)(hacked)
    same(found, [0.57020645, -0.7, 0.2, NAN, NAN])


def test_a_corrected_score_takes_the_mean_of_the_quality_and_keeps_the_names_of_the_reward():
    rated = samples((1.0, 5.0), (2.0, 6.0))  # means 3 and 4
    same(corrected(reward=first, quality=pair)(rated), [0.2, 2.2])
    found = corrected(reward=pair, quality=pair, middle=2.0, shift=0.0)(rated)
    assert isinstance(found, dict)
    same(found["x"], [1.0, 4.0])
    same(found["y"], [5.0, 12.0])
