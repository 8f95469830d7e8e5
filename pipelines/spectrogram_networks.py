"""Velocity networks over spectrograms of any number of bands and frames: a U-Net and a diffusion transformer.

Axes: B recordings, C channels of a latent, Cc of its condition, K bands, T frames, D features, L tokens, A attention heads.

The U-Net is smaller and plainer than the NCSN++ of the SGMSE line of work (arXiv 2208.05830): no attention, no anti-aliasing
filters, no progressive inputs. The transformer is DiT (arXiv 2212.09748) with rotary places over frames, so that any length fits.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.speech_networks import Channels, TimeEmbedding, check_inputs, mixed, mixed_channels, velocity, zero

GROUP = 8  # features that are normalised together


def padded(x: Tensor, bands: int, frames: int) -> Tensor:
    """The last band and frame repeated until both counts are multiples; (B, C, K, T) -> (B, C, K', T')."""
    return functional.pad(x, (0, -x.shape[3] % frames, 0, -x.shape[2] % bands), mode="replicate")


class ResidualBlock(nn.Module):
    """Two convolutions over bands and frames; the time scales and shifts what is between them (FiLM)."""

    def __init__(self, arriving: int, width: int, time_width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(arriving // GROUP, arriving), nn.SiLU(), nn.Conv2d(arriving, width, 3, padding=1)
        )
        self.normalise = nn.GroupNorm(width // GROUP, width)
        self.film = nn.Linear(time_width, 2 * width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.around = nn.Conv2d(arriving, width, 1) if arriving != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, D, K, T), (B, time) -> (B, D', K, T)."""
        scale, shift = self.film(time)[:, :, None, None].chunk(2, 1)
        inner = self.normalise(self.first(x)) * (1 + scale) + shift
        return self.around(x) + self.second(functional.silu(inner))


class Level(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, arriving: int, width: int, blocks: int, time_width: int) -> None:
        super().__init__()
        sizes = [arriving, *[width] * (blocks - 1)]
        self.blocks = nn.ModuleList(ResidualBlock(size, width, time_width) for size in sizes)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, D, K, T), (B, time) -> (B, D', K, T)."""
        for block in self.blocks:
            x = block(x, time)
        return x


class UNet(nn.Module):
    """Convolutions at halved and halved again resolution, with what each level saw on the way down beside the way up.

    `widths` are the features of the levels, multiples of 8; `blocks` the residual blocks of a level on each way.
    """

    def __init__(
        self, channels: Channels, widths: tuple[int, ...] = (32, 48, 64, 96), blocks: int = 1, time_width: int = 64
    ) -> None:
        super().__init__()
        if not widths or any(width < GROUP or width % GROUP for width in widths):
            raise ValueError(f"widths are {widths}; expected at least one, each a multiple of {GROUP}")
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}; expected at least 1")
        self.channels: Channels = channels
        self.options: dict[str, object] = {"widths": list(widths), "blocks": blocks, "time_width": time_width}
        self.multiple = 2 ** (len(widths) - 1)  # that the counts of bands and frames are padded to
        self.time = TimeEmbedding(time_width)
        self.enter = nn.Conv2d(channels[0] + channels[1] + 1, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Level(width, width, blocks, time_width) for width in widths)
        self.up = nn.ModuleList(Level(2 * width, width, blocks, time_width) for width in widths)
        steps = list(zip(widths[:-1], widths[1:], strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in steps)
        self.grow = nn.ModuleList(nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in steps)
        self.middle = ResidualBlock(widths[-1], widths[-1], time_width)
        self.normalise = nn.GroupNorm(widths[0] // GROUP, widths[0])
        self.leave = nn.Conv2d(widths[0], mixed_channels(channels), 3, padding=1)
        zero(self.leave)

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        """The velocity; (B, C, K, T), (B,), (B, Cc, K, T) -> (B, C, K, T)."""
        check_inputs(x, t, noisy, self.channels)
        bands, frames = x.shape[2:]
        whole = padded(torch.cat([x, noisy], 1), self.multiple, self.multiple)
        place = torch.linspace(
            -1, 1, whole.shape[2], device=x.device, dtype=x.dtype
        )  # speech differs from band to band
        features = self.enter(torch.cat([whole, place[:, None].expand_as(whole[:, :1])], 1))
        features = self._through(features, self.time(t))
        parts = self.leave(functional.silu(self.normalise(features)))[:, :, :bands, :frames]
        return velocity(mixed(parts, x, noisy), x, t)

    def _through(self, features: Tensor, time: Tensor) -> Tensor:
        """Down and up; (B, D, K', T') -> (B, D, K', T')."""
        seen = []
        for level, down in enumerate(self.down):
            features = down(self.shrink[level - 1](features) if level else features, time)
            seen.append(features)
        features = self.middle(features, time)
        for level in reversed(range(len(self.up))):
            features = self.up[level](torch.cat([features, seen[level]], 1), time)
            if level:
                features = self.grow[level - 1](functional.interpolate(features, scale_factor=2.0))
        return features


def rotated(x: Tensor, place: Tensor) -> Tensor:
    """Pairs of features turned by angles that grow with the token's frame (arXiv 2104.09864, Eq. 34).

    (B, A, L, D), (L,) -> (B, A, L, D).
    """
    half = x.shape[3] // 2
    speed = 10_000.0 ** (-torch.arange(half, device=x.device) / half)  # (D / 2,) radians a frame
    angle = place[:, None] * speed
    first, second = x[..., :half], x[..., half:]
    cosine, sine = angle.cos().to(x), angle.sin().to(x)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], 3)


