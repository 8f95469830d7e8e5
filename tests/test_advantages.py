"""Advantages against numbers worked by hand and the symmetries that the methods promise."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmgrpo.advantages import (
    against_others,
    centered,
    gdpo,
    in_branches,
    leave_one_out,
    process,
    scaled_sum,
    standardize,
    standardized,
)
from mmgrpo.groups import group_sum, spread
from mmgrpo.separate import dance
from mmgrpo.types import Advantage, Feedback

F64 = torch.float64
NAN = math.nan


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def feedback(group: Tensor, *rewards: Tensor, weights: tuple[float, ...] = ()) -> Feedback:
    names = [f"r{k}" for k in range(len(rewards))]
    return Feedback(
        dict(zip(names, rewards, strict=True)),
        dict(zip(names, weights or (1.0,) * len(names), strict=True)),
        group,
    )


def close(got: Tensor, *expected: float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got, numbers(*expected).to(got.dtype), rtol=0, atol=tolerance)


ONE, TWO = ids(7, 7, 7, 7), ids(-5, -5, -5, -5, 2**40, 2**40, 2**40, 2**40)
SCORES = numbers(1, 0, 0, 0.5)
BOTH = numbers(1, 0, 0, 0.5, 10, 0, 0, 10)


def test_grpo_equals_the_worked_example() -> None:
    close(standardize(SCORES, ONE), 1.305310, -0.783186, -0.783186, 0.261062)
    close(standardize(SCORES, ONE, ddof=0), 1.507193, -0.904316, -0.904316, 0.301439)


def test_dr_grpo_equals_the_worked_example() -> None:
    close(centered(feedback(ONE, SCORES)).values, 0.625, -0.375, -0.375, 0.125)


def test_rloo_equals_the_worked_example() -> None:
    close(against_others(SCORES, ONE), 0.833333, -0.5, -0.5, 0.166667)
    close(leave_one_out(feedback(ONE, SCORES)).values, 0.833333, -0.5, -0.5, 0.166667)


def test_batch_scale_equals_the_worked_example() -> None:
    batch = (0.138051, -0.082831, -0.082831, 0.027610, 1.104411, -1.104411, -1.104411, 1.104411)
    group = (1.305310, -0.783186, -0.783186, 0.261062, 0.866010, -0.866010, -0.866010, 0.866010)
    close(standardize(BOTH, TWO, scale="batch"), *batch)
    close(standardize(BOTH, TWO), *group)


def test_flow_grpo_equals_the_worked_example() -> None:
    scores, group = numbers(1, 2, 3, 4, 4, 7), ids(1, 1, 1, 2, 2, 2)
    whole = (-0.528243, 0, 0.528243, -0.528243, -0.528243, 1.056485)
    close(standardize(scores, group, ddof=0, scale="batch"), *whole)
    close(standardize(scores, group, ddof=0), -1.224595, 0, 1.224595, -0.707057, -0.707057, 1.414114)


def test_dance_grpo_equals_the_worked_example() -> None:
    scores = numbers(0.1, 0.5, 0.9, 0.3, 0.7, 0.2)
    expected = (-1.13555, 0.162221, 1.459993, -0.486664, 0.811107, -0.811107)
    close(standardize(scores, ids(0, 0, 0, 0, 0, 0), eps=1e-8), *expected)


@pytest.mark.parametrize("gap", [1e-2, 1.0, 1e4])
def test_two_samples_have_one_over_root_two_whatever_the_gap(gap: float) -> None:
    close(standardize(numbers(0, gap), ids(1, 1), eps=0), -1 / math.sqrt(2), 1 / math.sqrt(2))
    close(standardize(numbers(0, gap), ids(1, 1), ddof=0, eps=0), -1, 1)
    close(standardize(numbers(gap, gap), ids(1, 1), eps=0), 0, 0)


@pytest.mark.parametrize("correct", [1, 3, 6])
def test_binary_rewards_give_the_odds_of_the_success_rate(correct: int) -> None:
    rate = correct / 8
    scores = numbers(*(float(i < correct) for i in range(8)))
    values = standardize(scores, torch.zeros(8, dtype=torch.int64), ddof=0, eps=0)
    close(values[:1], math.sqrt((1 - rate) / rate))
    close(values[-1:], -math.sqrt(rate / (1 - rate)))


def test_gdpo_equals_the_worked_example() -> None:
    first, second = numbers(0, 0, 1, 1, 0, 0, 0, 1), numbers(0, 1, 0, 1, 0, 0, 1, 1)
    sums = (-1.731751, 0, 0, 1.731751, -1.365775, -1.365775, 0.365975, 2.365575)
    final = (-1.165257, 0, 0, 1.165257, -0.919000, -0.919000, 0.246257, 1.591743)
    close(gdpo(feedback(TWO, first, second), batch_scale=False).values, *sums, tolerance=1.1e-6)
    close(gdpo(feedback(TWO, first, second)).values, *final)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((0, 1), (0, 0), 0.707007), ((0, 1), (0, 1), 1.414014), ((0, 1), (1, 1), 0.707007)],
)
def test_gdpo_tells_apart_what_the_sum_cannot(
    first: tuple[float, float], second: tuple[float, float], expected: float
) -> None:
    said = feedback(ids(3, 3), numbers(*first), numbers(*second))
    close(gdpo(said, batch_scale=False).values, -expected, expected)
    assert standardized(said).values[1].item() == pytest.approx(0.7070, abs=1.1e-4)


def test_gdpo_without_batch_scale_is_the_aggregation_of_mixgrpo() -> None:
    first, second = numbers(0, 1, 1, 0), numbers(10, 10, 30, 30)
    said = feedback(ONE, first, second)
    close(gdpo(said, eps=1e-8, batch_scale=False).values, -1.732051, 0, 1.732051, 0)
    close(standardized(said, eps=1e-8).values, -0.908192, -0.821698, 0.908192, 0.821698)


def test_gdpo_with_one_reward_is_grpo() -> None:
    assert torch.equal(gdpo(feedback(TWO, BOTH)).values, standardized(feedback(TWO, BOTH)).values)
    watched = feedback(TWO, BOTH, numbers(*range(8)), weights=(2.0, 0.0))
    assert torch.equal(gdpo(watched).values, standardized(watched).values)


def test_gdpo_has_mean_zero_and_std_one_over_the_batch() -> None:
    values = gdpo(feedback(TWO, BOTH, numbers(3, 1, 4, 1, 5, 9, 2, 6)), eps=1e-12).values
    assert values.mean().abs() < 1e-9 and abs(values.std() - 1) < 1e-9


def test_gdpo_skips_a_missing_reward_or_takes_it_as_zero() -> None:
    first, second = numbers(NAN, 0, 1, 1), numbers(0, 1, 0, 1)
    said, option = feedback(ONE, first, second), partial(gdpo, batch_scale=False)
    own = standardize(second, ONE)
    skipped = torch.cat([own[:1], own[1:] + standardize(first[1:], ONE[1:])])
    torch.testing.assert_close(option(said).values, skipped)
    zero = option(feedback(ONE, first.nan_to_num(0), second)).values
    torch.testing.assert_close(option(said, missing="zero").values, zero)
    assert not torch.allclose(zero, skipped)
    silent = feedback(ONE, first, numbers(NAN, 1, 0, 1))
    for missing in ("skip", "zero"):
        assert gdpo(silent, missing=missing).keep.tolist() == [False, True, True, True]  # type: ignore[arg-type]


def test_gdpo_of_rewards_that_cancel_is_exactly_zero() -> None:
    group = ids(0, 0, 0, 0, 1, 1)
    said = feedback(group, numbers(0, 0, 0, 0, 3, 1003), numbers(0, 0, 0, 0, 1, 0))
    assert (gdpo(said, eps=0).values == 0).all()


def test_gdpo_weights_order_the_rewards() -> None:
    first, second = numbers(0, 1, 0, 1), numbers(1, 0, 0, 1)
    values = gdpo(feedback(ONE, first, second, weights=(3.0, 1.0)), batch_scale=False).values
    torch.testing.assert_close(values, 3 * standardize(first, ONE) + standardize(second, ONE))


def test_scaled_sum_equals_the_worked_example_of_flowse() -> None:
    quality, speaker, words = numbers(3, 3.2, 3.4, 3), numbers(0.80, 0.82, 0.70, 0.88), numbers(0.90, 0.91, 0.85, 0.92)
    said = feedback(ONE, quality, speaker, words, weights=(0.6, 1.0, 1.0))
    close(scaled_sum(said, eps=0).values, -0.235636, 0.690753, -1.524434, 1.069317)
    alone = feedback(ONE, quality, speaker, words, weights=(0.6, 0.0, 0.0))
    close(scaled_sum(alone, eps=0).values, -0.904534, 0.301511, 1.507557, -0.904534)


def test_scaled_sum_divides_by_the_std_of_the_batch_and_drops_what_does_not_vary() -> None:
    first, second = numbers(0, 2, 0, 2, 5, 5, 5, 5), numbers(1, 1, 2, 2, 9, 9, 9, 19)
    spread = first.std(correction=0), second.std(correction=0)
    by_hand = first / spread[0] + 2 * second / spread[1]
    constant = torch.full((8,), 4.0, dtype=F64)
    said = feedback(TWO, first, second, constant, weights=(1.0, 2.0, 5.0))
    close(scaled_sum(said, eps=0).values, *standardize(by_hand, TWO, ddof=0, eps=0).tolist())


def test_a_reward_that_is_missing_counts_as_its_groups_mean_in_scaled_sum() -> None:
    first, second = numbers(0, 1, 0, 1), numbers(100, 102, NAN, 101)
    filled = numbers(100, 102, 101, 101)
    got, expected = (scaled_sum(feedback(ONE, first, s), eps=0) for s in (second, filled))
    assert got.keep.all() and (got.values.sign() == expected.values.sign()).all()
    std = second[~second.isnan()].std(correction=0)
    combined = first / 0.5 + (filled - 101) / std
    close(got.values, *standardize(combined, ONE, ddof=0, eps=0).tolist())


# Exceptions, the same for every component

COMPONENTS: dict[str, Callable[[Feedback], Advantage]] = {
    "standardized": standardized,
    "ddof 0": partial(standardized, ddof=0),
    "batch": partial(standardized, scale="batch"),
    "eps 0": partial(standardized, eps=0.0),
    "clamped": partial(standardized, clamp=1.0),
    "centered": centered,
    "leave_one_out": leave_one_out,
    "gdpo": gdpo,
    "scaled_sum": scaled_sum,
    "dance": dance,
    "in branches": in_branches(),
}
each_component = pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS.keys())


@each_component
def test_a_sample_without_opinion_is_dropped_and_changes_nobody(component: Callable[[Feedback], Advantage]) -> None:
    group, scores = ids(1, 1, 1, 2, 2), numbers(1, NAN, 3, 5, 9)
    heard = torch.tensor([0, 2, 3, 4])
    got, alone = component(feedback(group, scores)), component(feedback(group[heard], scores[heard]))
    assert got.keep.tolist() == [True, False, True, True, True] and got.values[1] == 0
    torch.testing.assert_close(got.values[heard], alone.values)
    assert got.metrics["without_opinion"] == pytest.approx(0.2)


@each_component
def test_single_silent_and_tied_groups_are_exactly_zero(component: Callable[[Feedback], Advantage]) -> None:
    group, scores = ids(1, 2, 3, 3, 4, 4, 4, 5, 5), numbers(3, NAN, NAN, NAN, 0.1, 0.1, 0.1, 7, NAN)
    for dtype in (torch.float32, F64):
        got = component(feedback(group, scores.to(dtype)))
        assert (got.values == 0).all()
        assert got.keep.tolist() == [True, False, False, False, True, True, True, True, False]
        assert got.metrics["groups_without_spread"] == 1 and got.metrics["group_std"] == 0


@each_component
def test_a_batch_without_opinions_gives_zeros(component: Callable[[Feedback], Advantage]) -> None:
    got = component(feedback(ONE, torch.full((4,), NAN)))
    assert (got.values == 0).all() and not got.keep.any() and got.values.dtype == torch.float32


@each_component
@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -7.3e-5])
@pytest.mark.parametrize("size", [3, 7, 24])
def test_equal_float32_scores_leave_no_rounding_residue(
    component: Callable[[Feedback], Advantage], value: float, size: int
) -> None:
    group = torch.arange(2).repeat_interleave(size)
    scores = torch.cat([torch.full((size,), value), torch.linspace(0, 1, size)])
    assert (component(feedback(group, scores)).values[:size] == 0).all()


@each_component
def test_an_infinite_reward_is_refused_by_name(component: Callable[[Feedback], Advantage]) -> None:
    with pytest.raises(ValueError, match="reward 'r0' is infinite for 1 of 4 samples"):
        component(feedback(ONE, numbers(1, math.inf, 0, 0)))


def test_clamp_bounds_the_values() -> None:
    scores = torch.zeros(100, dtype=F64)
    scores[0] = 1
    group = torch.zeros(100, dtype=torch.int64)
    assert standardized(feedback(group, scores)).values[0] > 9
    assert standardized(feedback(group, scores), clamp=5.0).values[0] == 5


def test_mistaken_options_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="scale is 'prompt'"):
        standardize(SCORES, ONE, scale="prompt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ddof is 2"):
        standardize(SCORES, ONE, ddof=2)
    with pytest.raises(ValueError, match="eps is -1"):
        standardize(SCORES, ONE, eps=-1)
    with pytest.raises(ValueError, match="clamp is 0"):
        standardized(feedback(ONE, SCORES), clamp=0.0)
    with pytest.raises(ValueError, match="missing is 'drop'"):
        gdpo(feedback(ONE, SCORES), missing="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group has dtype torch.float32"):
        standardize(SCORES, ONE.float())
    with pytest.raises(ValueError, match="group has shape"):
        against_others(SCORES, ids(1, 1))


# Symmetries


@st.composite
def batches(draw: st.DrawFn) -> Feedback:
    """Two rewards with many ties and some NaN, in groups of unequal sizes with scattered ids."""
    size = draw(st.integers(2, 16))
    group = draw(st.lists(st.sampled_from([-(2**62), -1, 0, 5, 2**62]), min_size=size, max_size=size))
    score = st.one_of(st.sampled_from([0.0, 1.0, NAN]), st.integers(-8, 8).map(float))
    rewards = [torch.tensor(draw(st.lists(score, min_size=size, max_size=size)), dtype=F64) for _ in range(2)]
    return feedback(torch.tensor(group), *rewards)


def changed(said: Feedback, change: Callable[[Tensor], Tensor]) -> Feedback:
    return Feedback({name: change(values) for name, values in said.rewards.items()}, said.weights, said.group)


symmetry = settings(max_examples=20, deadline=None, derandomize=True)


@each_component
@symmetry
@given(said=batches(), data=st.data())
def test_permuting_samples_permutes_advantages(
    component: Callable[[Feedback], Advantage], said: Feedback, data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(said.group)))))
    moved = Feedback({n: v[order] for n, v in said.rewards.items()}, said.weights, said.group[order])
    got, expected = component(moved), component(said)
    torch.testing.assert_close(got.values, expected.values[order], rtol=1e-9, atol=1e-9)
    assert torch.equal(got.keep, expected.keep[order])


@each_component
@symmetry
@given(said=batches())
def test_values_are_finite_and_zero_without_opinion(component: Callable[[Feedback], Advantage], said: Feedback) -> None:
    got = component(said)
    assert torch.isfinite(got.values).all() and (got.values[~got.keep] == 0).all()
    assert torch.equal(got.keep, ~said.total().isnan())


@each_component
@symmetry
@given(said=batches(), shift=st.integers(-100, 100))
def test_a_constant_added_to_the_single_reward_of_all_changes_nothing(
    component: Callable[[Feedback], Advantage], said: Feedback, shift: int
) -> None:
    single = feedback(said.group, said.rewards["r0"])
    torch.testing.assert_close(
        component(changed(single, lambda values: values + shift)).values, component(single).values, rtol=1e-9, atol=1e-9
    )


@symmetry
@given(said=batches(), factor=st.sampled_from([0.25, 3.0, 1e3]))
def test_scaling_rewards_scales_or_leaves_the_advantage_as_promised(said: Feedback, factor: float) -> None:
    scaled = changed(said, lambda values: values * factor)
    for same in (partial(standardized, eps=0.0), partial(standardized, eps=0.0, scale="batch"), partial(gdpo, eps=0.0)):
        torch.testing.assert_close(same(scaled).values, same(said).values, rtol=1e-9, atol=1e-9)
    for linear in (centered, leave_one_out):
        torch.testing.assert_close(linear(scaled).values, factor * linear(said).values, rtol=1e-9, atol=1e-9)


@symmetry
@given(said=batches())
def test_scaling_one_reward_of_gdpo_or_of_a_scaled_sum_changes_nothing(said: Feedback) -> None:
    rewards = {"r0": 1000 * said.rewards["r0"] + 3, "r1": said.rewards["r1"]}
    scaled = Feedback(rewards, said.weights, said.group)
    for same in (gdpo, scaled_sum):
        torch.testing.assert_close(same(scaled, eps=0).values, same(said, eps=0).values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("component", [standardized, centered, leave_one_out, partial(gdpo, batch_scale=False)])
@symmetry
@given(said=batches(), others=batches())
def test_other_groups_change_nothing(
    component: Callable[[Feedback], Advantage], said: Feedback, others: Feedback
) -> None:
    rewards = {name: torch.cat([values, others.rewards[name]]) for name, values in said.rewards.items()}
    joint = component(Feedback(rewards, said.weights, torch.cat([said.group, others.group // 2 + 17])))
    torch.testing.assert_close(joint.values[: len(said.group)], component(said).values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "component", [standardized, partial(standardized, scale="batch"), centered, leave_one_out, scaled_sum]
)
@symmetry
@given(said=batches())
def test_each_group_sums_to_zero(component: Callable[[Feedback], Advantage], said: Feedback) -> None:
    assert group_sum(component(said).values, said.group).abs().max() < 1e-9


@symmetry
@given(said=batches())
def test_leave_one_out_is_the_centred_score_times_size_over_size_minus_one(said: Feedback) -> None:
    kept = centered(said).keep
    size = group_sum(kept.double(), said.group)[kept]
    expected = torch.where(size > 1, centered(said).values[kept] * size / (size - 1).clamp(min=1), 0)
    torch.testing.assert_close(leave_one_out(said).values[kept], expected)


@st.composite
def parted(draw: st.DrawFn) -> Feedback:
    """Rewards of the parts of answers, of which some have fewer, at three places of four decisions."""
    size = draw(st.integers(2, 10))
    group = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
    part = st.one_of(st.just(NAN), st.integers(-8, 8).map(float))
    steps = torch.tensor(
        draw(st.lists(st.lists(part, min_size=4, max_size=4), min_size=size, max_size=size)), dtype=F64
    )
    total = torch.where(steps.isnan().all(1), torch.nan, steps.nansum(1))
    return Feedback({"r": total}, {"r": 1.0}, group, steps)


def of_parts(said: Feedback, steps: Tensor, order: Tensor) -> Feedback:
    total = torch.where(steps.isnan().all(1), torch.nan, steps.nansum(1))
    return Feedback({"r": total[order]}, said.weights, said.group[order], steps[order])


@symmetry
@given(said=parted(), data=st.data(), shift=st.integers(-50, 50), factor=st.sampled_from([0.25, 3.0, 1e3]))
def test_process_follows_a_permutation_and_ignores_shift_and_scale_of_the_parts(
    said: Feedback, data: st.DataObject, shift: int, factor: float
) -> None:
    steps, every = said.step_rewards, torch.arange(len(said.group))
    assert steps is not None
    order = torch.tensor(data.draw(st.permutations(range(len(every)))))
    exact = partial(process, eps=0.0)
    expected = exact(said)
    for changed_steps, rows in ((steps, order), (steps + shift, every), (steps * factor, every)):
        got = exact(of_parts(said, changed_steps, rows))
        torch.testing.assert_close(got.values, expected.values[rows], rtol=1e-9, atol=1e-9)
        assert torch.equal(got.keep, expected.keep[rows])


def test_batch_scale_of_one_group_is_group_scale() -> None:
    torch.testing.assert_close(standardize(SCORES, ONE, scale="batch"), standardize(SCORES, ONE))


def test_spread_counts_groups_not_samples() -> None:
    scores, group = numbers(1, 1, 1, 1, 0, 2, NAN, 5), ids(1, 1, 1, 1, 2, 2, 2, 3)
    flat, std = spread(scores, group)
    assert flat == pytest.approx(2 / 3) and std == pytest.approx(math.sqrt(2) / 3)
