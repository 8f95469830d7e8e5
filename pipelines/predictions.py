"""What a denoiser's output means: the predicted data and noise are affine in (sample, output).

Each function takes the level of the sample, x = alpha data + sigma noise, and returns the weights. F is the output.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.transitions import Level

Weights = tuple[Tensor, Tensor]  # of the sample and of the model's output


class Prediction(NamedTuple):
    """data = clean[0] x + clean[1] F and noise = noise[0] x + noise[1] F; weights () or broadcasting with the sample."""

    name: str
    clean: Weights
    noise: Weights


def velocity(level: Level) -> Prediction:
    """F = noise - data on the straight path, alpha + sigma = 1 (flow matching; Lipman et al. 2023, equation 23)."""
    one = torch.ones_like(level.sigma)
    return Prediction("velocity", (one, -level.sigma), (one, level.alpha))


def negative_velocity(level: Level) -> Prediction:
    """F = data - noise on the straight path: inverted time, or a pipeline that turned the sign."""
    one = torch.ones_like(level.sigma)
    return Prediction("negative_velocity", (one, level.sigma), (one, -level.alpha))


def epsilon(level: Level) -> Prediction:
    """F = noise (DDPM, equation 11). Raises ValueError at a level without signal, where it does not tell the data."""
    if level.alpha == 0:
        raise ValueError("prediction_type 'epsilon' says nothing about the data at alpha 0 (rescale_betas_zero_snr)")
    zero, one = torch.zeros_like(level.sigma), torch.ones_like(level.sigma)
    return Prediction("epsilon", (1 / level.alpha, -level.sigma / level.alpha), (zero, one))


def v_prediction(level: Level) -> Prediction:
    """F = (alpha noise - sigma data) / n, n^2 = alpha^2 + sigma^2 (Salimans and Ho 2022, appendix D, in any units)."""
    square = level.alpha**2 + level.sigma**2
    a, s = level.alpha / square.sqrt(), level.sigma / square.sqrt()
    return Prediction("v_prediction", (level.alpha / square, -s), (level.sigma / square, a))


def data(level: Level) -> Prediction:
    """F = data; at sigma 0 there is no noise to predict, and the weights are 0."""
    zero, one = torch.zeros_like(level.sigma), torch.ones_like(level.sigma)
    return _given_clean("sample", level, (zero, one))


def edm(level: Level, sigma_data: float, sign: float) -> Prediction:
    """data = c_skip x + sign c_out F at alpha 1 (Karras et al. 2022, table 1); sign -1 is EDM's v_prediction."""
    square = level.sigma**2 + sigma_data**2
    out = sign * sigma_data / square.sqrt()
    return Prediction("edm", (sigma_data**2 / square, out * level.sigma), (level.sigma / square, -out))


def consistency(level: Level, sigma_data: float, sigma_min: float) -> Prediction:
    """EDM's form that is the identity at sigma_min (Song et al. 2023, appendix C)."""
    above = level.sigma - sigma_min
    skip = sigma_data**2 / (above**2 + sigma_data**2)
    out = above * sigma_data / (level.sigma**2 + sigma_data**2).sqrt()
    return _given_clean("consistency", level, (skip, out))


def boundary(inner: Prediction, level: Level, skip: float, out: float) -> Prediction:
    """data = skip x + out (data of `inner`): the boundary condition of LCM (Luo et al. 2023, equation 9)."""
    return _given_clean(f"boundary {inner.name}", level, (skip + out * inner.clean[0], out * inner.clean[1]))


def trigflow(angle: Tensor, sigma_data: float) -> Prediction:
    """F = cos z - sin data, x = cos data + sin z, z of std sigma_data (Lu and Song 2024, section 4); angle in radians."""
    cos, sin = angle.cos(), angle.sin()
    return Prediction("trigflow", (cos, -sin), (sin / sigma_data, cos / sigma_data))


NAMES: dict[str, Callable[[Level], Prediction]] = {
    "epsilon": epsilon,
    "sample": data,
    "original_sample": data,
    "v_prediction": v_prediction,
    "flow_prediction": velocity,
}


def named(name: str, level: Level) -> Prediction:
    """The prediction that a scheduler's `prediction_type` names; ValueError if the name is unknown."""
    if name not in NAMES:
        raise ValueError(f"prediction_type {name!r} is unknown: expected one of {sorted(NAMES)}")
    return NAMES[name](level)


def _given_clean(name: str, level: Level, clean: Weights) -> Prediction:
    """noise = (x - alpha data) / sigma."""
    inverse = torch.where(level.sigma > 0, 1 / level.sigma, 0)
    return Prediction(name, clean, ((1 - level.alpha * clean[0]) * inverse, -level.alpha * clean[1] * inverse))
