"""Routes against the steps written out by hand, and what must hold for any schedule."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transitions import close
from torch import Tensor

from mmgrpo.components import build
from mmgrpo.routes import Route, Routes, along, branched, flash, merged, shared_out, step_entropy
from mmgrpo.schedules import all_but_last, first_fraction, listed, random_window, window
from mmgrpo.transitions import Level, Step, flow_sde

F64 = torch.float64


def shifted(steps: int, shift: float = 3.0) -> Tensor:
    even = torch.linspace(1, 0, steps + 1, dtype=F64)
    return shift * even / (1 + (shift - 1) * even)


def merges(share: float, **options: float) -> dict[int, int]:
    """Of the published schedule of 16 steps: number of a step, counted from the data as in the paper -> steps in one."""
    found = {}
    for route in merged(shifted(16), 0, 0, share=share, **options):
        (position,) = route.trained
        end = route.taken[position + 1] if position + 1 < len(route.taken) else 16
        found[16 - route.taken[position]] = end - route.taken[position]
    return found


def test_all_steps_are_taken_along_a_plan() -> None:
    plan = partial(listed, indices=(1, 3))
    assert along(shifted(5), 0, 0, plan=plan) == (Route((0, 1, 2, 3, 4), (1, 3)),)
    assert along(shifted(3), 0, 0) == (Route((0, 1, 2), (0, 1)),)


def test_a_route_branches_at_each_step_of_the_plan() -> None:
    whole = (0, 1, 2, 3)
    assert branched(shifted(4), 0, 0) == tuple(Route(whole, (step,)) for step in (0, 1, 2))
    assert branched(shifted(4), 0, 0, plan=partial(listed, indices=(2,))) == (Route(whole, (2,)),)
    assert branched(shifted(4), 0, 0, plan=lambda steps, *_: torch.zeros(steps, dtype=torch.bool)) == ()


def test_entropies_of_steps_equal_the_worked_example() -> None:
    sigma = shifted(16)
    single = torch.stack([step_entropy(sigma, start, 0.7)[0] for start in range(8)])
    close(single, 2.8929, 2.9885, 2.1366, 1.7631, 1.5423, 1.3921, 1.2810, 1.1934, tolerance=5e-5)


def test_the_entropy_is_that_of_the_samplers_own_step() -> None:
    sigma = shifted(16)
    levels = [Level(1 - value, value) for value in sigma]
    zero = torch.zeros(1, 1, dtype=F64)
    for start in (0, 1, 5):
        std = [
            flow_sde(Step(zero, zero, zero, levels[start], later, levels[1])).std for later in levels[start + 1 : -1]
        ]
        scale = torch.stack(std).log() + 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e, dtype=F64))
        torch.testing.assert_close(step_entropy(sigma, start, 0.7), scale.exp())
        assert (step_entropy(sigma, start, 0.7).diff() > 0).all()


def test_merges_equal_the_worked_example() -> None:
    assert merges(0.5) == {16: 1, 15: 1, 14: 2, 13: 2, 12: 2, 11: 3, 10: 3, 9: 3}
    every = merges(1.0)
    assert every[8] == 4 and not set(every) & {1, 2, 3, 4}


def test_the_steps_inside_a_merge_are_not_taken_and_the_rest_is() -> None:
    third = merged(shifted(16), 0, 0)[2]
    assert third == Route((0, 1, 2, *range(4, 16)), (2,))
    assert all(route.taken[-1] == 15 for route in merged(shifted(16), 0, 0))


def test_without_a_threshold_no_step_is_merged_and_one_out_of_reach_is_told() -> None:
    assert merged(shifted(16), 0, 0, threshold=0.0) == branched(
        shifted(16), 0, 0, plan=partial(first_fraction, fraction=0.5)
    )
    with pytest.raises(ValueError, match=r"threshold is 99; expected at most 17\.91, what the longest step reaches"):
        merged(shifted(16), 0, 0, threshold=99)


def test_a_tail_of_fewer_steps_follows_the_window() -> None:
    frozen = partial(listed, indices=(0, 1, 2, 3))
    (route,) = flash(shifted(25), 0, 0, plan=frozen)
    assert route.trained == (0, 1, 2, 3) and route.fast_from == 4 and len(route.taken) == 4 + 8  # int(.4 * 21)
    assert route.taken == (0, 1, 2, 3, 4, 7, 9, 12, 15, 17, 20, 22)
    assert flash(shifted(25), 0, 0, plan=frozen, share=1.0)[0].taken == tuple(range(25))
    (late,) = flash(shifted(10), 0, 0, plan=partial(listed, indices=(7, 8)))
    assert late == Route(tuple(range(10)), (7, 8), 9)  # one step is left
    (empty,) = flash(shifted(10), 0, 0, plan=lambda steps, *_: torch.zeros(steps, dtype=torch.bool))
    assert empty.trained == () and empty.fast_from == 0 and len(empty.taken) == 4


def test_a_uniform_schedule_has_a_tail_of_equal_steps() -> None:
    (route,) = flash(torch.linspace(1, 0, 21, dtype=F64), 0, 0, plan=partial(listed, indices=(0, 4)), share=0.2)
    assert route.taken[5:] == (5, 10, 15)


ROUTES: dict[str, Routes] = {
    "along": along,
    "branched": branched,
    "merged": merged,
    "flash": flash,
    "along a random window": partial(along, plan=random_window),
    "flash, random": partial(flash, plan=partial(window, order="random"), share=0.3),
}


@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES.keys())
@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.integers(6, 40), shift=st.floats(1, 6), iteration=st.integers(0, 500), seed=st.integers(0, 2**31))
def test_a_route_repeats_ascends_from_the_noise_and_never_trains_its_last_step(
    routes: Routes, steps: int, shift: float, iteration: int, seed: int
) -> None:
    sigma = shifted(steps, shift)
    found = routes(sigma, iteration, seed)
    assert found == routes(sigma, iteration, seed) and len(set(found)) == len(found) > 0
    for route in found:
        assert route.taken[0] == 0 and route.taken[-1] < steps
        assert all(now < later for now, later in zip(route.taken[:-1], route.taken[1:], strict=True))
        assert route.trained and all(0 <= position < len(route.taken) - 1 for position in route.trained)
        assert route.fast_from is None or max(route.trained) < route.fast_from < len(route.taken)


def test_samples_of_a_group_are_shared_out_evenly_and_in_order() -> None:
    assert shared_out(1, 3) == (0, 0, 0)
    assert shared_out(3, 6) == (0, 0, 1, 1, 2, 2)
    assert shared_out(4, 4) == (0, 1, 2, 3)
    for routes, samples in ((3, 4), (5, 4), (0, 4)):
        with pytest.raises(ValueError, match=f"{samples} samples for {routes} routes; expected a multiple"):
            shared_out(routes, samples)


def test_a_recipe_names_routes_and_their_plan() -> None:
    plan = {"build": "mmgrpo.schedules:listed", "indices": [1]}
    routes = build({"build": "mmgrpo.routes:branched", "plan": plan}, "policy.routes")
    assert routes(shifted(3), 0, 0) == (Route((0, 1, 2), (1,)),)


@pytest.mark.parametrize(
    ("routes", "sigma", "message"),
    [
        (along, torch.tensor([1.0]), r"sigma has shape \(1,\); expected two or more levels that fall"),
        (along, torch.tensor([0.0, 1.0]), "sigma has shape"),
        (merged, torch.tensor([14.0, 2.0, 0.0]), "sigma goes from 14 to 0; expected a flow's"),
        (partial(merged, share=0.01), shifted(10), r"share is 0\.01; expected from 1 / steps = 0\.1"),
        (partial(merged, share=1.0), shifted(1), "share is 1.0"),
        (partial(flash, share=0.0), shifted(10), r"share is 0\.0; expected a share of the remaining steps"),
        (partial(branched, plan=all_but_last), shifted(1), "steps is 1"),
    ],
)
def test_what_has_no_route_is_refused(routes: Routes, sigma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routes(sigma, 0, 0)
