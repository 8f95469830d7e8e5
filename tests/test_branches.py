"""Samples that explored at the same decisions are compared with each other alone."""

from functools import partial

import pytest
import torch
from test_advantages import NAN, close, feedback, ids, numbers
from torch import Tensor

from mmgrpo.advantages import branches, centered, in_branches, standardized
from mmgrpo.comparing import Comparison, Remembering, needed, teaching
from mmgrpo.components import build
from mmgrpo.credit import anchored_values
from mmgrpo.routes import branched, shared_out
from mmgrpo.types import Advantage, Feedback

REWARDS = numbers(0.2, 0.5, 0.8, 0.4, 0.4, 0.4, 0.1, 0.1, 0.7)  # three branches of three samples, TempFlow's example
STEPS = torch.arange(3).repeat_interleave(3)


def told(scores: Tensor, group: Tensor, step: Tensor, steps: int = 4) -> Feedback:
    """Every sample has one trained step."""
    return Feedback({"r": scores}, {"r": 1.0}, group, mask=torch.arange(steps) == step.unsqueeze(1))


def test_branches_equal_the_worked_example_of_tempflow() -> None:
    found = in_branches(advantage=partial(standardized, ddof=0))(told(REWARDS, torch.zeros_like(STEPS), STEPS))
    close(found.values, -1.224245, 0, 1.224245, 0, 0, 0, -0.706857, -0.706857, 1.413714)
    assert found.metrics["groups_without_spread"] == pytest.approx(1 / 3)


def test_the_branches_of_two_groups_are_not_mixed() -> None:
    scores, group, step = torch.cat([REWARDS, REWARDS + 7]), torch.arange(18) // 9, STEPS.repeat(2)
    compare = in_branches(advantage=centered)
    found = compare(told(scores, group, step)).values
    close(found[:9], *compare(told(REWARDS, group[:9], STEPS)).values.tolist())
    close(found[9:], *found[:9].tolist())
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    close(compare(told(scores[order], group[order], step[order])).values, *found[order].tolist())


def test_one_branch_is_the_group() -> None:
    said, plain = told(REWARDS, ids(0, 0, 0, 0, 1, 1, 1, 1, 1), torch.zeros_like(STEPS)), centered
    assert torch.equal(in_branches(advantage=plain)(said).values, plain(said).values)
    without_mask = feedback(said.group, REWARDS)
    assert torch.equal(in_branches(advantage=plain)(without_mask).values, plain(without_mask).values)


def test_a_sample_alone_in_its_branch_or_without_an_opinion_has_no_value() -> None:
    found = in_branches()(told(numbers(1, 2, 5, NAN), ids(0, 0, 0, 0), ids(0, 0, 1, 2)))
    assert found.values[2:].tolist() == [0, 0] and found.values[:2].all()
    assert found.keep.tolist() == [True, True, True, False]


def test_branches_are_those_of_the_routes_of_a_group() -> None:
    routes = branched(torch.linspace(1, 0, 5), 0, 0)
    taken = torch.tensor(shared_out(len(routes), 6) * 2)
    mask = torch.stack([torch.arange(4) == routes[route].trained[0] for route in taken])
    found = branches(Feedback({"r": numbers(*[0] * 12)}, {"r": 1.0}, torch.arange(12) // 6, mask=mask))
    expected = torch.arange(12) // 2
    assert torch.equal(found.unsqueeze(1) == found, expected.unsqueeze(1) == expected)


def test_a_group_teaches_where_a_branch_differs_inside() -> None:
    compare = in_branches()
    said = told(numbers(1, 1, 2, 2, 1, 2, 2, 2), torch.arange(8) // 4, ids(0, 0, 1, 1, 0, 0, 1, 1))
    assert teaching(compare, said).tolist() == [False] * 4 + [True, True, False, False]
    assert teaching(standardized, said).all()


def test_what_the_inner_advantage_asks_for_is_asked_for_and_a_recipe_names_it() -> None:
    assert needed(in_branches(advantage=anchored_values(predicted=True))) == ("predicted_rewards",)
    inner = {"build": "mmgrpo.advantages:centered"}
    compare = build({"build": "mmgrpo.advantages:in_branches", "advantage": inner}, "advantage")
    assert isinstance(compare, Comparison)
    close(compare(told(numbers(1, 3, 7, 8), ids(0, 0, 0, 0), ids(0, 0, 1, 1))).values, -1, 1, -0.5, 0.5)


def test_an_advantage_with_a_memory_is_refused() -> None:
    def remembered(said: Feedback, memory: object) -> tuple[Advantage, dict[str, Tensor]]:
        return centered(said), {}

    with pytest.raises(ValueError, match=r"advantage\.advantage remembers what it saw"):
        in_branches(advantage=Remembering(remembered, {}))
