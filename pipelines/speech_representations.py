"""What a flow over speech moves: a latent of the clean recording, and what the network sees of the noisy one.

Axes: B recordings of equal length, N samples, C channels, K bands or frequencies, T frames, F frequencies of a spectrogram.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from mmgrpo.types import require_shape, same_shape
from pipelines.spectrogram import Framing, as_channels, as_complex, compress, expand, framing, inverse, stft

SILENCE = 1e-5  # peak below which a recording counts as this loud, so that silence divides nothing by 0
FLOOR = 1e-7  # of the recording's mean energy; log energies end there
QUIET = 0.1  # share of a band's frames that are below its noise floor


class Representation(Protocol):
    """Between waveforms (float, [-1, 1], mono) and latents in which the flow's noise has standard deviation 1."""

    @property
    def rate(self) -> int:
        """Of the waveforms, Hz."""

    def channels(self) -> tuple[int, int, int]:
        """Channels of a latent, channels of the condition, K."""

    def condition(self, noisy: Tensor) -> Tensor:
        """What the network sees of the noisy recording; (B, N) -> (B, Cc, K, T)."""

    def centre(self, noisy: Tensor) -> Tensor:
        """The mean of x_1; (B, N) -> (B, C, K, T)."""

    def encode(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """x_0; (B, N), (B, N) -> (B, C, K, T)."""

    def decode(self, latent: Tensor, noisy: Tensor) -> Tensor:
        """The waveform of a latent; (B, C, K, T), (B, N) -> (B, N)."""


@dataclass(frozen=True)
class ComplexSpectrogram:
    """Real and imaginary part of the power-compressed spectrogram, relative to the noisy recording's peak."""

    rate: int = 16_000  # Hz
    window: int | None = None  # samples; None: the rate's preset in pipelines/spectrogram.py
    hop: int | None = None  # samples
    exponent: float = 0.5  # of the magnitudes
    factor: float = 0.15  # after the exponent
    noise: float = 0.5  # standard deviation of x_1 around its centre, in compressed units
    centred: bool = False  # x_1 has its mean at the noisy recording instead of 0

    def __post_init__(self) -> None:
        framing(self.rate, self.window, self.hop)
        for name, value in (("exponent", self.exponent), ("factor", self.factor), ("noise", self.noise)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected a value above 0")

    @property
    def cut(self) -> Framing:
        """Window and hop."""
        return framing(self.rate, self.window, self.hop)

    def channels(self) -> tuple[int, int, int]:
        """(2, 2, F)."""
        return 2, 2, self.cut.frequencies

    def condition(self, noisy: Tensor) -> Tensor:
        """The latent of the noisy recording itself; (B, N) -> (B, 2, F, T)."""
        return self.encode(noisy, noisy)

    def centre(self, noisy: Tensor) -> Tensor:
        """The noisy recording's latent or zeros; (B, N) -> (B, 2, F, T)."""
        latent = self.encode(noisy, noisy)
        return latent if self.centred else torch.zeros_like(latent)

    def encode(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """The clean recording's latent; (B, N), (B, N) -> (B, 2, F, T)."""
        same_shape(clean=clean, noisy=noisy)
        spectrogram = stft(clean / peak(noisy), self.cut)
        return as_channels(compress(spectrogram, self.exponent, self.factor)) / self.noise

    def decode(self, latent: Tensor, noisy: Tensor) -> Tensor:
        """The inverse of `encode`; (B, 2, F, T), (B, N) -> (B, N)."""
        require_shape("latent", latent, len(noisy), 2, None, None)
        spectrogram = expand(as_complex(latent * self.noise), self.exponent, self.factor)
        return inverse(spectrogram, self.cut, noisy.shape[1]) * peak(noisy)


@dataclass(frozen=True)
class BandGains:
    """Gains of mel-spaced bands in dB: the noisy spectrogram times them, interpolated over frequencies, is the output.

    A few thousand numbers a second instead of a spectrogram's 65 thousand: small enough to explore. The phase stays noisy.
    """

    rate: int = 16_000  # Hz
    window: int | None = None  # samples; None: 32 ms
    hop: int | None = None  # samples; None: half the window
    bands: int = 32
    detail: int = 4  # narrower bands per band in the condition
    lowest: float = -30.0  # dB, of a gain
    highest: float = 3.0  # dB
    middle: float = -12.0  # dB that are the latent 0
    noise: float = 10.0  # standard deviation of x_1 around its centre, dB
    centred: bool = False  # x_1 has its mean at 0 dB, the noisy recording, instead of at `middle`

    def __post_init__(self) -> None:
        interpolation(self.rate, self.cut, self.bands)
        if not self.lowest < 0 <= self.highest:
            raise ValueError(f"gains go from {self.lowest} to {self.highest} dB; expected 0 dB among them")
        if not self.noise > 0:
            raise ValueError(f"noise is {self.noise} dB; expected a value above 0")
        if self.detail < 1:
            raise ValueError(f"detail is {self.detail}; expected at least 1 band per band")

    @property
    def cut(self) -> Framing:
        """Window and hop; 32 ms every 16 ms unless they are given."""
        half = round(self.rate * 0.016)
        return framing(self.rate, self.window or 2 * half, self.hop or (self.window or 2 * half) // 2)

    def channels(self) -> tuple[int, int, int]:
        """(1, 2 + detail, bands)."""
        return 1, 2 + self.detail, self.bands

    def condition(self, noisy: Tensor) -> Tensor:
        """Log energies of the noisy bands, the same above each band's noise floor, and of narrower bands.

        Relative to the recording's mean energy and with about unit spread, so that loudness does not matter;
        (B, N) -> (B, 2 + detail, K, T).
        """
        power = self._power(noisy)
        bands = relative_log(power, interpolation(self.rate, self.cut, self.bands))  # (B, K, T)
        narrow = relative_log(power, triangles(self.rate, self.cut, self.bands * self.detail))  # (B, K * detail, T)
        quiet = bands.kthvalue(1 + int(QUIET * (bands.shape[2] - 1)), dim=2, keepdim=True).values
        return torch.cat(
            [bands[:, None], (bands - quiet)[:, None], narrow.unflatten(1, (self.bands, self.detail)).transpose(1, 2)],
            1,
        )

    def centre(self, noisy: Tensor) -> Tensor:
        """The latent of 0 dB or of `middle`; (B, N) -> (B, 1, K, T)."""
        frames = stft(noisy[:1], self.cut).shape[2]
        latent = -self.middle / self.noise if self.centred else 0.0
        return noisy.new_full((len(noisy), 1, self.bands, frames), latent)

    def encode(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """Root of each band's clean energy over its noisy one, as a latent; (B, N), (B, N) -> (B, 1, K, T)."""
        same_shape(clean=clean, noisy=noisy)
        weights = interpolation(self.rate, self.cut, self.bands).to(noisy)
        wanted, given = (torch.einsum("fk,bft->bkt", weights, self._power(x)) for x in (clean, noisy))
        least = FLOOR * given.mean((1, 2), keepdim=True) + SILENCE**2  # silence over silence is a gain of 0 dB
        gain = 10 * torch.log10((wanted + least) / (given + least))
        return ((gain.clamp(self.lowest, self.highest) - self.middle) / self.noise)[:, None]

    def decode(self, latent: Tensor, noisy: Tensor) -> Tensor:
        """The noisy recording with the latent's gains; (B, 1, K, T), (B, N) -> (B, N)."""
        require_shape("latent", latent, len(noisy), 1, self.bands, None)
        gains = (latent[:, 0] * self.noise + self.middle).clamp(self.lowest, self.highest)  # (B, K, T) dB
        weights = interpolation(self.rate, self.cut, self.bands).to(gains)
        amplitude = 10 ** (torch.einsum("fk,bkt->bft", weights, gains) / 20)
        return inverse(stft(noisy, self.cut) * amplitude, self.cut, noisy.shape[1])

    def _power(self, waveform: Tensor) -> Tensor:
        return stft(waveform, self.cut).abs().square()  # (B, F, T)


def peak(waveform: Tensor) -> Tensor:
    """Largest magnitude of each recording, at least that of silence; (B, N) -> (B, 1)."""
    return waveform.abs().amax(1, keepdim=True).clamp_min(SILENCE)


def relative_log(power: Tensor, weights: Tensor) -> Tensor:
    """Log of the bands' mean power relative to the recording's, of about unit spread; (B, F, T), (F, K) -> (B, K, T)."""
    weights = (weights / weights.sum(0)).to(power)
    mean = power.mean((1, 2), keepdim=True).clamp_min(SILENCE**2)
    level = torch.log(torch.einsum("fk,bft->bkt", weights, power / mean) + FLOOR)
    return (level + 4) / 4  # natural logs of speech in noise lie around -4 with a spread of 4


@lru_cache
def band_centres(rate: int, cut: Framing, bands: int) -> Tensor:
    """Places of the bands, equally spaced in mel and in units of frequencies of the spectrogram; -> (K,) float64."""
    highest = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))  # O'Shaughnessy's mel
    mel = highest * (torch.arange(bands, dtype=torch.float64) + 0.5) / bands
    return 700 * (10 ** (mel / 2595) - 1) * cut.window / rate


@lru_cache
def interpolation(rate: int, cut: Framing, bands: int) -> Tensor:
    """Linear interpolation from band centres to frequencies, constant outside; every row sums to 1; -> (F, K) float64.

    The same triangles collect energies, so that a band's gain acts where it was measured. Raises ValueError if a band
    would lie between two frequencies.
    """
    if bands < 2:
        raise ValueError(f"bands is {bands}; expected at least 2")
    centres = band_centres(rate, cut, bands)
    if centres.diff().min() < 1:
        raise ValueError(f"{bands} bands are closer than the {cut.frequencies} frequencies; expected fewer bands")
    place = torch.arange(cut.frequencies, dtype=torch.float64)[:, None].clamp(centres[0], centres[-1])
    below = (torch.searchsorted(centres, place[:, 0], right=True) - 1).clamp(0, bands - 2)
    share = (place[:, 0] - centres[below]) / (centres[below + 1] - centres[below])
    weights = torch.zeros(cut.frequencies, bands, dtype=torch.float64)
    rows = torch.arange(cut.frequencies)
    weights[rows, below], weights[rows, below + 1] = 1 - share, share
    return weights


@lru_cache
def triangles(rate: int, cut: Framing, bands: int) -> Tensor:
    """Triangles at band centres as wide as their spacing, or as two neighbouring frequencies; -> (F, K) float64."""
    centres = band_centres(rate, cut, bands)
    width = torch.gradient(centres)[0].clamp_min(1)
    distance = torch.arange(cut.frequencies, dtype=torch.float64)[:, None] - centres
    return (1 - distance.abs() / width).clamp_min(0)
