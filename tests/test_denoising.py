"""Flow-DPPO's bound and TempFlow's weights: the worked examples, steps of real Gaussians, and what must hold."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_gates import close, numbers, single
from torch import Tensor

from mmgrpo.components import build
from mmgrpo.denoising import divergence_bound, noise_weighted
from mmgrpo.objectives import Objective, clipped, guarded
from mmgrpo.ratios import masked
from mmgrpo.transitions import Gaussian, flow_sde_diffusion, kl, log_ratio
from mmgrpo.types import Evaluation

F64 = torch.float64
STD = (
    0.7 * numbers(1, 0.75, 0.25, 1 / 12).sqrt()
)  # a = 0.7, four uniform steps: a sqrt(t / (1 - t)) sqrt(D), t_1 for t = 1


def steps(ratio: Tensor, drift: Tensor, std: Tensor | None = None) -> Evaluation:
    """One sample's steps."""
    return single(ratio.log(), drift=drift, step_std=torch.ones_like(drift) if std is None else std)


def slope(objective: Objective, log_ratio: Tensor, advantages: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
    leaf = log_ratio.clone().requires_grad_()
    loss = objective(Evaluation(leaf, drift=drift, step_std=torch.ones_like(drift)), advantages)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


# ---- Flow-DPPO


def test_the_bound_equals_the_worked_example() -> None:
    here = steps(numbers(1.02, 1.02, 0.98, 0.98, 1.02), numbers(2e-5, 2e-5, 2e-5, 2e-5, 5e-6))
    close(divergence_bound(here, numbers(1, -1, -1, 1, 1)[None]), 0, 1.02, 0, -0.98, -1.02, tolerance=1e-12)


def test_the_limit_itself_drops_and_the_variance_is_left_out_on_request() -> None:
    ratio, ones, drift = numbers(1.1, 1.1), numbers(1, 1)[None], numbers(1e-5, 9.9e-6)
    close(divergence_bound(steps(ratio, drift), ones), 0, -1.1)
    wide = steps(ratio, numbers(3e-5, 3e-6), numbers(0.5, 2.0))  # drift * std^2 is 7.5e-6 and 1.2e-5
    close(divergence_bound(wide, ones), 0, -1.1)
    close(divergence_bound(wide, ones, by_variance=False), -1.1, 0)


def test_the_divergence_is_that_of_the_means_of_a_real_step_and_the_bias_that_guard_takes_out() -> None:
    std, old = torch.tensor(0.626099, dtype=F64), torch.tensor([[0.6305, -0.4273]], dtype=F64)
    new = Gaussian(torch.tensor([[0.62552, -0.42481]], dtype=F64), std)
    state = old + std * torch.tensor([[0.3, -1.0]], dtype=F64)
    drift = kl(new, Gaussian(old, std), "mean").unsqueeze(1)
    close(drift, 1.977073e-05, tolerance=1e-11)
    ratio = log_ratio(state, new, Gaussian(old, std), "mean").unsqueeze(1)
    close(ratio, -0.00320138, tolerance=1e-8)
    here = Evaluation(ratio, drift=drift, step_std=std.view(1, 1), dt=torch.full((1, 1), 0.2, dtype=F64))
    close(
        divergence_bound(here, numbers(0.528243)[None]), -0.52655450, tolerance=1e-6
    )  # to the ratio's other side: kept
    close(divergence_bound(here, numbers(-0.528243)[None]), 0)
    moved = (here.log_ratio + drift) * std  # -mean(dmu z), as GRPO-Guard has it
    close(guarded(here, numbers(1.0)[None], low=1, high=1, scale_by_dt=False), -float(moved.exp()), tolerance=1e-12)


def test_without_a_limit_it_is_the_policy_gradient_that_is_not_clipped() -> None:
    ratios = 0.5 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    advantages = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    loss, found = slope(partial(divergence_bound, limit=math.inf), ratios, advantages, ratios.square())
    torch.testing.assert_close(loss, -advantages * ratios.exp())
    torch.testing.assert_close(found, loss)  # of exp(log ratio) by log ratio
    tight, kept = slope(partial(divergence_bound, limit=1e-300), ratios, advantages, ratios.square())
    back = ratios * advantages < 0
    torch.testing.assert_close(kept[back], found[back])  # steps that come back are always pulled on
    assert back.any() and (~back).any() and (kept[~back] == 0).all() and (tight[~back] == 0).all()


def test_a_dropped_ratio_that_overflows_leaves_no_trace() -> None:
    loss, found = slope(divergence_bound, numbers(1e4, 0.0)[None], numbers(1, 1)[None], numbers(1, 0)[None])
    close(loss, 0, -1)
    close(found, 0, -1)


def test_a_limit_that_drops_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="limit is 0; expected a positive divergence"):
        divergence_bound(steps(numbers(1), numbers(0)), numbers(1)[None], limit=0)


