"""Samplers against closed forms: single steps worked by hand, Gaussian data whose variance is known at every step, orders."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mmgrpo.transitions import (
    Gaussian,
    Level,
    Prediction,
    Reduction,
    Step,
    cps,
    dance_diffusion,
    dance_sde,
    ddim,
    euler_maruyama,
    flow_sde,
    flow_sde_diffusion,
    from_clean,
    from_noise,
    from_v_prediction,
    from_velocity,
    kl,
    log_density,
    log_ratio,
    ode,
)

F64 = torch.float64
Sampler = Callable[[Step], Gaussian]
SAMPLERS = {
    "ode": ode,
    "flow_sde": flow_sde,
    "flow_sde a=.4": partial(flow_sde, noise=0.4),
    "dance_sde": dance_sde,
    "cps": cps,
    "cps .7": partial(cps, eta=0.7),
    "ddim": ddim,
    "ddim .5": partial(ddim, eta=0.5),
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def numbers(*values: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def close(got: Tensor, *expected: float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got, numbers(*expected).reshape(got.shape), rtol=0, atol=tolerance)


def flow(t: float | Tensor) -> Level:
    t = torch.as_tensor(t, dtype=F64)
    return Level(1 - t, t)


def worked_step(t: float = 0.8, t_next: float = 0.6, second: float = 0.9) -> Step:
    x, v = numbers(1, -0.5)[None], numbers(0.5, 0.2)[None]
    return Step(x, *from_velocity(x, v, flow(t)), flow(t), flow(t_next), flow(second))


def random_step(
    shape: tuple[int, ...] = (3, 4, 5), dtype: torch.dtype = F64, t: float = 0.7, t_next: float = 0.5
) -> Step:
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(shape, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    return Step(x, *from_velocity(x, v, flow(t)), flow(t), flow(t_next), flow(0.9))


# Single steps worked by hand: methods of Flow-GRPO, DanceGRPO, CPS and DDIM on one pair of numbers

Z = numbers(0.3, -1)


def test_the_velocity_gives_data_and_noise() -> None:
    step = worked_step()
    close(step.clean, 0.6, -0.66)
    close(step.noise, 1.1, -0.46)
    close(-step.noise / 0.8, -1.375, 0.575)


@pytest.mark.parametrize(
    ("sampler", "std", "mean", "sample", "density"),
    [
        (flow_sde, 0.626099, (0.6305, -0.4273), (0.81833, -1.053399), -0.723192),
        (dance_sde, 0.134164, (0.887625, -0.534825), (0.927874, -0.668989), 0.817253),
        (partial(cps, eta=0.7), 0.534604, (0.539634, -0.389301), (0.700015, -0.923905), -0.565209),
        (ddim, 0.556215, (0.4875, -0.3675), None, None),
        (ode, 0.0, (0.9, -0.54), (0.9, -0.54), 0.0),
    ],
    ids=["flow_sde", "dance_sde", "cps", "ddim", "ode"],
)
def test_a_step_equals_the_published_one(
    sampler: Sampler,
    std: float,
    mean: tuple[float, ...],
    sample: tuple[float, ...] | None,
    density: float | None,
) -> None:
    gaussian = sampler(worked_step())
    close(gaussian.std, std)
    close(gaussian.mean, *mean)
    if sample is not None and density is not None:
        x = gaussian.mean + gaussian.std * Z
        close(x, *sample)
        close(log_density(x, gaussian).mean(), density)


def test_the_diffusion_coefficient_is_not_the_std_of_the_step() -> None:
    close(flow_sde_diffusion(numbers(0.8), numbers(0.9), 0.7), 1.4)
    close(dance_diffusion(numbers(0.8), 0.3), 0.3)


def test_the_first_flow_sde_step_takes_its_coefficient_at_the_second_level() -> None:
    gaussian = flow_sde(worked_step(1.0, 0.9, 0.9))
    close(flow_sde_diffusion(numbers(1.0), numbers(0.9), 0.7), 2.213594)
    close(gaussian.std, 0.7)
    close(gaussian.mean, 0.705, -0.3975)


@pytest.mark.parametrize("second", [0.5, 0.9, 0.99, 0.999])
def test_the_first_flow_sde_step_has_std_equal_to_its_noise_option_on_every_schedule(second: float) -> None:
    close(flow_sde(worked_step(1.0, second, second)).std, 0.7)


def test_a_first_level_that_is_one_up_to_rounding_is_treated_as_one() -> None:
    almost = 1 - torch.finfo(torch.float32).eps
    assert flow_sde(worked_step(almost, 0.9, 0.9)).std.item() == pytest.approx(0.7, rel=1e-6)
    assert flow_sde(worked_step(0.999, 0.9, 0.9)).std.item() == pytest.approx(0.7 * math.sqrt(999 * 0.099))


@each_sampler
def test_the_first_step_is_finite_and_has_a_finite_density(sampler: Sampler) -> None:
    gaussian = sampler(worked_step(1.0, 0.9, 0.9))
    assert torch.isfinite(gaussian.mean).all() and torch.isfinite(gaussian.std)
    assert torch.isfinite(log_density(gaussian.mean + gaussian.std * Z, gaussian)).all()


def test_ddim_with_eta_one_forgets_the_sample_at_pure_noise() -> None:
    gaussian = ddim(worked_step(1.0, 0.9, 0.9))
    close(gaussian.std, 0.9)
    close(gaussian.mean, *(0.1 * worked_step(1.0).clean).flatten().tolist())


@pytest.mark.parametrize(
    ("eta", "std", "mean"), [(1.0, 0.414039, (0.991979, -0.495990)), (0.0, 0.0, (1.067641, -0.533820))]
)
def test_ddim_equals_the_ddpo_step(eta: float, std: float, mean: tuple[float, ...]) -> None:
    x, noise = numbers(1, -0.5)[None], numbers(0.4, -0.2)[None]
    now, following = (Level(numbers(ab).sqrt()[0], numbers(1 - ab).sqrt()[0]) for ab in (0.5, 0.7))
    prediction = from_noise(x, noise, now)
    close(prediction.clean, 1.014214, -0.507107)
    gaussian = ddim(Step(x, *prediction, now, following, following), eta=eta)
    close(gaussian.std, std)
    close(gaussian.mean, *mean)
    if eta == 1:
        sample = gaussian.mean + gaussian.std * Z
        close(sample, 1.116191, -0.910029)
        close(log_density(sample, gaussian).mean(), -0.309644)


def test_ddim_on_a_variance_exploding_path_is_the_euler_ancestral_step() -> None:
    x, clean, sigma, following, eta = numbers(2, -1)[None], numbers(0.5, 0.1)[None], 3.0, 1.2, 0.6
    now, then = (Level(torch.ones((), dtype=F64), torch.tensor(value, dtype=F64)) for value in (sigma, following))
    gaussian = ddim(Step(x, *from_clean(x, clean, now), now, then, then), eta=eta)
    up = eta * math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
    down = math.sqrt(following**2 - up**2)
    close(gaussian.std, up)
    close(gaussian.mean, *(x + (x - clean) / sigma * (down - sigma)).flatten().tolist())


def test_ddim_has_the_std_of_the_exact_posterior_on_the_flow_path() -> None:
    t, t_next = 0.8, 0.6
    # x_next = (1 - t') d + t' e' and x = a x_next + sqrt(t^2 - a^2 t'^2) w with a = (1 - t) / (1 - t'): condition on x and d
    a = (1 - t) / (1 - t_next)
    rest = t**2 - a**2 * t_next**2
    posterior = 1 / (1 / t_next**2 + a**2 / rest)
    close(ddim(worked_step(t, t_next)).std, math.sqrt(posterior))


def test_flow_grpo_ratio_and_kl_equal_the_published_ones() -> None:
    old_step = worked_step()
    x, v = old_step.x, numbers(0.52, 0.19)[None]
    old = flow_sde(old_step)
    new = flow_sde(Step(x, *from_velocity(x, v, old_step.now), old_step.now, old_step.next, old_step.second))
    close(new.mean, 0.62552, -0.42481)
    sample = old.mean + old.std * Z
    ratio = log_ratio(sample, new, old)
    close(ratio, -0.00320138, tolerance=1e-8)
    close(ratio.exp(), 0.99680374, tolerance=1e-8)
    close(kl(new, old), 1.977073e-05, tolerance=1e-11)
    close(kl(new, old) * 0.2, 3.954145e-06, tolerance=1e-11)
    velocity_form = 0.1 * (1.4 * 0.2 / 1.6 + 1 / 1.4) ** 2 * (numbers(0.02, -0.01) ** 2).mean()
    close(kl(new, old), velocity_form.item(), tolerance=1e-12)


def test_the_guard_ratio_is_the_linear_part_of_the_log_ratio() -> None:
    old = flow_sde(worked_step())
    new = Gaussian(old.mean + numbers(-0.00498, 0.00249), old.std)
    sample = old.mean + old.std * Z
    guarded = old.std * (log_ratio(sample, new, old) + kl(new, old))
    close(guarded, -1.992e-3, tolerance=1e-9)
    close(guarded, -((old.mean - new.mean) * Z).mean().item(), tolerance=1e-12)


# Gaussian data N(0, s2): every sampler is affine in x, so the variance follows var' = A^2 var + std^2 exactly


def shifted(n: int, shift: float) -> Tensor:
    t = torch.linspace(1, 0, n + 1, dtype=F64)
    return shift * t / (1 + (shift - 1) * t)


def all_steps(x: Tensor, now: Level, following: Level, second: Level, s2: float, mean: float = 0.0) -> Step:
    """Every step of a schedule at once: x (N, K), levels (N,)."""
    alpha, sigma = (value[:, None] for value in now)
    variance = alpha**2 * s2 + sigma**2
    centred = x - alpha * mean
    clean, noise = mean + alpha * s2 / variance * centred, sigma / variance * centred
    return Step(x, clean, noise, Level(alpha, sigma), Level(*(value[:, None] for value in following)), second)


def factors(
    sampler: Sampler, now: Level, following: Level, second: Level, s2: float
) -> tuple[list[float], list[float]]:
    x = numbers(0, 1).expand(len(now.sigma), 2)
    gaussian = sampler(all_steps(x, now, following, second, s2))
    added = gaussian.std.square().expand(len(x), 1)[:, 0]
    return (gaussian.mean[:, 1] - gaussian.mean[:, 0]).tolist(), added.tolist()


def propagated(factor: list[float], added: list[float]) -> float:
    variance = 1.0
    for a, noise in zip(factor, added, strict=True):
        variance = a * a * variance + noise
    return variance


def final_variance(sampler: Sampler, t: Tensor, s2: float = 0.25) -> float:
    return propagated(*factors(sampler, flow(t[:-1]), flow(t[1:]), flow(t[1]), s2))


def noisy_to_the_end(g: Callable[[Step], Tensor]) -> Sampler:
    """The kernel without the rule of the last step."""
    return lambda s: euler_maruyama(s.x, s.noise - s.clean, s.now.sigma, s.next.sigma, g(s))


noisy_flow = noisy_to_the_end(lambda s: flow_sde_diffusion(s.now.sigma, s.second.sigma, 0.7))
noisy_dance = noisy_to_the_end(lambda s: dance_diffusion(s.now.sigma, 0.3))

SCHEDULES = [(10, 1), (50, 1), (10, 3), (50, 3)]
VARIANCES: dict[str, tuple[Sampler, list[tuple[float, float]], float]] = {
    "ode": (ode, [(0.1856, -25.8), (0.2356, -5.8), (0.1367, -45.3), (0.2224, -11.0)], 0.0),
    "flow .7 noisy": (noisy_flow, [(0.2300, -8.0), (0.2485, -0.6), (0.1801, -28.0), (0.2339, -6.5)], 0.1),
    "flow .7": (flow_sde, [(0.2301, -8.0), (0.2485, -0.6), (0.1754, -29.9), (0.2338, -6.5)], 0.1),
    "flow .4": (
        partial(flow_sde, noise=0.4),
        [(0.2052, -17.9), (0.2420, -3.2), (0.1516, -39.4), (0.2278, -8.9)],
        0.3,
    ),
    "dance .3": (dance_sde, [(0.1936, -22.5), (0.2377, -4.9), (0.1424, -43.0), (0.2251, -10.0)], 0.0),
    "dance .3 noisy": (noisy_dance, [(0.1950, -22.0), (0.2378, -4.9), (0.1484, -40.7), (0.2253, -9.9)], 0.0),
    "cps .7": (
        partial(cps, eta=0.7),
        [(0.1371, -45.2), (0.1685, -32.6), (0.1073, -57.1), (0.1575, -37.0)],
        -27.4,
    ),
    "cps .8": (cps, [(0.1238, -50.5), (0.1512, -39.5), (0.0990, -60.4), (0.1413, -43.5)], -34.6),
    "ddim": (ddim, [(0.1494, -40.3), (0.2202, -11.9), (0.1090, -56.4), (0.1954, -21.8)], 0.0),
}


@pytest.mark.parametrize(("sampler", "rows", "limit"), VARIANCES.values(), ids=VARIANCES.keys())
def test_the_final_variance_equals_the_table(sampler: Sampler, rows: list[tuple[float, float]], limit: float) -> None:
    for (n, shift), (variance, percent) in zip(SCHEDULES, rows, strict=True):
        got = final_variance(sampler, shifted(n, shift))
        assert got == pytest.approx(variance, abs=0.5001e-4)
        assert 100 * (got / 0.25 - 1) == pytest.approx(percent, abs=0.0501)
    assert 100 * (final_variance(sampler, shifted(20000, 1)) / 0.25 - 1) == pytest.approx(limit, abs=0.0501)


@pytest.mark.parametrize(
    ("sampler", "percents"),
    [
        (ode, (-22.7, -5.0)),
        (flow_sde, (-6.9, 0.3)),
        (dance_sde, (-21.4, -4.7)),
        (partial(cps, eta=0.7), (-42.0, -31.2)),
        (ddim, (-35.2, -9.3)),
    ],
)
def test_the_final_variance_of_unit_data_equals_the_table(sampler: Sampler, percents: tuple[float, float]) -> None:
    for n, percent in zip((10, 50), percents, strict=True):
        assert 100 * (final_variance(sampler, shifted(n, 1), 1.0) - 1) == pytest.approx(percent, abs=0.0501)


def vp_variance(n: int, offset: int, eta: float) -> float:
    """DDPO on Stable Diffusion's 1000 scaled-linear steps with evenly spaced leading indices."""
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2).cumprod(0)
    index = torch.arange(n).flip(0) * (1000 // n) + offset
    now, following = (Level(ab.sqrt(), (1 - ab).sqrt()) for ab in (kept[index], kept[(index - 1000 // n).clamp(min=0)]))
    return propagated(*factors(partial(ddim, eta=eta), now, following, Level(now.alpha[0], now.sigma[0]), 0.25))


@pytest.mark.parametrize(
    ("offset", "eta", "percents"),
    [(1, 0.0, (-33.9, -8.4)), (1, 1.0, (-47.8, -17.7)), (0, 0.0, (-35.5, -9.1)), (0, 1.0, (-48.1, -18.0))],
)
def test_ddpo_final_variance_equals_the_table(offset: int, eta: float, percents: tuple[float, float]) -> None:
    for n, percent in zip((10, 50), percents, strict=True):
        assert 100 * (vp_variance(n, offset, eta) / 0.25 - 1) == pytest.approx(percent, abs=0.0501)


@pytest.mark.parametrize(("sampler", "variance", "percent"), [(flow_sde, 0.2231, -10.8), (cps, 0.1783, -28.7)])
def test_a_window_of_stochastic_steps_ends_at_the_tabled_variance(
    sampler: Sampler, variance: float, percent: float
) -> None:
    t = shifted(10, 1)
    levels = (flow(t[:-1]), flow(t[1:]), flow(t[1]), 0.25)
    inside, outside = factors(sampler, *levels), factors(ode, *levels)
    mixed = [[(inside if 1 <= i <= 3 else outside)[part][i] for i in range(10)] for part in (0, 1)]
    got = propagated(mixed[0], mixed[1])
    assert got == pytest.approx(variance, abs=0.5001e-4)
    assert 100 * (got / 0.25 - 1) == pytest.approx(percent, abs=0.0501)


@pytest.mark.parametrize("sampler", [ode, dance_sde, ddim], ids=["ode", "dance_sde", "ddim"])
def test_refinement_converges_to_the_true_variance_at_first_order(sampler: Sampler) -> None:
    errors = [abs(final_variance(sampler, shifted(n, 1)) - 0.25) for n in (100, 200, 400, 800)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(0.9 < order < 1.1 for order in orders)


def test_refinement_of_flow_sde_converges_up_to_its_first_step() -> None:
    # The rule at t = 1 leaves a variance of 1 + a^4 / 4 after the first step for any N; later steps forget it slowly.
    errors = [abs(final_variance(flow_sde, shifted(n, 1)) / 0.25 - 1) for n in (500, 5000, 50000)]
    assert errors[2] < errors[1] < 0.005
    factor, added = factors(
        flow_sde, flow(shifted(20000, 1)[:1]), flow(shifted(20000, 1)[1:2]), flow(1 - 1 / 20000), 0.25
    )
    assert propagated(factor, added) == pytest.approx(1 + 0.7**4 / 4, abs=1e-3)


@pytest.mark.parametrize(("eta", "percent"), [(0.5, -14.6), (0.7, -27.3), (0.8, -34.5), (0.9, -42.2)])
@pytest.mark.parametrize("s2", [0.25, 1.0])
def test_refinement_of_cps_converges_to_its_own_limit(eta: float, percent: float, s2: float) -> None:
    limit = (1 + math.cos(eta * math.pi / 2)) / 2
    assert 100 * (limit - 1) == pytest.approx(percent, abs=0.0501)
    got = [final_variance(partial(cps, eta=eta), shifted(n, 1), s2) / s2 for n in (2000, 20000)]
    assert abs(got[1] - limit) < 0.002 and abs(got[1] - limit) < 0.35 * abs(got[0] - limit)


@pytest.mark.parametrize("sampler", [ode, cps, ddim], ids=["ode", "cps", "ddim"])
@pytest.mark.parametrize("n", [10, 50])
def test_point_mass_data_keeps_the_exact_noise_variance_at_every_step(sampler: Sampler, n: int) -> None:
    t = shifted(n, 3)[:-1]
    factor, added = factors(sampler, flow(t[:-1]), flow(t[1:]), flow(t[1]), 0.0)
    for stop in range(1, n):
        assert propagated(factor[:stop], added[:stop]) == pytest.approx(t[stop].item() ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("sampler", "shift", "residual"),
    [(noisy_flow, 1, (0.083, 0.016)), (noisy_flow, 3, (0.228, 0.046)), (noisy_dance, 1, (0.110, 0.105))],
)
def test_a_noisy_last_step_leaves_the_tabled_noise_in_the_output(
    sampler: Sampler, shift: float, residual: tuple[float, float]
) -> None:
    for n, std in zip((10, 50), residual, strict=True):
        assert math.sqrt(final_variance(sampler, shifted(n, shift), 0.0)) == pytest.approx(std, abs=0.00051)


@each_sampler
def test_the_mean_of_the_data_is_transported_exactly(sampler: Sampler) -> None:
    t, mean = shifted(10, 3), 1.7
    x = ((1 - t[:-1]) * mean)[:, None]
    gaussian = sampler(all_steps(x, flow(t[:-1]), flow(t[1:]), flow(t[1]), 0.25, mean))
    torch.testing.assert_close(gaussian.mean, ((1 - t[1:]) * mean)[:, None])


# Limits and orders


@pytest.mark.parametrize(
    "stochastic", [partial(flow_sde, noise=0.0), partial(dance_sde, eta=0.0), partial(cps, eta=0.0)]
)
def test_without_noise_every_sampler_is_the_ode(stochastic: Sampler) -> None:
    step = random_step()
    torch.testing.assert_close(stochastic(step).mean, ode(step).mean)
    assert stochastic(step).std == 0


def test_ode_on_the_flow_path_is_the_euler_step() -> None:
    step = random_step()
    torch.testing.assert_close(ode(step).mean, step.x - 0.2 * (step.noise - step.clean))
    torch.testing.assert_close(ddim(step, eta=0.0).mean, ode(step).mean)


@pytest.mark.parametrize(
    "option",
    [lambda e: partial(flow_sde, noise=e), lambda e: partial(dance_sde, eta=e), lambda e: partial(cps, eta=e)],
    ids=["flow_sde", "dance_sde", "cps"],
)
def test_the_ode_is_approached_quadratically_as_the_noise_vanishes(option: Callable[[float], Sampler]) -> None:
    step = random_step()
    distance = [(option(eta)(step).mean - ode(step).mean).abs().max().item() for eta in (0.02, 0.01)]
    assert distance[0] / distance[1] == pytest.approx(4, rel=0.01)


def end_of_paths(n: int, increments: Tensor) -> Tensor:
    """x at t = 0.1 from x = 1 at t = 1, in n steps along given Brownian paths (K, N), N a multiple of n; -> (K,)."""
    t = torch.linspace(1, 0.1, n + 1, dtype=F64)
    x, g = torch.ones(len(increments), dtype=F64), torch.tensor(0.5, dtype=F64)
    for i, path in enumerate(increments.unflatten(1, (n, -1)).sum(2).T):
        variance = (1 - t[i]) ** 2 * 0.25 + t[i] ** 2
        velocity = (t[i] - (1 - t[i]) * 0.25) / variance * x
        gaussian = euler_maruyama(x, velocity, t[i], t[i + 1], g)
        x = gaussian.mean + gaussian.std * path / (t[i] - t[i + 1]).sqrt()
    return x


def test_the_strong_order_is_one_for_constant_diffusion() -> None:
    generator = torch.Generator().manual_seed(0)
    increments = torch.randn(400, 2048, generator=generator, dtype=F64) * math.sqrt(0.9 / 2048)
    exact = end_of_paths(2048, increments)
    errors = [(end_of_paths(n, increments) - exact).abs().mean().item() for n in (16, 32, 64, 128)]
    assert all(0.9 < math.log2(coarse / fine) < 1.15 for coarse, fine in itertools.pairwise(errors)), errors


def test_rollout_of_gaussian_data_has_the_propagated_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    t, x = shifted(10, 1), torch.randn(100_000, 1, generator=generator, dtype=F64)
    for i in range(10):
        now = flow(t[i : i + 1])
        gaussian = flow_sde(
            all_steps(x.T, now, flow(t[i + 1 : i + 2]), flow(t[1]), 0.25),
        )
        x = (gaussian.mean + gaussian.std * torch.randn(x.T.shape, generator=generator, dtype=F64)).T
    assert x.var().item() == pytest.approx(0.2301, rel=0.02)


# The rules every sampler keeps


@each_sampler
def test_the_last_step_returns_the_predicted_data_without_noise(sampler: Sampler) -> None:
    step = random_step(t_next=0.0)
    gaussian = sampler(step)
    assert torch.equal(gaussian.mean, step.clean) and gaussian.std == 0


@each_sampler
def test_an_element_whose_level_stays_keeps_its_value(sampler: Sampler) -> None:
    step = random_step((2, 3, 4))
    now, following = (numbers(*values).reshape(1, 3, 1) for values in ((0.8, 0.0, 1.0), (0.6, 0.0, 1.0)))
    gaussian = sampler(step._replace(now=flow(now), next=flow(following)))
    assert torch.equal(gaussian.mean[:, 1:], step.x[:, 1:]) and (gaussian.std[:, 1:] == 0).all()
    alone = sampler(step._replace(now=flow(0.8), next=flow(0.6)))
    torch.testing.assert_close(gaussian.mean[:, 0], alone.mean[:, 0])
    torch.testing.assert_close(gaussian.std[0, 0, 0], alone.std)


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_of_each_sample_give_the_bits_of_a_scalar_level(sampler: Sampler, dtype: torch.dtype) -> None:
    step = random_step((4, 3, 2, 2), dtype, 1 / 3, 1 / 7)
    many = [Level(*(value.reshape(1, 1, 1, 1).expand(4, 1, 1, 1) for value in level)) for level in step[3:]]
    one, batched = sampler(step), sampler(Step(*step[:3], *many))
    assert torch.equal(one.mean, batched.mean) and (batched.std == one.std).all()
    assert one.mean.dtype == torch.float32


@each_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_steps_compute_in_at_least_float32(sampler: Sampler, dtype: torch.dtype) -> None:
    step = random_step(dtype=dtype)
    low = step._replace(x=step.x.to(dtype), clean=step.clean.to(dtype), noise=step.noise.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    gaussian = sampler(low)
    assert gaussian.mean.dtype == gaussian.std.dtype == log_ratio(step.x, gaussian, gaussian).dtype == wide
    exact = sampler(step._replace(x=low.x.double(), clean=low.clean.double(), noise=low.noise.double()))
    torch.testing.assert_close(gaussian.mean.double(), exact.mean, rtol=1e-6, atol=1e-6)


@each_sampler
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.9), (1.0, 0.0), (0.3, 0.3), (0.2, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_no_gradient_is_ever_nan(sampler: Sampler, t: float, t_next: float) -> None:
    now, following, second = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (t, t_next, 0.9))
    x, velocity = (part.requires_grad_() for part in random_step()[:2])
    prediction = Step(x, *from_velocity(x, velocity, flow(now)), flow(now), flow(following), flow(second))
    gaussian = sampler(prediction)
    (gaussian.mean.sum() + gaussian.std.sum() + log_density(x.detach() + 1, gaussian).sum()).backward()
    for leaf in (now, following, second, x, velocity):
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()
    assert torch.isfinite(gaussian.mean).all() and torch.isfinite(gaussian.std).all()


def test_gradient_reaches_the_prediction_through_every_sampler() -> None:
    for sampler in SAMPLERS.values():
        x, velocity = (part.clone() for part in random_step((2, 2))[:2])
        assert torch.autograd.gradcheck(
            lambda v, x=x, sampler=sampler: (
                sampler(Step(x, *from_velocity(x, v, flow(0.7)), flow(0.7), flow(0.5), flow(0.9))).mean
            ),
            velocity.requires_grad_(),
        )


@pytest.mark.parametrize("sampler", [flow_sde, dance_sde])
def test_flow_samplers_refuse_other_paths(sampler: Sampler) -> None:
    vp = Level(torch.tensor(0.6), torch.tensor(0.8))
    with pytest.raises(ValueError, match=r"flow path, alpha \+ sigma = 1; got 1.4"):
        sampler(random_step()._replace(now=vp))


def test_mistaken_steps_are_refused() -> None:
    step = random_step()
    with pytest.raises(ValueError, match="rises from 0.5 to 0.7"):
        ode(step._replace(now=step.next, next=step.now))
    with pytest.raises(ValueError, match="clean has shape"):
        ode(step._replace(clean=step.clean[:1]))
    with pytest.raises(ValueError, match="level 'next' has shape"):
        ode(step._replace(next=flow(torch.full((3,), 0.5))))
    with pytest.raises(ValueError, match="cps: eta is 1.5"):
        cps(step, eta=1.5)
    with pytest.raises(ValueError, match="flow_sde: noise is -1"):
        flow_sde(step, noise=-1)


# Conversions


@pytest.mark.parametrize("level", [(0.3, 0.7), (0.6, 0.8), (1.0, 2.5), (0.9, 0.01)])
def test_every_prediction_type_recovers_data_and_noise(level: tuple[float, float]) -> None:
    alpha, sigma = (torch.tensor(value, dtype=F64) for value in level)
    clean, noise = random_step()[:2]
    x, here = alpha * clean + sigma * noise, Level(alpha, sigma)
    size = (alpha**2 + sigma**2).sqrt()
    for prediction in (
        from_noise(x, noise, here),
        from_clean(x, clean, here),
        from_v_prediction(x, (alpha * noise - sigma * clean) / size, here),
    ):
        torch.testing.assert_close(prediction.clean, clean)
        torch.testing.assert_close(prediction.noise, noise)
    if level == (0.3, 0.7):
        torch.testing.assert_close(from_velocity(x, noise - clean, here).clean, clean)
        torch.testing.assert_close(from_velocity(x, noise - clean, here).noise, noise)


def test_v_prediction_on_a_variance_preserving_path_has_no_normaliser() -> None:
    x, v = random_step()[:2]
    prediction = from_v_prediction(x, v, Level(torch.tensor(0.6), torch.tensor(0.8)))
    torch.testing.assert_close(prediction.clean, 0.6 * x - 0.8 * v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction.noise, 0.6 * v + 0.8 * x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convert", [from_velocity, from_noise, from_clean, from_v_prediction])
def test_predictions_in_bfloat16_are_converted_in_float32(convert: Callable[..., Prediction]) -> None:
    x, output = (part.bfloat16() for part in random_step()[:2])
    level = flow(0.3)
    got, exact = convert(x, output, level), convert(x.double(), output.double(), level)
    for value, truth in zip(got, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)


def test_predictions_that_say_nothing_are_refused_or_zero() -> None:
    x, output = random_step()[:2]
    with pytest.raises(ValueError, match="alpha = 0"):
        from_noise(x, output, flow(1.0))
    with pytest.raises(ValueError, match="from_velocity needs a flow path"):
        from_velocity(x, output, Level(torch.tensor(0.6), torch.tensor(0.8)))
    assert (from_clean(x, output, flow(0.0)).noise == 0).all()


# Density, log-ratio, KL


@each_sampler
def test_log_density_is_that_of_a_normal_distribution(sampler: Sampler) -> None:
    gaussian = sampler(random_step())
    x = gaussian.mean + 0.3
    if gaussian.std == 0:
        assert (log_density(x, gaussian) == 0).all()
    else:
        torch.testing.assert_close(log_density(x, gaussian), torch.distributions.Normal(*gaussian).log_prob(x))


def moved(gaussian: Gaussian, by: float = 0.01) -> Gaussian:
    generator = torch.Generator().manual_seed(7)
    return Gaussian(gaussian.mean + by * torch.randn(gaussian.mean.shape, generator=generator, dtype=F64), gaussian.std)


@pytest.mark.parametrize("sampler", [flow_sde, dance_sde, cps, ddim])
def test_log_ratio_and_kl_equal_the_normal_distribution(sampler: Sampler) -> None:
    old = sampler(random_step())
    new, x = moved(old), old.mean + old.std * moved(old, 1.0).mean
    normal = [torch.distributions.Normal(*gaussian) for gaussian in (new, old)]
    difference = (normal[0].log_prob(x) - normal[1].log_prob(x)).flatten(1)
    divergence = torch.distributions.kl_divergence(*normal).flatten(1)
    torch.testing.assert_close(log_ratio(x, new, old), difference.mean(1))
    torch.testing.assert_close(log_ratio(x, new, old, "sum"), difference.sum(1))
    torch.testing.assert_close(kl(new, old), divergence.mean(1))
    torch.testing.assert_close(kl(new, old, "sum"), divergence.sum(1))


def test_log_ratio_of_the_worked_example() -> None:
    x, std = numbers(0.5, -0.5, 0.25, 0)[None], torch.tensor(0.5, dtype=F64)
    new, old = Gaussian(torch.full_like(x, 0.1), std), Gaussian(torch.zeros_like(x), std)
    close((log_density(x, new) - log_density(x, old)), 0.18, -0.22, 0.08, -0.02)
    close(log_ratio(x, new, old, "sum"), 0.02)
    close(log_ratio(x, new, old), 0.005)
    close(log_ratio(x, new, old).exp(), 1.005013)
    close(kl(new, old, "sum"), 0.08)
    close(kl(new, old), 0.02)


def wide(gaussian: Gaussian) -> Gaussian:
    return Gaussian(gaussian.mean.double(), gaussian.std.double())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float32_log_ratio_of_two_million_elements_agrees_with_float64(reduction: Reduction) -> None:
    generator = torch.Generator().manual_seed(0)
    size, std = (1, 16, 32, 64, 64), torch.tensor(0.3)
    mean = torch.randn(size, generator=generator)
    x = mean + std * torch.randn(size, generator=generator)
    new = Gaussian(mean + 2e-4 * torch.randn(size, generator=generator), std)
    old = Gaussian(mean, std)
    got, exact = log_ratio(x, new, old, reduction), log_ratio(x.double(), wide(new), wide(old), reduction)
    assert x.numel() > 2_000_000 and got.dtype == torch.float32
    error = (got.double() - exact).abs().item() * (1 if reduction == "sum" else x.numel())
    assert error < 1e-3, error


def test_reducing_first_would_not_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    size, std = (1, 2_000_000), torch.tensor(0.3)
    mean = torch.randn(size, generator=generator)
    x = mean + std * torch.randn(size, generator=generator)
    new, old = Gaussian(mean + 2e-4 * torch.randn(size, generator=generator), std), Gaussian(mean, std)
    exact = log_ratio(x.double(), wide(new), wide(old), "sum")
    late = log_density(x, new).sum(1) - log_density(x, old).sum(1)
    assert (log_ratio(x, new, old, "sum") - exact).abs() < 0.02 * (late - exact).abs()


def test_the_sum_is_finite_where_its_exponent_is_not_and_the_mean_keeps_the_clip_width() -> None:
    x, std = torch.full((1, 1_000_000), 0.01), torch.tensor(0.1)
    new, old = Gaussian(torch.full_like(x, 0.01), std), Gaussian(torch.zeros_like(x), std)
    close(log_ratio(x, new, old, "sum").double(), 5000, tolerance=0.5)
    close(log_ratio(x, new, old).double(), 0.005, tolerance=1e-7)
    close(log_ratio(x[:, :10], Gaussian(new.mean[:, :10], std), Gaussian(old.mean[:, :10], std)).double(), 0.005)


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_ratio_of_equal_means_is_exactly_zero(sampler: Sampler, dtype: torch.dtype) -> None:
    step = random_step(dtype=dtype)
    x = torch.full_like(step.x, 3.3)
    for reduction in ("mean", "sum"):
        assert (log_ratio(x, sampler(step), sampler(step), reduction) == 0).all()
        assert (kl(sampler(step), sampler(step), reduction) == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_the_log_ratio_is_the_score_of_the_mean(reduction: Reduction) -> None:
    step, std = random_step(), torch.tensor(0.4, dtype=F64)
    mean = step.clean.clone().requires_grad_()
    log_ratio(step.x, Gaussian(mean, std), Gaussian(step.clean, std), reduction).sum().backward()
    score = (step.x - step.clean) / std**2 / (20 if reduction == "mean" else 1)
    torch.testing.assert_close(mean.grad, score)


def test_deterministic_and_invalid_elements_count_nowhere() -> None:
    step = random_step((2, 3, 4))
    std = numbers(0.5, 0.0, 0.5).reshape(1, 3, 1)
    old = Gaussian(step.clean, std)
    new = moved(old)
    valid = torch.tensor([True, True, False]).reshape(1, 3, 1)
    new_kept, old_kept = (Gaussian(gaussian.mean[:, :1], std[:, :1]) for gaussian in (new, old))
    reductions: tuple[Reduction, ...] = ("mean", "sum")
    for reduction in reductions:
        torch.testing.assert_close(
            log_ratio(step.x, new, old, reduction, valid), log_ratio(step.x[:, :1], new_kept, old_kept, reduction)
        )
        torch.testing.assert_close(kl(new, old, reduction, valid), kl(new_kept, old_kept, reduction))
        nowhere = torch.zeros(1, 1, 1, dtype=torch.bool)
        assert (log_ratio(step.x, new, old, reduction, nowhere) == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_elements_that_do_not_count_reaches_neither_value_nor_gradient(garbage: float) -> None:
    step = random_step((2, 3, 4))
    old = Gaussian(step.clean, numbers(0.5, 0.0, 0.5).reshape(1, 3, 1))
    valid = torch.tensor([True, True, False]).reshape(1, 3, 1)
    mean = moved(old).mean.clone()
    mean[:, 1:] = garbage
    x = step.x.clone()
    x[:, 1:] = garbage
    mean.requires_grad_()
    new = Gaussian(mean, old.std)
    total = log_ratio(x, new, old, "mean", valid) + kl(new, old, "mean", valid)
    total.sum().backward()
    assert torch.isfinite(total).all() and mean.grad is not None
    assert torch.isfinite(mean.grad).all() and (mean.grad[:, 1:] == 0).all() and (mean.grad[:, 0] != 0).all()


@pytest.mark.parametrize("widths", [(0.4, 0.4), (0.4, 0.3), (0.2, 0.9)])
def test_two_gaussians_of_any_widths_compare_as_their_densities_do(widths: tuple[float, float]) -> None:
    step = random_step((3, 5))
    new_std = torch.full((3, 5), widths[0], dtype=F64, requires_grad=True)
    new, old = Gaussian(step.noise, new_std), Gaussian(step.clean, numbers(widths[1]).reshape(1, 1))
    theirs = [torch.distributions.Normal(gaussian.mean, gaussian.std.expand(3, 5)) for gaussian in (new, old)]
    expected = (theirs[0].log_prob(step.x) - theirs[1].log_prob(step.x)).sum(1)
    torch.testing.assert_close(log_ratio(step.x, new, old, "sum"), expected)
    torch.testing.assert_close(kl(new, old, "sum"), torch.distributions.kl_divergence(*theirs).sum(1))
    torch.testing.assert_close(
        torch.autograd.grad(log_ratio(step.x, new, old, "sum").sum(), new_std),
        torch.autograd.grad(expected.sum(), new_std),
    )


def test_mistaken_comparisons_are_refused() -> None:
    x, std = torch.zeros(2, 2), torch.tensor(0.5)
    with pytest.raises(ValueError, match="the same random elements"):
        kl(Gaussian(x, std), Gaussian(x, 0 * std))
    with pytest.raises(ValueError, match=r"std has shape \(2,\)"):
        log_ratio(x, Gaussian(x, std.expand(2)), Gaussian(x, std.expand(2)))
    with pytest.raises(ValueError, match="new has shape"):
        log_ratio(x, Gaussian(x[:1], std), Gaussian(x, std))
    with pytest.raises(ValueError, match="reduction is 'total'"):
        log_ratio(x, Gaussian(x, std), Gaussian(x, std), "total")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid has dtype"):
        log_ratio(x, Gaussian(x, std), Gaussian(x, std), valid=torch.ones(2, 2))
