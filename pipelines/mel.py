"""Log-mel spectrograms as what a flow over speech moves, and vocoders that make them heard, as FlowSE trains (arXiv 2505.19476).

Axes: B recordings of equal length, N samples, F frequencies of a spectrogram, K mel bands, T frames.
The defaults are those of the 24 kHz Vocos and BigVGAN vocoders that FlowSE and F5-TTS speak through. Of FlowSE are left
out: text as a second condition, and its time, which runs from 0 (noise) to 1 (clean); a network with weights of that shape
is written as `velocity(x_t, t, noisy) = -theirs(x_t, 1 - t, noisy)`.
"""

import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torchaudio import functional

from mmgrpo.components import locate
from mmgrpo.types import require_shape, same_shape
from pipelines.speech_representations import Representation

SILENCE = 1e-5  # root mean square below which a recording counts as this loud
Vocoder = Callable[
    [Tensor], Tensor
]  # natural log of mel magnitudes, (B, K, T) -> waveforms (B, at least (T - 1) * hop)


@dataclass(frozen=True)
class MelSpectrogram:
    """Natural log of mel-band magnitudes of recordings brought to one loudness.

    The vocoder is no field, because it is code: a model's folder cannot name it, the user does.
    """

    rate: int = 24_000  # Hz
    window: int = 1024  # samples of a Hann window, and of its Fourier transform
    hop: int = 256  # samples from one frame to the next
    bands: int = 100
    lowest: float = 0.0  # Hz
    highest: float | None = None  # Hz; None: half the rate
    floor: float = 1e-5  # magnitudes below count as this
    loudness: float = -25.0  # dB of the noisy recording's root mean square while it is worked on; FlowSE: -35 to -15
    middle: float = 0.0  # natural log of a magnitude that is the latent 0
    noise: float = 1.0  # standard deviation of x_1 around its centre, in natural logs of magnitudes
    centred: bool = False  # x_1 has its mean at the noisy recording instead of 0
    vocoder: InitVar[Vocoder | None] = None

    def __post_init__(self, vocoder: Vocoder | None) -> None:
        object.__setattr__(self, "_speak", vocoder)
        top = self.rate / 2 if self.highest is None else self.highest
        if self.window < 4 or self.window % 2 or not 1 <= self.hop <= self.window // 2:
            raise ValueError(
                f"window is {self.window}, hop is {self.hop} samples; expected an even window, a hop up to half of it"
            )
        if not 0 <= self.lowest < top <= self.rate / 2:
            raise ValueError(f"bands go from {self.lowest} to {top} Hz; expected a range inside 0 to {self.rate / 2}")
        for name, value in (("bands", self.bands), ("floor", self.floor), ("noise", self.noise)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected a value above 0")

    def channels(self) -> tuple[int, int, int]:
        """(1, 1, K)."""
        return 1, 1, self.bands

    def condition(self, noisy: Tensor) -> Tensor:
        """The latent of the noisy recording; (B, N) -> (B, 1, K, T)."""
        return self.encode(noisy, noisy)

    def centre(self, noisy: Tensor) -> Tensor:
        """The noisy recording's latent or zeros; (B, N) -> (B, 1, K, T)."""
        latent = self.encode(noisy, noisy)
        return latent if self.centred else torch.zeros_like(latent)

    def encode(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """The clean recording's latent, at the loudness of the noisy one; (B, N), (B, N) -> (B, 1, K, T)."""
        require_shape("clean", clean, None, None)
        same_shape(clean=clean, noisy=noisy)
        return ((self.log_mel(clean * self._gain(noisy)) - self.middle) / self.noise)[:, None]

    def decode(self, latent: Tensor, noisy: Tensor) -> Tensor:
        """What the vocoder says, at the noisy recording's loudness; (B, 1, K, T), (B, N) -> (B, N); ValueError without one."""
        require_shape("latent", latent, len(noisy), 1, self.bands, None)
        speak: Vocoder | None = vars(self)["_speak"]
        if speak is None:
            raise ValueError(
                "a mel spectrogram needs a vocoder to be heard; name one: 'griffin_lim' or 'mine.py:build'"
            )
        spoken = speak(latent[:, 0] * self.noise + self.middle)
        if spoken.ndim != 2 or len(spoken) != len(noisy) or spoken.shape[1] < noisy.shape[1]:
            raise ValueError(
                f"the vocoder made {tuple(spoken.shape)} of {tuple(latent.shape)}; expected at least {tuple(noisy.shape)}"
            )
        return spoken[:, : noisy.shape[1]] / self._gain(noisy)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Natural log of mel-band magnitudes; the end is followed by zeros to a whole hop; (B, N) -> (B, K, T)."""
        samples = waveform.shape[1]
        if samples == 0:
            raise ValueError("waveform has 0 samples; expected at least 1")
        shortest = self.window // 2 + 1  # what is reflected at the ends must be there
        length = -(-max(samples, shortest) // self.hop) * self.hop
        spectrogram = functional.spectrogram(
            nn.functional.pad(waveform, (0, length - samples)),
            pad=0,
            window=torch.hann_window(self.window, device=waveform.device, dtype=waveform.dtype),
            n_fft=self.window,
            hop_length=self.hop,
            win_length=self.window,
            power=1.0,
            normalized=False,
        )  # (B, F, T)
        mel = torch.einsum("fk,bft->bkt", filters(self).to(spectrogram), spectrogram)
        return mel.clamp_min(self.floor).log()

    def _gain(self, noisy: Tensor) -> Tensor:
        """What brings each recording to the loudness; (B, N) -> (B, 1)."""
        level = noisy.square().mean(1, keepdim=True).sqrt().clamp_min(SILENCE)
        return 10 ** (self.loudness / 20) / level


@lru_cache
def filters(mel: MelSpectrogram) -> Tensor:
    """Triangles of height 1, equally spaced in mel (HTK's); -> (F, K)."""
    with warnings.catch_warnings():  # narrow low bands fall between two frequencies, in the vocoders' training too
        warnings.filterwarnings("ignore", "At least one mel filterbank")
        return functional.melscale_fbanks(
            mel.window // 2 + 1, mel.lowest, mel.highest or mel.rate / 2, mel.bands, mel.rate
        )


def griffin_lim(mel: MelSpectrogram, *, rounds: int = 32) -> Vocoder:
    """Phases by the Griffin-Lim algorithm (Perraudin et al. 2013): needs no weights, and sounds metallic."""
    back = torch.linalg.pinv(filters(mel).double())  # (K, F)

    def speak(log_mel: Tensor) -> Tensor:
        """(B, K, T) -> (B, (T - 1) * hop), or a window if that is more; the same for the same input."""
        magnitude = torch.einsum("kf,bkt->bft", back.to(log_mel), log_mel.exp()).clamp_min(0)
        missing = max(0, mel.window // 2 // mel.hop + 2 - magnitude.shape[2])  # what is reflected must be there
        magnitude = nn.functional.pad(magnitude, (0, missing))
        window = torch.hann_window(mel.window, device=log_mel.device, dtype=log_mel.dtype)
        return functional.griffinlim(
            magnitude, window, mel.window, mel.hop, mel.window, 1.0, rounds, 0.99, length=None, rand_init=False
        )

    return speak


SHIPPED = {"griffin_lim": griffin_lim}


def with_vocoder(representation: Representation, name: str | None, device: str = "cpu") -> Representation:
    """The representation, heard through the vocoder that the user named if it is a mel spectrogram; raises ValueError.

    `name` is "griffin_lim", or the user's own "module:function" or "path/to/file.py:function", which is called with the
    MelSpectrogram and returns a Vocoder; one that is a torch module is moved to the device.
    """
    if not isinstance(representation, MelSpectrogram):
        if name is not None:
            kind = type(representation).__name__
            raise ValueError(f"vocoder {name!r} arrived for a {kind}; expected none, only mel spectrograms need one")
        return representation
    if name is None:
        raise ValueError(
            "the model makes mel spectrograms, which need a vocoder to be heard, and a model's folder names none; "
            "name one: 'mine.py:build', or 'griffin_lim', which needs no weights and sounds metallic"
        )
    build = SHIPPED[name] if name in SHIPPED else locate(name, "vocoder")
    vocoder = build(representation)
    if not callable(vocoder):
        raise ValueError(f"vocoder {name!r} made a {type(vocoder).__name__}; expected a function of (B, K, T)")
    if isinstance(vocoder, nn.Module):
        vocoder = vocoder.to(device).eval()
    return replace(representation, vocoder=vocoder)
