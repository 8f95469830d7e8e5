"""Stochastic denoising steps as Gaussians, and what is measured on them: density, log-ratio, KL.

A noisy sample is x = alpha * data + sigma * noise. On the flow path alpha = 1 - t and sigma = t, with t = 1 noise and t = 0
data; variance-preserving (DDPM) and variance-exploding (alpha = 1) paths are other values of the same pair.
Two names for two things: `g` is the diffusion coefficient, `std` that of the whole step (g sqrt(t - t_next) for an SDE).

Every sampler keeps three rules, written once in `_settled` and `flow_sde_diffusion`:
- the last step (sigma_next = 0) is the deterministic one, so no noise is left in the output and nothing divides by 0;
- an element whose level does not change (a frozen token) keeps its value, std 0;
- Flow-SDE's coefficient at t = 1, infinite in the paper, is taken at the schedule's second level.
Level tensors are scalars, or have as many axes as x with size 1 where they repeat; kept on the CPU, their checks cost nothing.
Axes: B samples, ... any event axes.
"""

import math
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmgrpo.types import same_shape

Reduction = Literal["mean", "sum"]


class Gaussian(NamedTuple):
    """A distribution over the next sample; elements whose std is 0 are deterministic."""

    mean: Tensor  # (B, ...)
    std: Tensor  # scalar, or as many axes as the mean; broadcasts against it


class Level(NamedTuple):
    """How much data and how much noise: x = alpha * data + sigma * noise."""

    alpha: Tensor
    sigma: Tensor


class Step(NamedTuple):
    """What a sampler needs to move a sample from one noise level to the next, lower one."""

    x: Tensor  # (B, ...) the sample
    clean: Tensor  # (B, ...) predicted data, E[data | x]
    noise: Tensor  # (B, ...) predicted noise, E[noise | x]
    now: Level
    next: Level
    second: Level  # of the whole schedule, for the rule at t = 1


class Prediction(NamedTuple):
    """A model's output as data and noise; both (B, ...)."""

    clean: Tensor
    noise: Tensor


def from_velocity(x: Tensor, velocity: Tensor, level: Level) -> Prediction:
    """Flow matching, velocity = noise - data; raises ValueError off the flow path."""
    _require_flow("from_velocity", level)
    x, velocity, level = _working(level, x=x, velocity=velocity)
    return Prediction(x - level.sigma * velocity, x + level.alpha * velocity)


def from_noise(x: Tensor, noise: Tensor, level: Level) -> Prediction:
    """Noise ("epsilon") prediction; raises ValueError where alpha = 0, as pure noise does not tell the data."""
    if (level.alpha == 0).any():
        raise ValueError("from_noise got a level with alpha = 0, where noise does not tell the data; use v-prediction")
    x, noise, level = _working(level, x=x, noise=noise)
    return Prediction((x - level.sigma * noise) * level.alpha.reciprocal(), noise)


def from_v_prediction(x: Tensor, v: Tensor, level: Level) -> Prediction:
    """v = (alpha noise - sigma data) / sqrt(alpha^2 + sigma^2), Salimans & Ho 2022 (arXiv 2202.00512), eq. 12 on any path."""
    x, v, level = _working(level, x=x, v=v)
    power = level.alpha.square() + level.sigma.square()
    along, across = power.reciprocal(), power.rsqrt()
    clean = (level.alpha * along) * x - (level.sigma * across) * v
    return Prediction(clean, (level.sigma * along) * x + (level.alpha * across) * v)


def from_clean(x: Tensor, clean: Tensor, level: Level) -> Prediction:
    """Data ("sample") prediction; the noise is 0 where sigma = 0."""
    x, clean, level = _working(level, x=x, clean=clean)
    return Prediction(clean, (x - level.alpha * clean) * _reciprocal(level.sigma))


def euler_maruyama(x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, g: Tensor) -> Gaussian:
    """One step of the reverse SDE that shares the flow's marginals, dx = [v + g^2 / (2 t) E[noise | x]] dt + g dW.

    Flow-GRPO (arXiv 2505.05470), eq. 8-9, for any g; computes in the dtype it is given.
    """
    same_shape(x=x, velocity=velocity)
    noise = x + (1 - t) * velocity  # E[noise | x]
    drift = velocity + g.square() * _reciprocal(2 * t) * noise
    dt = t_next - t  # negative: from noise (1) to data (0)
    return Gaussian(x + drift * dt, g * _root(-dt))


def flow_sde_diffusion(t: Tensor, t_second: Tensor, noise: float) -> Tensor:
    """g = noise sqrt(t / (1 - t)); at t = 1 (to 1e-5) with the 1 - t of the schedule's second level, as the authors' code."""
    return noise * _root(t * _reciprocal(torch.where(1 - t > 1e-5, 1 - t, 1 - t_second)))


def dance_diffusion(t: Tensor, eta: float) -> Tensor:
    """g = eta at every level."""
    return torch.full_like(t, eta)


