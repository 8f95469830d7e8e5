"""Waveforms to complex spectrograms and back, and the power compression of their magnitudes.

Axes: B recordings, N samples, F frequencies from 0 to half the rate, T frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmgrpo.types import require_shape


class Framing(NamedTuple):
    """How a waveform is cut; both in samples."""

    window: int  # of a Hann window, and of its Fourier transform; even
    hop: int  # from one frame to the next

    @property
    def frequencies(self) -> int:
        """F, from 0 to half the rate."""
        return self.window // 2 + 1


# 16 and 48 kHz are those of the SGMSE line of work (arXiv 2208.05830): 32 ms every 8 ms, F a power of 2 or thrice one
PRESETS = {8_000: Framing(254, 64), 16_000: Framing(510, 128), 48_000: Framing(1534, 384)}


def framing(rate: int, window: int | None = None, hop: int | None = None) -> Framing:
    """The rate's preset, or the window and hop given for it; raises ValueError where they cannot be inverted."""
    if window is None and hop is None:
        if rate not in PRESETS:
            known = ", ".join(str(known) for known in PRESETS)
            raise ValueError(f"rate is {rate} Hz; expected one of {known}, or a window and a hop of your own")
        return PRESETS[rate]
    if window is None or hop is None:
        raise ValueError(f"window is {window} and hop is {hop}; expected both or neither")
    if window < 4 or window % 2 or not 1 <= hop <= window // 2:
        raise ValueError(f"window is {window}, hop is {hop} samples; expected an even window, a hop up to half of it")
    return Framing(window, hop)


def frames(samples: int, cut: Framing) -> int:
    """T of a waveform of N samples: the first frame is centred on its start, the last on or after its end."""
    return 1 + -(-samples // cut.hop)


def stft(waveform: Tensor, cut: Framing) -> Tensor:
    """Short-time Fourier transform with zeros around the waveform; (B, N) -> (B, F, T) complex.

    The end is padded to a whole hop: otherwise the last samples would lie in the foot of a single window alone, and
    whatever changes their frame would be divided by that window's square.
    """
    require_shape("waveform", waveform, None, None)
    if waveform.shape[1] == 0:
        raise ValueError("waveform has 0 samples; expected at least 1")
    whole = functional.pad(waveform, (0, -waveform.shape[1] % cut.hop))
    window = torch.hann_window(cut.window, dtype=waveform.dtype, device=waveform.device)
    return torch.stft(whole, cut.window, cut.hop, window=window, center=True, pad_mode="constant", return_complex=True)


def inverse(spectrogram: Tensor, cut: Framing, samples: int) -> Tensor:
    """The waveform whose `stft` is closest to the spectrogram; (B, F, T) complex, N -> (B, N)."""
    require_shape("spectrogram", spectrogram, None, cut.frequencies, frames(samples, cut))
    window = torch.hann_window(cut.window, dtype=spectrogram.real.dtype, device=spectrogram.device)
    return torch.istft(spectrogram, cut.window, cut.hop, window=window, center=True, length=samples)


def compress(spectrogram: Tensor, exponent: float, factor: float) -> Tensor:
    """factor * |z|^exponent with the phase of z (arXiv 2208.05830, Eq. 14); complex, any shape."""
    magnitude = spectrogram.abs().clamp_min(1e-12)  # the power is infinite at 0
    return spectrogram * (factor * magnitude ** (exponent - 1))


def expand(compressed: Tensor, exponent: float, factor: float) -> Tensor:
    """The inverse of `compress`; complex, any shape."""
    scaled = compressed / factor
    return scaled * scaled.abs().clamp_min(1e-12) ** (1 / exponent - 1)


def as_channels(spectrogram: Tensor) -> Tensor:
    """Real and imaginary parts; (B, F, T) complex -> (B, 2, F, T)."""
    return torch.stack([spectrogram.real, spectrogram.imag], 1)


def as_complex(channels: Tensor) -> Tensor:
    """The inverse of `as_channels`; (B, 2, F, T) -> (B, F, T) complex."""
    return torch.complex(channels[:, 0], channels[:, 1])