# ---- TempFlow


def test_the_weights_equal_the_worked_example() -> None:
    close(STD, 0.7, 0.606218, 0.35, 0.202073)
    here = single(numbers(0, 0, 0, 0), step_std=STD)
    found = -noise_weighted()(here, torch.ones(1, 4, dtype=F64))
    close(found, 1.506761, 1.304894, 0.753381, 0.434965)
    close(found.mean(), 1)
    by_schedule = noise_weighted(scale=float(1 / STD.mean()))
    close(by_schedule(here, -torch.ones(1, 4, dtype=F64)), 1.506761, 1.304894, 0.753381, 0.434965)


def test_steps_of_a_window_keep_their_place_in_the_schedule_under_a_given_scale() -> None:
    window = torch.tensor([[False, True, True, False]])
    full, ones = single(numbers(0, 0, 0, 0), step_std=STD), -torch.ones(1, 4, dtype=F64)
    here = masked(full, window)
    close(noise_weighted(scale=float(1 / STD.mean()))(here, ones)[window], 1.304894, 0.753381)
    own = STD[1:3] / STD[1:3].mean()
    close(noise_weighted()(here, ones)[window], *own.tolist())
    close(noise_weighted()(replace(full, mask=window), ones)[window], *own.tolist())


def test_the_scale_of_ten_shifted_steps_is_one_over_the_mean_of_the_schedule_and_branches_need_it() -> None:
    even = torch.linspace(1, 0, 11, dtype=F64)
    sigma = 3 * even / (1 + 2 * even)
    std = flow_sde_diffusion(sigma[:-1], sigma[1], 0.7) * (-sigma.diff()).sqrt()
    close(1 / std.mean(), 2.371, tolerance=1e-4)
    branches = torch.eye(10, dtype=torch.bool)  # every sample has one trained step
    here = masked(Evaluation(torch.zeros(10, 10, dtype=F64), step_std=std.expand(10, 10)), branches)
    minus = -torch.ones(10, 10, dtype=F64)
    torch.testing.assert_close(noise_weighted(scale=2.371)(here, minus)[branches], std / std.mean(), rtol=1e-4, atol=0)
    assert (noise_weighted()(here, minus)[branches] == 1).all()


def test_equal_noise_weighs_nothing_and_only_the_size_of_the_loss_is_weighed() -> None:
    ratios = 0.3 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    flat = Evaluation(ratios, step_std=torch.full((3, 4), 0.3, dtype=F64))
    torch.testing.assert_close(noise_weighted()(flat, advantages), clipped(flat, advantages))
    steep = Evaluation(ratios, step_std=STD.expand(3, 4))
    weights = noise_weighted()(steep, advantages) / clipped(steep, advantages)
    torch.testing.assert_close(weights, (STD / STD.mean()).expand(3, 4))
    again = Evaluation(ratios, step_std=7 * STD.expand(3, 4))
    torch.testing.assert_close(noise_weighted()(again, advantages), noise_weighted()(steep, advantages))


def test_tokens_beside_steps_and_samples_without_steps_weigh_nothing() -> None:
    std = torch.tensor([[0.2, 0.0, 0.6], [0.0, 0.0, 0.0]], dtype=F64)
    here = Evaluation(torch.zeros(2, 3, dtype=F64), step_std=std)
    close(noise_weighted()(here, -torch.ones(2, 3, dtype=F64)), 0.5, 0, 1.5, 0, 0, 0)


def test_a_recipe_names_what_is_weighed_and_a_scale_that_is_none_is_refused() -> None:
    inner = {"build": "mmgrpo.denoising:divergence_bound", "limit": 1e-3}
    weighted = build({"build": "mmgrpo.denoising:noise_weighted", "objective": inner, "scale": 2.25}, "objective")
    here = steps(numbers(1.02, 0.98), numbers(2e-3, 2e-3), numbers(0.4, 0.8))
    close(weighted(here, numbers(1, 1)[None]), 0, -0.98 * 2.25 * 0.8)
    with pytest.raises(ValueError, match=r"scale is 0\.0; expected a positive factor"):
        noise_weighted(scale=0.0)
