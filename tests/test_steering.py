"""Guided steps against the method's worked numbers, and what they must leave alone."""

import math

import pytest
import torch

from mmgrpo.steering import Strength, absorbed, estimated, shift, size, steered
from mmgrpo.transitions import Gaussian, Level, Step, dance_sde, flow_sde, from_velocity, log_density, ode

X, V, Z, GRADIENT = (torch.tensor([values]) for values in ([1.0, -0.5], [0.5, 0.2], [0.3, -1.0], [2.0, -1.0]))
DT = torch.tensor(0.2)


def step(t: float = 0.8, t_next: float = 0.6) -> Step:
    now, following, second = (Level(1 - torch.tensor(level), torch.tensor(level)) for level in (t, t_next, 0.8))
    return Step(X, *from_velocity(X, V, now), now, following, second)


def test_the_guided_step_and_both_its_densities_are_those_of_the_worked_example():
    plain = dance_sde(step(), eta=0.25)
    guided = steered(plain, DT, GRADIENT, Strength(beta=3.125))
    drawn = guided.mean + guided.std * Z
    assert plain.mean[0].tolist() == pytest.approx([0.891406, -0.536406], abs=1e-6)
    assert guided.mean[0].tolist() == pytest.approx([0.895406, -0.538406], abs=1e-6)
    assert float(guided.std) == pytest.approx(0.111803, abs=1e-6)
    assert drawn[0].tolist() == pytest.approx([0.928947, -0.650210], abs=1e-6)
    assert float(log_density(drawn, plain).mean()) == pytest.approx(0.984864, abs=1e-5)
    assert float(log_density(drawn, guided).mean()) == pytest.approx(0.999575, abs=1e-5)


def test_the_velocity_that_needs_no_guide_is_that_of_the_worked_example():
    moved = shift(dance_sde(step(), eta=0.25).std, DT, GRADIENT, Strength(beta=3.125))
    target = absorbed(V, moved, -DT)
    assert target[0].tolist() == pytest.approx([0.48, 0.21], abs=1e-6)
    assert torch.allclose(X - DT * target, ode(step()).mean + 0.01 * DT * GRADIENT)


@pytest.mark.parametrize("sampler", [dance_sde, flow_sde], ids=lambda sampler: sampler.__name__)
def test_a_temperature_is_the_kappa_of_the_samplers_own_diffusion(sampler):
    plain = sampler(step())
    g = 0.3 if sampler is dance_sde else 0.7 * math.sqrt(0.8 / 0.2)
    by_beta = steered(plain, DT, GRADIENT, Strength(beta=50.0))
    by_kappa = steered(plain, DT, GRADIENT, Strength(kappa=g**2 / 100))
    assert torch.allclose(by_beta.mean, by_kappa.mean)
    assert torch.allclose(by_kappa.mean - plain.mean, g**2 / 100 * 0.2 * GRADIENT, atol=1e-6)


@pytest.mark.parametrize(
    "gradient, strength", [(0 * GRADIENT, Strength(beta=3.125)), (GRADIENT, Strength(beta=math.inf))]
)
@pytest.mark.parametrize("sampler", [dance_sde, flow_sde], ids=lambda sampler: sampler.__name__)
def test_without_a_gradient_or_at_an_infinite_temperature_nothing_changes(sampler, gradient, strength):
    plain = sampler(step())
    assert torch.equal(steered(plain, DT, gradient, strength).mean, plain.mean)


@pytest.mark.parametrize("strength", [Strength(beta=1.0), Strength(kappa=1.0), Strength(beta=1.0, by_length=False)])
def test_what_has_no_noise_is_not_moved(strength):
    last = dance_sde(step(0.2, 0.0))
    assert torch.equal(steered(last, DT, GRADIENT, strength).mean, last.mean)
    frozen = Gaussian(X, torch.tensor([[0.0, 0.1]]))
    assert (steered(frozen, DT, GRADIENT, strength).mean != X).tolist() == [[False, True]]


def test_length_and_norm_of_the_gradient_are_options():
    std = torch.tensor(0.111803)
    assert torch.allclose(shift(std, DT, GRADIENT, Strength(kappa=0.01, by_length=False)), 0.01 * GRADIENT)
    assert torch.allclose(shift(std, DT, GRADIENT, Strength(beta=3.125, by_length=False)), 0.01 * GRADIENT, atol=1e-5)
    unit = shift(std, DT, GRADIENT, Strength(kappa=0.01, by_length=False, normalised=True))
    assert torch.allclose(unit, 0.01 * GRADIENT / 5**0.5)


def test_a_shift_of_many_stds_is_shortened_and_its_size_told():
    std = torch.tensor(0.1)
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    free = shift(std, DT, gradients, Strength(kappa=1.0, most=math.inf))
    assert size(free, std).tolist() == pytest.approx([5 * 2 / 2**0.5, 0.5 * 2 / 2**0.5])
    bounded = shift(std, DT, gradients, Strength(kappa=1.0))
    assert size(bounded, std).tolist() == pytest.approx([1.0, 0.5 * 2 / 2**0.5])
    assert torch.equal(bounded[1], free[1])


def test_an_estimate_without_derivatives_has_the_gradient_as_its_mean():
    target = torch.tensor([[1.0, -2.0, 0.5]])

    def value(x: torch.Tensor) -> torch.Tensor:
        return (x * target).sum(1) - x.square().sum(1) / 2

    x = torch.tensor([[0.2, 0.1, -0.3]])
    directions = torch.randn(20_000, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = estimated(value, x, directions[:1])
    assert torch.allclose(one, directions[0] * (directions[0] * (target - x)).sum())
    assert torch.allclose(estimated(value, x.double(), directions), (target - x).double(), atol=0.08)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "beta is None and kappa is None; expected one of them"),
        ({"beta": 1.0, "kappa": 1.0}, "beta is 1.0 and kappa is 1.0; expected one of them"),
        ({"beta": 0.0}, "beta is 0.0; expected a number above 0"),
        ({"kappa": -1.0}, "kappa is -1.0; expected a finite number from 0"),
        ({"kappa": 1.0, "most": 0.0}, "most is 0.0; expected a number above 0"),
    ],
)
def test_a_strength_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Strength(**options)


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="gradient has 1 elements that are not finite"):
        shift(torch.tensor(0.1), DT, torch.tensor([[1.0, math.nan]]), Strength(beta=1.0))
