"""Velocities of flows over speech: what the shipped networks share, and the small network over band gains.

Axes: B recordings, C channels of a latent, Cc of its condition, K bands, T frames, D features. t in [0, 1], 1 = noise.

Plain prediction of the velocity stayed below the noisy input; predicting the clean latent as masks on what is given did
not. So a network says h = A x_t + M condition + r, bin by bin, and its velocity is (x_t - h) / (t + REACH). Exactly,
h = x_0 - REACH v: the clean latent up to a little of the velocity, which keeps the quotient regular at t = 0.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmgrpo.types import require_shape

REACH = 0.1
Channels = tuple[int, int, int]  # of a latent, of the condition, K


def check_inputs(x: Tensor, t: Tensor, noisy: Tensor, channels: Channels) -> None:
    """Refuse tensors that do not fit a network of these channels or each other; raises ValueError."""
    latent, condition, bands = channels
    require_shape("x_t", x, None, latent, bands, None)
    require_shape("t", t, len(x))
    require_shape("noisy", noisy, len(x), condition, bands, x.shape[3])


def mixed_channels(channels: Channels) -> int:
    """Numbers that `mixed` needs of a network for each bin."""
    latent, condition, _ = channels
    return latent * (latent + condition + 1)


def mixed(parts: Tensor, x: Tensor, noisy: Tensor) -> Tensor:
    """h: every bin's matrix times what is given there, plus a rest; (B, C (C + Cc + 1), K, T) -> (B, C, K, T).

    For real and imaginary parts the matrices contain the complex masks.
    """
    given = torch.cat([x, noisy, torch.ones_like(x[:, :1])], 1)  # (B, C + Cc + 1, K, T)
    return (parts.unflatten(1, (x.shape[1], given.shape[1])) * given[:, None]).sum(2)


def velocity(h: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(x_t - h) / (t + REACH); (B, C, K, T), (B, C, K, T), (B,) -> (B, C, K, T)."""
    return (x - h) / (t + REACH)[:, None, None, None]


def zero(module: nn.Module) -> None:
    """Start a module at 0: its weights and offsets, in place."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class TimeEmbedding(nn.Module):
    """Features of the flow's time; (B,) in [0, 1] -> (B, D)."""

    frequencies: Tensor  # (16,) radians per unit of time

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.linspace(-1, 7, 16), persistent=False)
        self.layers = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        angles = t[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


class DilatedBlock(nn.Module):
    """A residual convolution over frames whose normalised input is scaled and shifted by the time (FiLM).

    Frames come before features and the three taps are laid side by side: a matrix product, faster here than `Conv1d`.
    """

    def __init__(self, width: int, dilation: int, time_width: int) -> None:
        super().__init__()
        self.dilation = dilation  # frames between taps
        self.normalise = nn.LayerNorm(width, elementwise_affine=False)  # of each frame: none depends on the length
        self.film = nn.Linear(time_width, 2 * width)
        self.wide = nn.Linear(3 * width, width)
        self.narrow = nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, T, D), (B, time) -> (B, T, D)."""
        frames, apart = x.shape[1], self.dilation
        scale, shift = self.film(time)[:, None].chunk(2, 2)
        inner = functional.silu(self.normalise(x) * (1 + scale) + shift)
        around = functional.pad(inner, (0, 0, apart, apart))
        taps = torch.cat([around[:, :frames], inner, around[:, 2 * apart :]], 2)  # (B, T, 3 D)
        return x + self.narrow(functional.silu(self.wide(taps)))


class BandGainNetwork(nn.Module):
    """Residual dilated convolutions over frames; bands and condition features are the channels."""

    def __init__(self, channels: Channels, width: int = 128, blocks: int = 6, time_width: int = 64) -> None:
        super().__init__()
        self.channels: Channels = channels
        self.options: dict[str, object] = {"width": width, "blocks": blocks, "time_width": time_width}
        latent, condition, bands = channels
        self.time = TimeEmbedding(time_width)
        self.enter = nn.Linear((latent + condition) * bands, width)
        self.blocks = nn.ModuleList(DilatedBlock(width, 2 ** (index % 6), time_width) for index in range(blocks))
        self.normalise = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 2 * latent * bands)
        zero(self.leave)

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        """The velocity; (B, C, K, T), (B,), (B, Cc, K, T) -> (B, C, K, T)."""
        check_inputs(x, t, noisy, self.channels)
        time = self.time(t)
        features = self.enter(torch.cat([x, noisy], 1).flatten(1, 2).transpose(1, 2))  # (B, T, D)
        for block in self.blocks:
            features = block(features, time)
        parts = self.leave(self.normalise(features)).transpose(1, 2)  # (B, 2 C K, T)
        mask, rest = parts.unflatten(1, (2, *x.shape[1:3])).unbind(1)  # (B, C, K, T) each
        return velocity(mask * x + rest, x, t)