# Samplers: (step, *, options) -> Gaussian over the next sample


def flow_sde(step: Step, *, noise: float = 0.7) -> Gaussian:
    """Flow-GRPO's SDE (arXiv 2505.05470); noise >= 0 is the paper's a; deterministic at the last step; flow path only."""
    _require_flow("flow_sde", step.now, step.next)
    _require_range("flow_sde: noise", noise, math.inf)
    step = _ready(step)
    g = flow_sde_diffusion(step.now.sigma, step.second.sigma, noise)
    return _settled(step, euler_maruyama(step.x, step.noise - step.clean, step.now.sigma, step.next.sigma, g))


def dance_sde(step: Step, *, eta: float = 0.3) -> Gaussian:
    """DanceGRPO's SDE (arXiv 2505.07818), constant eta >= 0; deterministic at the last step; flow path only."""
    _require_flow("dance_sde", step.now, step.next)
    _require_range("dance_sde: eta", eta, math.inf)
    step = _ready(step)
    g = dance_diffusion(step.now.sigma, eta)
    return _settled(step, euler_maruyama(step.x, step.noise - step.clean, step.now.sigma, step.next.sigma, g))


def cps(step: Step, *, eta: float = 0.8) -> Gaussian:
    """Coefficients-preserving sampling (arXiv 2509.05952): a share sin(eta pi / 2) of the noise is fresh; eta in [0, 1].

    It does not keep the data's variance: the limit of fine schedules is (1 + cos(eta pi / 2)) / 2 of it.
    Deterministic at the last step.
    """
    _require_range("cps: eta", eta, 1)
    step = _ready(step)
    return _interpolated(step, torch.full_like(step.next.sigma, math.sin(eta * math.pi / 2)))


def ddim(step: Step, *, eta: float = 1.0) -> Gaussian:
    """DDIM (arXiv 2010.02502), eq. 12 and 16, on any path; eta in [0, 1]; deterministic at the last step.

    The posterior of the next sample given this one and the data has std sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2).
    On a variance-preserving path eta = 1 is DDPM, on a variance-exploding one Euler ancestral.
    """
    _require_range("ddim: eta", eta, 1)
    step = _ready(step)
    (alpha, sigma), (alpha_next, sigma_next) = step.now, step.next
    overlap = (alpha * sigma_next) * _reciprocal(alpha_next * sigma)  # correlation of the two levels' noises
    return _interpolated(step, eta * _root((1 - overlap) * (1 + overlap)))


def ode(step: Step) -> Gaussian:
    """The deterministic step, std 0: Euler x - (t - t') v on the flow path, DDIM with eta = 0 on any."""
    step = _ready(step)
    return _interpolated(step, torch.zeros_like(step.next.sigma))


def _interpolated(step: Step, fresh: Tensor) -> Gaussian:
    """Predicted data and noise at the next level, where the share `fresh` (in std) of the noise is drawn anew."""
    kept = step.next.sigma * _root((1 - fresh) * (1 + fresh))
    return _settled(step, Gaussian(step.next.alpha * step.clean + kept * step.noise, step.next.sigma * fresh))


def _settled(step: Step, drawn: Gaussian) -> Gaussian:
    """The last step is deterministic, and an element whose level stays keeps its value."""
    last = step.next.sigma == 0
    stays = (step.next.alpha == step.now.alpha) & (step.next.sigma == step.now.sigma)
    mean = torch.where(stays, step.x, torch.where(last, step.next.alpha * step.clean, drawn.mean))
    return Gaussian(mean, torch.where(stays | last, torch.zeros_like(drawn.std), drawn.std))


# What is measured on a step


def log_density(x: Tensor, gaussian: Gaussian) -> Tensor:
    """Log-density of every element, nats, at least float32; 0 where the std is 0, as there is no density; (B, ...)."""
    x, mean, std, counted = _comparable(x, gaussian.mean, gaussian.std, None)
    scale = _reciprocal(std)
    distance = torch.where(counted, x - mean, 0) * scale
    constant = torch.where(std > 0, std, 1).log() + math.log(2 * math.pi) / 2
    return torch.where(counted, -distance.square() / 2 - constant, 0)


def log_ratio(
    x: Tensor, new: Gaussian, old: Gaussian, reduction: Reduction = "mean", valid: Tensor | None = None
) -> Tensor:
    """log new(x) - log old(x); (B, ...) -> (B,) nats per element ("mean") or in all ("sum").

    Subtracts before it reduces, in at least float32. Deterministic elements and those where `valid` (bool, broadcasts
    against x) is False do not count, not even in the mean; 0 where none counts. Exactly 0 where the two are equal.
    """
    same_shape(x=x, new=new.mean, old=old.mean)
    x, new_mean, std, counted = _comparable(x, new.mean, old.std, valid)
    wider, scale, old_mean = _wider(new, std), _reciprocal(std), old.mean.to(x.dtype)
    new_scale = scale / (1 + wider)
    from_new = torch.where(counted, x - new_mean, 0) * new_scale
    from_old = torch.where(counted, x - old_mean, 0) * scale
    nearer = torch.where(counted, new_mean - old_mean, 0) * scale + from_new * wider  # from_old - from_new
    return _reduced(nearer * (from_old + from_new) / 2 - torch.where(counted, wider.log1p(), 0), counted, reduction)


