"""The flow between noise and clean speech: its regression loss and its deterministic sampler.

Axes: B recordings of equal length, N samples, C channels, K bands or frequencies, T frames, S denoising steps.
x_t = (1 - t) x_0 + t x_1 with x_1 = centre + noise, and the velocity is x_1 - x_0 (arXiv 2210.02747, Eq. 23 with time reversed).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgrpo.seeds import normal
from mmgrpo.types import require_shape, same_shape
from pipelines.speech_models import Model


def matching_loss(model: Model, clean: Tensor, noisy: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the velocity over latent elements; (B, N), (B, N), (B,), (B, C, K, T) -> (B,)."""
    require_shape("t", t, len(noisy))
    representation = model.representation
    with torch.no_grad():
        x0 = representation.encode(clean, noisy)
        centre, condition = representation.centre(noisy), representation.condition(noisy)
    same_shape(eps=eps, latent=x0)
    x1 = centre + eps
    along = t[:, None, None, None]
    predicted = model.network((1 - along) * x0 + along * x1, t, condition)
    return (predicted - (x1 - x0)).square().flatten(1).mean(1)


def times(steps: int, power: float = 1.0) -> Tensor:
    """Times from 1 (noise) to 0 (clean), uniform ones to a power; above 1 they lie closer near 0; -> (S + 1,)."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if not power > 0:
        raise ValueError(f"power is {power}; expected a number above 0")
    return torch.linspace(1, 0, steps + 1) ** power


@torch.no_grad()
def enhance(model: Model, noisy: Tensor, steps: int, seeds: Sequence[int], power: float = 1.0) -> Tensor:
    """Euler's method at `times` from the noise of each recording's seed; (B, N), S, B seeds -> (B, N)."""
    if len(seeds) != len(noisy):
        raise ValueError(f"{len(seeds)} seeds arrived for {len(noisy)} recordings; expected one each")
    representation = model.representation
    condition, centre = representation.condition(noisy), representation.centre(noisy)
    x = centre + normal(seeds, centre.shape[1:]).to(centre)
    moments = times(steps, power).to(centre)
    for t, t_next in zip(moments[:-1], moments[1:], strict=True):
        x = x + (t_next - t) * model.network(x, t.expand(len(x)), condition)
    return representation.decode(x, noisy)
