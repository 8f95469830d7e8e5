"""DiffusionNFT and AWM: the worked examples, and real flow matching as the oracle of their gradients."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_gates import close, numbers
from torch import Tensor, nn

from mmgrpo import matching
from mmgrpo.components import build
from mmgrpo.facts import facts
from mmgrpo.matching import advantage_weighted, awm_tuned, generalized_huber, held, huber, nft, nft_plain
from mmgrpo.objectives import Objective, gspo, reinforce
from mmgrpo.ratios import masked
from mmgrpo.types import Evaluation
from mmgrpo.weighting import narrowest

F64 = torch.float64
CLEAN, NOISE, TIME = numbers(1, -1), numbers(0.5, 0.25), 0.6
OLD, NEW = numbers(-0.4, 1.1), numbers(-0.45, 1.2)


def draws(new: Tensor, old: Tensor, target: Tensor, time: Tensor, reference: Tensor | None = None) -> Evaluation:
    """Draws of a flow whose outputs are velocities; (B, S, D) each, time (B, S)."""
    error, old_error = ((value - target).square().mean(2) for value in (new, old))
    return Evaluation(
        old_error - error,
        error=error,
        old_error=old_error,
        reference_error=None if reference is None else (reference - target).square().mean(2),
        drift=(new - old).square().mean(2),
        clean_scale=time,
        prediction=new,
        old_prediction=old,
        target=target,
    )


def example(new: Tensor = NEW) -> Evaluation:
    """The catalogue's draw, one of one sample."""
    return draws(*(value.view(1, 1, 2) for value in (new, OLD, NOISE - CLEAN)), torch.full((1, 1), TIME, dtype=F64))


def one(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=F64)


# DiffusionNFT


@pytest.mark.parametrize(
    ("strength", "advantage", "loss"),
    [(1.0, 2.5, 0.271875), (1.0, -5.0, 0.6375), (1.0, 0.0, 0.39375), (0.1, 2.5, 5 * 0.755450)],
)
def test_nft_equals_the_worked_example(strength: float, advantage: float, loss: float) -> None:
    close(nft(example(), one(advantage), strength=strength), loss, tolerance=5e-6)


@pytest.mark.parametrize(("strength", "better", "worse"), [(1.0, 0.03, 0.1275), (0.1, 0.073085, 0.082925)])
def test_its_two_losses_equal_the_worked_example(strength: float, better: float, worse: float) -> None:
    for advantage, loss in ((5.0, better), (-5.0, worse)):
        close(nft(example(), one(advantage), strength=strength) * strength / 5, loss)


@pytest.mark.parametrize(("advantage", "loss"), [(2.5, 0.0125), (-5.0, 0.0425)])
def test_the_loss_of_the_paper_equals_the_worked_example(advantage: float, loss: float) -> None:
    close(nft_plain(example(), one(advantage)), loss)


def test_advantages_beyond_the_bound_count_as_the_bound() -> None:
    for objective in (nft, nft_plain):
        assert torch.equal(objective(example(), one(9.0)), objective(example(), one(5.0)))
        assert torch.equal(objective(example(), one(2.0), bound=1.0), objective(example(), one(1.0), bound=1.0))


@pytest.mark.parametrize("objective", [nft, nft_plain])
def test_without_a_move_the_advantage_changes_no_value_and_at_0_there_is_no_gradient(objective: Objective) -> None:
    losses, slopes = [], []
    for advantage in (-3.0, 0.0, 3.0):
        leaf = OLD.clone().requires_grad_()
        losses.append(objective(example(leaf), one(advantage)))
        slopes += torch.autograd.grad(losses[-1].sum(), leaf)
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(slopes[0], -slopes[2])
    assert slopes[1].abs().max() == 0 and slopes[2].abs().min() > 0


@pytest.mark.parametrize("objective", [nft, nft_plain])
def test_a_sample_of_advantage_0_is_pulled_back_to_the_old_output(objective: Objective) -> None:
    leaf = NEW.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(example(leaf), one(0.0)).sum(), leaf)
    assert facts(objective).every and float(slope @ (NEW - OLD)) > 0


def test_a_draw_that_is_already_right_has_a_finite_loss_and_gradient() -> None:
    leaf = (NOISE - CLEAN).requires_grad_()
    right = replace(example(leaf), old_prediction=(NOISE - CLEAN).view(1, 1, 2))
    loss = nft(right, one(5.0))
    assert loss.item() == 0 and torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


class Flow:
    """A linear velocity of two latent elements, and draws of six samples."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.velocity = nn.Linear(3, 2).double()
        with torch.no_grad():
            for value in self.velocity.parameters():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=F64))
        self.clean, self.noise = torch.randn(2, 6, 1, 2, generator=generator, dtype=F64)
        self.time = torch.rand(6, 4, generator=generator, dtype=F64) * 0.9 + 0.05

    @property
    def target(self) -> Tensor:
        return (self.noise - self.clean).expand(6, 4, 2)

    def evaluation(self) -> Evaluation:
        """On policy: the old output is today's."""
        time = self.time.unsqueeze(2)
        state = (1 - time) * self.clean + time * self.noise
        new = self.velocity(torch.cat([state, time], 2))
        return draws(new, new.detach(), self.target, self.time)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat(
            [slope.flatten() for slope in torch.autograd.grad(loss.sum(), list(self.velocity.parameters()))]
        )


