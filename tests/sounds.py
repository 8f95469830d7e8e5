"""Short recordings, tiny speech flows, and a network whose velocity is linear; axes B, C, K, T as in pipelines/speech.py."""

import math
from collections.abc import Callable
from pathlib import Path

import soundfile
import torch
from torch import Tensor, nn

from mmgrpo.types import Prompt
from pipelines import speech_models
from pipelines.speech_models import Model
from pipelines.speech_representations import BandGains, ComplexSpectrogram, Representation

RATE = 8000
BANDS = BandGains(rate=RATE, window=128, hop=64, bands=8, detail=1, centred=True)
SPECTRUM = ComplexSpectrogram(rate=RATE, window=62, hop=31, centred=True)
MODELS: dict[str, tuple[Representation, dict[str, object]]] = {
    "band gains": (BANDS, {"kind": "band_gains", "width": 16, "blocks": 2, "time_width": 8}),
    "unet": (SPECTRUM, {"kind": "unet", "widths": [8, 16], "time_width": 8}),
    "transformer": (SPECTRUM, {"kind": "transformer", "width": 24, "heads": 2, "blocks": 2, "time_width": 8}),
}


class Linear(nn.Module):
    """Velocity a x + b t + c times the mean of the condition's channels."""

    def __init__(self, channels: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.2, 0.3]))

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        a, b, c = self.weight
        return a * x + b * t[:, None, None, None] + c * noisy.mean(1, keepdim=True)


def sound(length: int, seed: int) -> Tensor:
    """A tone that comes and goes; (length,)."""
    time = torch.arange(length) / RATE
    swell = 0.5 + 0.5 * torch.sin(2 * math.pi * (3 + seed) * time)
    return 0.3 * swell * torch.sin(2 * math.pi * (300 + 170 * seed) * time)


def recordings(folder: Path, lengths: tuple[int, ...] = (800, 1000, 800, 550)) -> list[Prompt]:
    """Clean recordings in clean/, white noise in noise/; -> a prompt for each recording."""
    for name in ("clean", "noise"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        hiss = 0.1 * torch.randn(5000, generator=torch.Generator().manual_seed(number))
        soundfile.write(folder / f"noise/{number}.wav", hiss.numpy(), RATE)
    paths = [folder / f"clean/{number}.wav" for number in range(len(lengths))]
    for number, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        soundfile.write(path, sound(length, number).numpy(), RATE)
    return [Prompt(number, path.stem, {"clean": (path,)}) for number, path in enumerate(paths)]


def tiny(name: str) -> Model:
    """A shipped network at toy size, none of whose weights is 0."""
    representation, options = MODELS[name]
    table = speech_models._representation_table(representation)
    model = speech_models.create({"network": options, "representation": table})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.network.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return model


def saved(folder: Path, make: Callable[[], Model]) -> Path:
    """A model's folder."""
    model = make()
    speech_models.save(folder, model.network, model.representation)
    return folder
