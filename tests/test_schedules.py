"""Plans against schedules written out by hand."""

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgrpo.schedules import Plan, all_but_last, first_fraction, listed, random_subset, random_window, window


def chosen(plan: Plan, steps: int, iteration: int = 0, seed: int = 0) -> list[int]:
    mask = plan(steps, iteration, seed)
    assert mask.dtype == torch.bool and mask.shape == (steps,)
    return mask.nonzero().flatten().tolist()


PLANS: dict[str, Plan] = {
    "all_but_last": all_but_last,
    "first_fraction": first_fraction,
    "listed": partial(listed, indices=(0, 3)),
    "progressive": window,
    "published": partial(window, clamp=False),
    "decay": partial(window, order="decay", every=10),
    "exp_decay": partial(window, order="exp_decay", every=10, threshold=2),
    "random": partial(window, order="random"),
    "random_window": random_window,
    "random_subset": partial(random_subset, count=4),
    "random_subset, early": partial(random_subset, count=3, high=4),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@each_plan
@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.integers(6, 40), iteration=st.integers(0, 2000), seed=st.integers(0, 2**31))
def test_a_plan_repeats_and_never_holds_the_last_step(plan: Plan, steps: int, iteration: int, seed: int) -> None:
    mask = plan(steps, iteration, seed)
    assert torch.equal(mask, plan(steps, iteration, seed))
    assert not mask[-1]


@each_plan
def test_plans_refuse_a_schedule_without_a_trainable_step(plan: Plan) -> None:
    with pytest.raises(ValueError, match="steps is 1"):
        plan(1, 0, 0)


def test_fixed_plans_hold_the_steps_they_name() -> None:
    assert chosen(all_but_last, 5) == [0, 1, 2, 3]
    assert chosen(first_fraction, 10) == list(range(9))
    assert chosen(partial(first_fraction, fraction=0.6), 16) == list(range(9))
    assert chosen(partial(listed, indices=(4, 1)), 6) == [1, 4]


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, [0, 1, 2, 3]),
        (24, [0, 1, 2, 3]),
        (25, [1, 2, 3, 4]),
        (499, [19, 20, 21, 22]),
        (500, [20, 21, 22]),
        (524, [20, 21, 22]),
        (525, [21, 22]),
        (549, [21, 22]),
        (550, [22]),
        (574, [22]),
        (575, []),
        (599, []),
        (600, [0, 1, 2, 3]),
    ],
)
def test_the_published_window_shrinks_and_rolls_back(iteration: int, expected: list[int]) -> None:
    assert chosen(partial(window, clamp=False), 25, iteration) == expected


def test_a_clamped_window_stays_full_ends_at_the_last_trainable_step_and_rolls_back() -> None:
    assert chosen(window, 25, 0) == [0, 1, 2, 3]
    assert chosen(window, 25, 25 * 20) == chosen(window, 25, 25 * 21 - 1) == [20, 21, 22, 23]
    assert chosen(window, 25, 25 * 21) == [0, 1, 2, 3]
    sweep = Counter(tuple(chosen(window, 25, iteration)) for iteration in range(25 * 21))
    assert all(len(steps) == 4 and stays == 25 for steps, stays in sweep.items()) and len(sweep) == 21


def test_a_stride_that_does_not_divide_the_schedule_still_reaches_the_end() -> None:
    starts = [chosen(partial(window, size=2, stride=3, every=1), 10, i)[0] for i in range(4)]
    assert starts == [0, 3, 6, 7]
    assert chosen(partial(window, size=2, stride=3, every=1), 10, 4) == [0, 1]


def test_a_window_as_wide_as_the_schedule_is_every_trainable_step() -> None:
    for order in ("progressive", "decay", "exp_decay", "random"):
        for iteration in (0, 7, 100):
            plan = partial(window, size=9, order=order)  # type: ignore[arg-type]
            assert chosen(plan, 10, iteration) == chosen(all_but_last, 10)


def stays(plan: Plan, steps: int, iterations: int) -> list[int]:
    return list(Counter(chosen(plan, steps, i)[0] for i in range(iterations)).values())


def test_a_decaying_window_stays_shorter_towards_the_data() -> None:
    # authors' schedule, limit 8: max(2, int(8 (1 - l / 8) + 2 l / 8)) for l = 0 .. 8, of which the last window is empty
    plan = partial(window, size=2, every=8, order="decay", shortest=2, clamp=False)
    assert stays(plan, 10, 40) == [8, 7, 6, 5, 5, 4, 3, 2]
    assert chosen(plan, 10, 40) == chosen(plan, 10, 41) == []
    assert chosen(plan, 10, 42) == [0, 1]


