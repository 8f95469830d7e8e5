"""Rewards made of rewards."""

import pytest
import torch
from torch import Tensor

from mmgrpo.types import Batch, Feedback, Prompt, Reward, Samples
from rewards.compose import named, scale, weighted

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
