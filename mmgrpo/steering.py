"""Steps steered towards what a model of the reward values in noisy samples: Euphonium's guided SDE (arXiv 2602.04928).

dx = [v - g^2 / 2 (score + grad R / beta)] dt + g dW, of which a sampler of `mmgrpo.transitions` is the unguided part. A steered
step draws around another mean; its density stays that of the unguided step, in the rollout as in every replay, so that training
pulls the unguided mean towards what the guide found.
Axes: B samples, ... any event axes, K directions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgrpo.transitions import Gaussian
from mmgrpo.types import require_shape, same_shape


@dataclass(frozen=True)
class Strength:
    """How far a gradient moves a mean: kappa D grad, D the length of the step in noise level."""

    beta: float | None = None  # temperature: kappa = g^2 / (2 beta), so that kappa D = std^2 / (2 beta)
    kappa: float | None = None  # given directly, in its place
    by_length: bool = True  # without it, kappa grad
    normalised: bool = False  # each sample's gradient divided by its L2 norm + 1e-8
    most: float = (
        1.0  # of the shift's size in stds of the step, beyond which it is shortened; ours, inf in the authors' code
    )

    def __post_init__(self) -> None:
        if (self.beta is None) == (self.kappa is None):
            raise ValueError(f"beta is {self.beta} and kappa is {self.kappa}; expected one of them")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; expected a number above 0, inf for no guidance")
        if self.kappa is not None and not 0 <= self.kappa < math.inf:
            raise ValueError(f"kappa is {self.kappa}; expected a finite number from 0")
        if not self.most > 0:
            raise ValueError(f"most is {self.most}; expected a number above 0, inf for no bound")


def shift(std: Tensor, dt: Tensor, gradient: Tensor, strength: Strength) -> Tensor:
    """What a gradient (B, ...) adds to the mean of a step; 0 in elements without noise, exactly 0 for a gradient of 0.

    std: that of the whole step, broadcasts against the gradient; dt: () positive length of the step in noise level.
    Raises ValueError for a gradient that is not finite.
    """
    if not gradient.isfinite().all():
        raise ValueError(f"the guide's gradient has {int((~gradient.isfinite()).sum())} elements that are not finite")
    if strength.normalised:
        gradient = gradient / (rowwise(gradient.flatten(1).norm(dim=1), gradient) + 1e-8)
    dt = dt.to(gradient)
    if strength.beta is None:
        assert strength.kappa is not None
        factor = strength.kappa * (dt if strength.by_length else torch.ones_like(dt))
    else:
        factor = std.square() / (2 * strength.beta) / (1 if strength.by_length else dt)
    moved = torch.where(std > 0, factor * gradient, 0)
    return moved * rowwise((strength.most / size(moved, std)).clamp(max=1), moved)


def size(moved: Tensor, std: Tensor) -> Tensor:
    """Root mean square of a shift (B, ...) over that of the noise, which is what decides how far off the density is; (B,)."""
    noise = std.expand_as(moved).flatten(1).norm(dim=1)
    return moved.flatten(1).norm(dim=1) / noise.clamp(min=torch.finfo(moved.dtype).tiny)


def steered(gaussian: Gaussian, dt: Tensor, gradient: Tensor, strength: Strength) -> Gaussian:
    """The step as it is drawn, mu_g = mu + kappa D grad."""
    same_shape(mean=gaussian.mean, gradient=gradient)
    return Gaussian(gaussian.mean + shift(gaussian.std, dt, gradient, strength), gaussian.std)


def absorbed(output: Tensor, moved: Tensor, slope: Tensor) -> Tensor:
    """The model output whose plain, deterministic step goes as far as the guided one; (B, ...).

    slope: of the plain step's mean in the output, broadcasts; -D for a velocity, which gives v - kappa grad, the target of
    Euphonium's distillation as a public note has it. moved: the shift kappa D grad, 0 where the slope is.
    """
    same_shape(output=output, moved=moved)
    slope = slope.to(moved)
    return torch.where(slope == 0, output, output + moved / torch.where(slope == 0, 1, slope))


def estimated(value: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, width: float = 0.01) -> Tensor:
    """Mean over K directions u of u [value(x + s u) - value(x - s u)] / (2 s), a gradient without derivatives; (B, ...).

    value: (B, ...) -> (B,); directions (K, B, ...) standard normal; width: s in the units of x.
    """
    require_shape("directions", directions, None, *x.shape)
    slopes = [rowwise(value(x + width * u) - value(x - width * u), x) / (2 * width) for u in directions]
    return torch.stack([slope * u for slope, u in zip(slopes, directions, strict=True)]).mean(0)


def rowwise(values: Tensor, like: Tensor) -> Tensor:
    """(B,) with as many axes as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
