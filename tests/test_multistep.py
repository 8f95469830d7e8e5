"""The second-order step against exact solutions on Gaussian data, its order, and diffusers' own solver."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from mmgrpo.multistep import Before, dpm_solver_2m
from mmgrpo.transitions import Gaussian, Level, Step, from_clean, ode

F64 = torch.float64
MEAN, VARIANCE = 0.3, 0.25
Path = Callable[[Tensor], Level]


def flow(t: Tensor) -> Level:
    return Level(1 - t, t)


def preserving(t: Tensor) -> Level:
    return Level((t * math.pi / 2).cos(), (t * math.pi / 2).sin())


def exploding(t: Tensor) -> Level:
    return Level(torch.ones_like(t), 5 * t)


PATHS = pytest.mark.parametrize("path", [flow, preserving, exploding])


def spread(level: Level) -> Tensor:
    return (level.alpha.square() * VARIANCE + level.sigma.square()).sqrt()


def clean_of(x: Tensor, level: Level) -> Tensor:
    """E[data | x] of data N(MEAN, VARIANCE)."""
    return MEAN + level.alpha * VARIANCE / spread(level).square() * (x - level.alpha * MEAN)


def solved(x: Tensor, levels: list[Level], second_order: bool) -> Tensor:
    before = None
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        clean = clean_of(x, now)
        step = Step(x, clean, from_clean(x, clean, now).noise, now, following, levels[1])
        x = (dpm_solver_2m(step, before) if second_order else ode(step)).mean
        before = Before(clean, now)
    return x


def error(path: Path, steps: int, second_order: bool) -> float:
    """Of the solution from t = 0.9 to 0.1, against the exact one: the distance to the mean keeps its share of the spread."""
    levels = [path(t) for t in torch.linspace(0.9, 0.1, steps + 1, dtype=F64)]
    start = torch.tensor([[1.7]], dtype=F64)
    first, last = levels[0], levels[-1]
    exact = last.alpha * MEAN + spread(last) / spread(first) * (start - first.alpha * MEAN)
    return float((solved(start, levels, second_order) - exact).abs())


@PATHS
def test_the_order_is_two_where_the_plain_step_has_one(path: Path) -> None:
    for second_order, order in ((False, 1.0), (True, 2.0)):
        errors = [error(path, steps, second_order) for steps in (160, 320, 640)]
        found = [math.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
        assert found == pytest.approx([order] * 2, abs=0.15), errors
    assert error(path, 20, True) < 0.5 * error(path, 20, False)


@pytest.mark.parametrize("path", [flow, preserving])
def test_from_pure_noise_to_data_it_arrives_nearer_than_the_plain_step(path: Path) -> None:
    levels = [path(t) for t in torch.linspace(1, 0, 11, dtype=F64)]
    start = torch.tensor([[1.2]], dtype=F64)
    exact = MEAN + math.sqrt(VARIANCE) / spread(levels[0]) * (start - levels[0].alpha * MEAN)
    assert (solved(start, levels, True) - exact).abs() < 0.5 * (solved(start, levels, False) - exact).abs()


def test_it_agrees_with_diffusers() -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(6)
    scheduler.sigmas = scheduler.sigmas.double()
    levels = [flow(sigma) for sigma in scheduler.sigmas]
    assert len(levels) == 7 and levels[-1].sigma == 0
    theirs = ours = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    seen: list[Tensor] = []
    before = None
    for number in range(6):
        now, following = levels[number : number + 2]
        velocity = torch.sin(3 * theirs) + now.sigma  # any function of the state
        clean = ours - now.sigma * velocity
        step = Step(ours, clean, ours + now.alpha * velocity, now, following, levels[1])
        ours, before = dpm_solver_2m(step, before).mean, Before(clean, now)
        scheduler._step_index = number  # its updates, as `step` rounds the sample to float32
        seen.append(scheduler.convert_model_output(velocity, sample=theirs))
        if number in (0, 5):
            theirs = scheduler.dpm_solver_first_order_update(seen[-1], sample=theirs)
        else:
            theirs = scheduler.multistep_dpm_solver_second_order_update(seen[-2:], sample=theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def drawn() -> tuple[Step, Before]:
    generator = torch.Generator().manual_seed(1)
    x, clean, past = torch.randn(3, 2, 4, generator=generator, dtype=F64)
    now, following = flow(torch.tensor(0.6, dtype=F64)), flow(torch.tensor(0.4, dtype=F64))
    step = Step(x, clean, from_clean(x, clean, now).noise, now, following, following)
    return step, Before(past, flow(torch.tensor(0.75, dtype=F64)))


def test_the_first_step_is_the_plain_one_and_the_last_the_predicted_data() -> None:
    step, before = drawn()
    torch.testing.assert_close(dpm_solver_2m(step), ode(step))
    last = step._replace(next=flow(torch.tensor(0.0, dtype=F64)))
    torch.testing.assert_close(dpm_solver_2m(last, before), Gaussian(step.clean, torch.tensor(0.0, dtype=F64)))
    from_noise = before._replace(level=flow(torch.tensor(1.0, dtype=F64)))
    torch.testing.assert_close(dpm_solver_2m(step, from_noise), ode(step))


def test_one_step_by_hand() -> None:
    step, before = drawn()
    lambdas = [math.log((1 - t) / t) for t in (0.75, 0.6, 0.4)]
    r = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    data = (1 + 1 / (2 * r)) * step.clean - 1 / (2 * r) * before.clean
    expected = 0.4 / 0.6 * step.x - 0.6 * math.expm1(lambdas[1] - lambdas[2]) * data
    torch.testing.assert_close(dpm_solver_2m(step, before).mean, expected)


def test_an_element_whose_level_stays_keeps_its_value_and_its_dtype() -> None:
    step, before = drawn()
    sigma = torch.tensor([0.6, 0.6, 0.4, 0.0], dtype=F64).view(1, 4)
    still = step._replace(x=step.x.float(), clean=step.clean.float(), noise=step.noise.float(), next=flow(sigma))
    found = dpm_solver_2m(still, Before(before.clean.float(), before.level)).mean
    assert found.dtype == torch.float32 and torch.equal(found[:, :2], still.x[:, :2])
    torch.testing.assert_close(found[:, 2], dpm_solver_2m(step, before).mean[:, 2].float())
    assert torch.equal(found[:, 3], still.clean[:, 3])