def kl(new: Gaussian, old: Gaussian, reduction: Reduction = "mean", valid: Tensor | None = None) -> Tensor:
    """KL(new || old), (mean - mean)^2 / (2 std^2) where both have one std; counts and reduces as `log_ratio` does."""
    old_mean, new_mean, std, counted = _comparable(old.mean, new.mean, old.std, valid)
    wider = _wider(new, std)
    moved = torch.where(counted, new_mean - old_mean, 0) * _reciprocal(std)
    spread = torch.where(counted, wider * (2 + wider) / 2 - wider.log1p(), 0)
    return _reduced(moved.square() / 2 + spread, counted, reduction)


def _wider(new: Gaussian, std: Tensor) -> Tensor:
    """By which share the std of `new` exceeds another; raises ValueError if they are 0 at different elements."""
    new_std = new.std.to(std)
    if ((new_std > 0) != (std > 0)).any():
        raise ValueError(f"two Gaussians of std {_shown(new.std)} and {_shown(std)}; expected the same random elements")
    return (new_std - std) * _reciprocal(std)


def _comparable(x: Tensor, mean: Tensor, std: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, mean and std in one dtype of at least float32, and which elements count, in the shape of x."""
    same_shape(x=x, mean=mean)
    _require_axes("std", std, x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    std = std.to(x.device, dtype)
    counted = std > 0
    if valid is not None:
        _require_axes("valid", valid, x)
        if valid.dtype != torch.bool:
            raise ValueError(f"valid has dtype {valid.dtype}; expected torch.bool")
        counted = counted & valid
    return x.to(dtype), mean.to(dtype), std, counted.expand(x.shape)


def _reduced(elements: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    """Sum or mean over the event axes; the elements that do not count are 0 already; (B, ...) -> (B,)."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
    total = elements.flatten(1).sum(1)
    return total if reduction == "sum" else total / counted.flatten(1).sum(1).clamp(min=1)


def _working(level: Level, **tensors: Tensor) -> tuple[Tensor, Tensor, Level]:
    """Two tensors of one shape and their level in one dtype of at least float32, on the tensors' device."""
    same_shape(**tensors)
    first, second = tensors.values()
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype), _fitted("level", level, first, dtype)


def _ready(step: Step) -> Step:
    """The step in one dtype of at least float32; raises ValueError for unequal shapes or a rising noise level."""
    x, clean, noise = step.x, step.clean, step.noise
    same_shape(x=x, clean=clean, noise=noise)
    if (step.next.sigma > step.now.sigma).any():
        raise ValueError(f"the noise level rises from {_shown(step.now.sigma)} to {_shown(step.next.sigma)}")
    dtype = reduce(torch.promote_types, (x.dtype, clean.dtype, noise.dtype), torch.float32)
    named = (("level 'now'", step.now), ("level 'next'", step.next), ("level 'second'", step.second))
    now, following, second = (_fitted(name, level, x, dtype) for name, level in named)
    return Step(x.to(dtype), clean.to(dtype), noise.to(dtype), now, following, second)


def _fitted(name: str, level: Level, x: Tensor, dtype: torch.dtype) -> Level:
    _require_axes(name, level.alpha, x)
    _require_axes(name, level.sigma, x)
    return Level(level.alpha.to(x.device, dtype), level.sigma.to(x.device, dtype))


def _shown(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten()[:4].tolist())


def _require_flow(name: str, *levels: Level) -> None:
    for level in levels:
        total = level.alpha.double() + level.sigma.double()
        if ((total - 1).abs() > 1e-4).any():
            raise ValueError(f"{name} needs a flow path, alpha + sigma = 1; got {_shown(total)}: use ddim, cps or ode")


def _require_range(name: str, value: float, high: float) -> None:
    if not 0 <= value <= high or value == math.inf:
        raise ValueError(f"{name} is {value}; expected a number from 0 to {high}")


def _require_axes(name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuse a tensor that would line up with the wrong axes of x: all its axes are there, or none."""
    fits = all(have in (1, size) for have, size in zip(tensor.shape, x.shape, strict=False))
    if tensor.dim() not in (0, x.dim()) or not fits:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a scalar or one that fits {tuple(x.shape)}")


def _root(value: Tensor) -> Tensor:
    """Square root, 0 where the value is not positive, with gradient 0 there instead of an infinite one."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


def _reciprocal(value: Tensor) -> Tensor:
    """1 / value, 0 where the value is 0, with gradient 0 there."""
    return torch.where(value == 0, 0, torch.where(value == 0, 1, value).reciprocal())