def test_a_clamped_decaying_window_reaches_its_shortest_stay_at_the_last_place() -> None:
    plan = partial(window, size=2, every=8, order="decay", shortest=1)
    assert stays(plan, 10, 8 + 7 + 6 + 5 + 4 + 3 + 2 + 1) == [8, 7, 6, 5, 4, 3, 2, 1]


def test_an_exponentially_decaying_window_stays_as_published() -> None:
    # ceil(10 exp(-0.5 max(0, l - 2))) for l = 0 .. 7
    plan = partial(window, size=2, every=10, order="exp_decay", threshold=2, rate=0.5)
    assert stays(plan, 10, 10 * 3 + 7 + 4 + 3 + 2 + 1) == [10, 10, 10, 7, 4, 3, 2, 1]
    assert chosen(plan, 10, 10 * 3 + 7 + 4 + 3 + 2 + 1) == [0, 1]


@pytest.mark.parametrize(
    ("plan", "starts"),
    [
        (partial(window, size=3, order="random"), range(7)),
        (partial(window, size=3, order="random", clamp=False), range(6)),
        (random_window, range(3)),
        (partial(random_window, size=2, low=3, high=8), range(3, 7)),
    ],
)
def test_random_windows_start_uniformly_at_every_allowed_place(plan: Plan, starts: range) -> None:
    counts = Counter(chosen(plan, 10, iteration)[0] for iteration in range(1000))
    assert sorted(counts) == list(starts)
    expected = 1000 / len(starts)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 22  # chi square, 6 degrees, p = 0.001
    assert all(b - a == 1 for a, b in zip(chosen(plan, 10)[:-1], chosen(plan, 10)[1:], strict=True))


def test_random_plans_depend_on_the_seed_and_the_iteration() -> None:
    plan = partial(random_subset, count=4)
    first = [chosen(plan, 20, iteration, 1) for iteration in range(20)]
    assert first != [chosen(plan, 20, iteration, 2) for iteration in range(20)]
    assert len({tuple(steps) for steps in first}) > 10
    assert all(len(steps) == 4 for steps in first)


def test_a_random_subset_takes_every_trainable_step_equally_often() -> None:
    counts = Counter(step for i in range(1000) for step in chosen(partial(random_subset, count=3), 10, i))
    assert sorted(counts) == list(range(9))
    assert sum((count - 1000 / 3) ** 2 / (1000 / 3) for count in counts.values()) < 26  # chi square, 8 degrees


def test_a_random_subset_of_the_first_half_takes_each_of_its_steps_equally_often_and_no_other() -> None:
    subsets = [tuple(chosen(partial(random_subset, count=3, high=5), 10, i)) for i in range(1000)]
    counts = Counter(step for subset in subsets for step in subset)
    assert sorted(counts) == list(range(5)) and len(set(subsets)) == 10  # all of 5 over 3
    assert sum((count - 600) ** 2 / 600 for count in counts.values()) < 18  # chi square, 4 degrees


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (partial(listed, indices=(1, 9)), "indices are \\[1, 9\\]; expected some from 0 to 8"),
        (partial(listed, indices=(-1,)), "indices are"),
        (partial(listed, indices=()), "indices are"),
        (partial(first_fraction, fraction=1.0), "fraction is 1.0"),
        (partial(first_fraction, fraction=0.05), "fraction is 0.05"),
        (partial(window, size=10), "size is 10; expected from 1 to 9"),
        (partial(window, stride=0), "stride is 0"),
        (partial(window, order="sideways"), "order is 'sideways'"),  # type: ignore[arg-type]
        (partial(window, order="decay", shortest=30), "shortest is 30"),
        (partial(random_window, high=10), "high are 0 and 10"),
        (partial(random_window, size=6), "size is 6; expected from 1 to 5"),
        (partial(random_subset, count=10), "count is 10; expected from 1 to 9"),
        (partial(random_subset, count=4, high=3), "count is 4; expected from 1 to 3"),
        (partial(random_subset, count=1, high=10), "high is 10; expected from 1 to 9"),
    ],
)
def test_an_option_that_asks_for_the_impossible_is_named(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(10, 0, 0)