def test_samples_that_are_all_good_make_the_paper_s_loss_flow_matching() -> None:
    flow, good = Flow(), torch.full((6, 4), 5.0, dtype=F64)
    supervised = (flow.evaluation().tensors()["prediction"] - flow.target).square().mean(2)
    found = nft_plain(flow.evaluation(), good)
    torch.testing.assert_close(found, supervised)
    torch.testing.assert_close(flow.gradient(found), flow.gradient(supervised))


# AWM


@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.0001), (-1.0, 1.013845)])
def test_awm_equals_the_worked_example(advantage: float, loss: float) -> None:
    close(example().tensors()["error"], 0.0025)
    close(example().tensors()["old_error"], 0.01625)
    close(advantage_weighted(example(), one(advantage)), loss)


def test_the_weighted_likelihoods_equal_the_worked_example() -> None:
    found = generalized_huber(numbers(0.0025, 0.01625), numbers(TIME, TIME))
    close(found, 0.529067, 0.849300)
    ratio = advantage_weighted(example(), one(-1.0), weighting=generalized_huber)
    close(ratio, 1.377448)


def test_the_weightings_are_those_of_the_catalogue() -> None:
    error, time = numbers(0.04, 0.25), numbers(0.5, 0.2)
    close(matching.uniform(error, time), 0.04, 0.25)
    close(matching.by_time(error, time), 0.02, 0.05)
    close(matching.by_squared_time(error, time), 0.01, 0.01)
    for found, m, t in zip(huber(error, time), (0.04, 0.25), (0.5, 0.2), strict=True):
        assert float(found) == pytest.approx(t * (math.sqrt(m + 1e-10) - 1e-5), abs=1e-12)
    assert (huber(numbers(0), numbers(1)) == 0).all() and (generalized_huber(numbers(0), numbers(1)) == 0).all()


@pytest.mark.parametrize(
    "weighting", [matching.uniform, matching.by_time, matching.by_squared_time, huber, generalized_huber]
)
def test_on_policy_the_gradient_is_the_advantage_times_that_of_the_weighted_error(
    weighting: matching.Weighting,
) -> None:
    flow = Flow()
    advantages = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    here = flow.evaluation()
    assert here.error is not None
    expected = flow.gradient(advantages * weighting(here.error, flow.time))
    found = flow.gradient(advantage_weighted(flow.evaluation(), advantages, weighting=weighting))
    torch.testing.assert_close(found, expected)


def test_samples_that_are_all_good_make_it_flow_matching() -> None:
    flow = Flow()
    here = flow.evaluation()
    assert here.error is not None
    found = flow.gradient(advantage_weighted(flow.evaluation(), torch.ones(6, 4, dtype=F64)))
    torch.testing.assert_close(found, flow.gradient(here.error))


def test_any_objective_on_log_ratios_can_be_inside() -> None:
    here, advantages = masked(Flow().evaluation(), torch.ones(6, 4, dtype=torch.bool)), torch.ones(6, 4, dtype=F64)
    moved = replace(here, old_error=here.tensors()["old_error"] + 0.1)
    close(advantage_weighted(moved, advantages, objective=reinforce)[0], -0.1, -0.1, -0.1, -0.1)
    assert facts(partial(advantage_weighted, objective=gspo)).couples == "sample"
    clip = narrowest(advantage_weighted)
    assert clip is not None and clip.width == 1e-4


def test_a_small_fall_of_the_weighted_error_keeps_its_digits_in_float32() -> None:
    old = torch.tensor([[0.3, 0.7]])
    new = old * (1 - 1e-5)
    here = Evaluation(old - new, error=new, old_error=old, clean_scale=torch.full((1, 2), 0.6))
    found = advantage_weighted(here, -torch.ones(1, 2), objective=reinforce, weighting=generalized_huber)
    exact = generalized_huber(old.double(), one(0.6)) - generalized_huber(new.double(), one(0.6))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_the_tuned_recipe_is_a_wide_clip_and_a_hold_on_the_old_outputs() -> None:
    drift = (0.05**2 + 0.1**2) / 2
    close(awm_tuned(example(), one(1.0)), -1.377448 + drift)
    close(awm_tuned(example(), one(-1.0)), 1.377448 + drift)
    close(held(example(), one(1.0), weight=2.0), -1.0001 + 2 * drift)
    assert facts(awm_tuned).every and not facts(advantage_weighted).every
    clip = narrowest(awm_tuned)
    assert clip is not None and clip.width == 1.0


def test_a_recipe_names_what_is_weighed_and_how() -> None:
    inner = {"build": "mmgrpo.matching:advantage_weighted", "weighting": {"build": "mmgrpo.matching:by_time"}}
    built = build({"build": "mmgrpo.matching:held", "objective": inner, "weight": 0.5}, "objective")
    expected = held(example(), one(-1.0), objective=partial(advantage_weighted, weighting=matching.by_time), weight=0.5)
    close(built(example(), one(-1.0)), float(expected))
    close(expected, math.exp(TIME * 0.01375) + 0.5 * 0.00625)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (partial(nft, bound=0.0), r"bound is 0\.0; expected the positive"),
        (partial(nft_plain, strength=-1.0), r"strength is -1\.0; expected a positive"),
        (partial(held, weight=0.0), r"weight is 0\.0; expected a positive"),
        (partial(advantage_weighted, weighting=partial(huber, eps=0.0)), r"power and eps are 0\.5 and 0\.0"),
    ],
)
def test_options_that_make_no_loss_are_refused(objective: Objective, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(example(), one(1.0))


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target has shape \(1, 1, 1\)"):
        nft(replace(example(), target=torch.zeros(1, 1, 1, dtype=F64)), one(1.0))