class TransformerBlock(nn.Module):
    """Attention and a perceptron, both scaled, shifted and gated by the time; it begins as the identity (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, time_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.normalise = nn.LayerNorm(width, elementwise_affine=False)
        self.triple = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(time_width, 6 * width)
        zero(self.modulation)

    def forward(self, x: Tensor, time: Tensor, place: Tensor) -> Tensor:
        """(B, L, D), (B, time), (L,) frame of each token -> (B, L, D)."""
        shift, scale, gate, shift_after, scale_after, gate_after = self.modulation(time)[:, None].chunk(6, 2)
        x = x + gate * self._attended(self.normalise(x) * (1 + scale) + shift, place)
        return x + gate_after * self.perceptron(self.normalise(x) * (1 + scale_after) + shift_after)

    def _attended(self, x: Tensor, place: Tensor) -> Tensor:
        query, key, value = self.triple(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, A, L, D / A)
        attended = functional.scaled_dot_product_attention(rotated(query, place), rotated(key, place), value)
        return self.merge(attended.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A diffusion transformer whose tokens are patches of bands and frames.

    `patch` is (bands, frames) of a token; None makes every frame one token.
    """

    def __init__(
        self, channels: Channels, patch: tuple[int, int] | None = None, width: int = 192, blocks: int = 6, heads: int = 6,
        time_width: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise ValueError(f"width is {width} with {heads} heads; expected a multiple of twice the heads")
        self.patch = (channels[2], 1) if patch is None else (patch[0], patch[1])
        if min(self.patch) < 1:
            raise ValueError(f"patch is {patch}; expected at least 1 band and 1 frame")
        self.channels: Channels = channels
        self.options: dict[str, object] = {
            "patch": list(self.patch), "width": width, "blocks": blocks, "heads": heads, "time_width": time_width
        }  # fmt: skip
        area = self.patch[0] * self.patch[1]
        self.time = TimeEmbedding(time_width)
        self.enter = nn.Linear((channels[0] + channels[1]) * area, width)
        self.bands = nn.Parameter(0.02 * torch.randn(-(-channels[2] // self.patch[0]), width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, time_width) for _ in range(blocks))
        self.normalise = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(time_width, 2 * width)
        self.leave = nn.Linear(width, mixed_channels(channels) * area)
        zero(self.modulation)
        zero(self.leave)

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        """The velocity; (B, C, K, T), (B,), (B, Cc, K, T) -> (B, C, K, T)."""
        check_inputs(x, t, noisy, self.channels)
        time = self.time(t)
        whole = padded(torch.cat([x, noisy], 1), *self.patch)
        high, long = whole.shape[2] // self.patch[0], whole.shape[3] // self.patch[1]
        tokens = self.enter(self._cut(whole)).unflatten(1, (high, long)) + self.bands[:, None]
        tokens = tokens.flatten(1, 2)  # (B, L, D), bands before frames
        place = torch.arange(long, device=x.device).repeat(high)
        for block in self.blocks:
            tokens = block(tokens, time, place)
        shift, scale = self.modulation(time)[:, None].chunk(2, 2)
        parts = self._joined(self.leave(self.normalise(tokens) * (1 + scale) + shift), high, long)
        return velocity(mixed(parts[:, :, : x.shape[2], : x.shape[3]], x, noisy), x, t)

    def _cut(self, x: Tensor) -> Tensor:
        """Patches as tokens; (B, C, K', T') -> (B, L, C * bands * frames)."""
        cut = x.unflatten(3, (-1, self.patch[1])).unflatten(2, (-1, self.patch[0]))  # (B, C, high, bands, long, frames)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _joined(self, tokens: Tensor, high: int, long: int) -> Tensor:
        """The inverse of `_cut`; (B, L, C * bands * frames) -> (B, C, K', T')."""
        patches = tokens.unflatten(1, (high, long)).unflatten(3, (-1, *self.patch))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
