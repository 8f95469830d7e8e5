"""Recordings of any length, rate and number of channels through an enhancer of mono windows; audio files in and out.

Axes: C channels, N samples of a recording at its own rate, M samples of a window at the enhancer's rate.
A recording is read once, from its start, in windows that overlap; where two overlap the one fades into the other with
weights that sum to 1, the outer quarters of the overlap left out, where a window's edge is heard. What is in memory
is one window; what is enhanced waits in a file without a name until its peak is known.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample

from mmgrpo import checkpoint as checkpoints
from mmgrpo import seeds
from pipelines import speech_flow, speech_models
from pipelines.enhance import CONTAINERS
from pipelines.mel import with_vocoder
from pipelines.speech_models import Model

OVERLAP = 0.1  # share of a window that it has in common with the next one
SHORTEST = 0.5  # seconds that an enhancer is given at least: what is shorter is followed by silence
BLOCK = 1 << 18  # samples of a file that are looked at or written at once
KERNEL = 10**8  # elements of a resampling kernel, of rates without a simple ratio, that are too many
UNFINISHED = ".unfinished_"
FLOATING = ("FLOAT", "DOUBLE")  # subtypes that hold samples beyond [-1, 1]
Read = Callable[[int], Tensor]  # n -> the next n samples, (C, n) float32


@dataclass(frozen=True)
class Enhancer:
    """A function of mono recordings, and how longer ones are cut for it."""

    enhance: Callable[[Tensor, Sequence[int]], Tensor]  # (1, M) in [-1, 1] and one seed -> (1, M)
    rate: int  # Hz of what it is given and gives
    window: float = 10.0  # seconds in memory at once
    seed: int = 0  # of all noise; every channel of a window has the same, so that equal channels stay equal


def enhancer(
    model: Model, steps: int, device: str = "cpu", *, power: float = 1.0, window: float = 10.0, seed: int = 0
) -> Enhancer:
    """A model's deterministic sampler from seeded noise; its network is moved to the device."""
    speech_flow.times(steps, power)  # refuses what are no steps
    network = model.network.to(device).eval()
    moved = speech_models.Model(network, model.representation)

    def enhance(noisy: Tensor, own: Sequence[int]) -> Tensor:
        try:
            return speech_flow.enhance(moved, noisy.to(device), steps, own, power)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{noisy.shape[1]} samples at once do not fit on {device}; expected a smaller window"
            ) from None

    return Enhancer(enhance, model.representation.rate, window, seed)


def loaded(
    path: Path,
    steps: int,
    device: str = "auto",
    *,
    power: float = 1.0,
    window: float = 10.0,
    seed: int = 0,
    network: str | None = None,
    vocoder: str | None = None,
) -> Enhancer:
    """The enhancer of a model on disk (see `model_folder`), on a device whose results repeat; raises ValueError."""
    place = usable(device)
    model = speech_models.load(model_folder(path), network)
    torch.backends.cudnn.deterministic = True  # the same seed, the same file
    heard = with_vocoder(model.representation, vocoder, place)
    return enhancer(Model(model.network, heard), steps, place, power=power, window=window, seed=seed)


def model_folder(path: Path) -> Path:
    """A model's folder itself, that of a checkpoint, or that of a run's newest checkpoint; raises FileNotFoundError."""
    newest = checkpoints.latest(path) if (path / "checkpoints").is_dir() else None
    places = [path, path / "model", *([newest / "model"] if newest else [])]
    for place in places:
        if (place / speech_models.CONFIG).is_file():
            return place
    missing = "" if path.is_dir() else ", which is not there"
    looked = f"{speech_models.CONFIG} in it, in its model/ and in the model/ of the newest of its checkpoints/"
    raise FileNotFoundError(f"no speech model in {path}{missing}; looked for {looked}")


def usable(device: str) -> str:
    """A device by name, "auto" for a GPU of CUDA if there is one; raises ValueError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without that kind
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


class Grid(NamedTuple):
    """Windows of a recording, in samples at its rate."""

    starts: list[int]  # multiples of what resamples to whole samples
    length: int  # of a window; the last one goes to the end
    overlap: int  # of neighbours, at least


class Facts(NamedTuple):
    """What a look through an audio file showed."""

    samples: int  # N
    rate: int  # Hz
    channels: int  # C
    format: str  # of the container, as soundfile names it
    subtype: str  # of the samples


def grid(total: int, rate: int, enhancer: Enhancer) -> Grid:
    """Windows that cover a recording of `total` samples; raises ValueError for a rate that cannot be resampled."""
    divisor = gcd(rate, enhancer.rate)
    unit = rate // divisor  # so many samples are a whole number of the enhancer's
    if unit * (enhancer.rate // divisor) > KERNEL:
        raise ValueError(f"its rate is {rate} Hz, which has no simple ratio to the model's {enhancer.rate} Hz")
    length = max(2, round(enhancer.window * rate / unit)) * unit
    hop = max(1, int((1 - OVERLAP) * length / unit)) * unit
    if total <= length:
        return Grid([0], length, length - hop)
    last = (total - length) // unit * unit
    return Grid([*range(0, last, hop), last], length, length - hop)


def fade(overlap: int) -> Tensor:
    """Weight of the later of two windows where they overlap; the earlier one has the rest of 1; -> (overlap,)."""
    along = (torch.arange(overlap) + 0.5) / overlap
    return (2 * along - 0.5).clamp(0, 1)


def enhanced_pieces(read: Read, total: int, rate: int, enhancer: Enhancer) -> Iterator[Tensor]:
    """The enhanced recording from its start to its end, (C, n) at a time; raises ValueError as `grid` and the enhancer."""
    starts, length, overlap = grid(total, rate, enhancer)
    weights = fade(overlap)
    stops = [start + length for start in starts[:-1]] + [total]
    heard, fading = read(stops[0]), None
    for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        made = _enhance_window(
            heard, rate, enhancer, seeds.derive(enhancer.seed, "enhance", index)
        )  # (C, stop - start)
        if fading is not None:
            made[:, :overlap] = torch.lerp(fading, made[:, :overlap], weights)
        if stop == total:
            yield made
            return
        step = starts[index + 1] - start
        yield made[:, :step]
        fading = made[:, step : step + overlap]
        heard = torch.cat([heard[:, step:], read(stops[index + 1] - stop)], dim=1)


def _enhance_window(heard: Tensor, rate: int, enhancer: Enhancer, seed: int) -> Tensor:
    """One window, channel by channel, so that a channel's result and the memory do not depend on the others."""
    return torch.cat([_enhance_channel(channel[None], rate, enhancer, seed) for channel in heard])


def _enhance_channel(heard: Tensor, rate: int, enhancer: Enhancer, seed: int) -> Tensor:
    """(1, n) at its rate -> (1, n); digital silence stays so, which no model was trained on."""
    if not heard.any():
        return torch.zeros_like(heard)
    given = _resample(heard, rate, enhancer.rate)  # (1, M)
    missing = max(0, int(SHORTEST * enhancer.rate) - given.shape[1])
    given = torch.nn.functional.pad(given, (0, missing))
    made = enhancer.enhance(given, [seed])
    if made.shape != given.shape:
        raise ValueError(f"the model made {tuple(made.shape)} of {tuple(given.shape)} samples; expected as many")
    if not made.isfinite().all():
        raise ValueError("the model made samples that are not finite")
    made = made.to("cpu", torch.float32)[:, : made.shape[1] - missing]
    return _resample(made, enhancer.rate, rate)[:, : heard.shape[1]].clone()


def _resample(heard: Tensor, rate: int, other: int) -> Tensor:
    """By windowed sinc, 64 zero crossings to each side: 1 % off at 0.96 of the lower band, where torchaudio's 6 lose 86 %."""
    return resample(heard, rate, other, lowpass_filter_width=64) if rate != other else heard


@torch.no_grad()
def enhance_waveform(waveform: Tensor, rate: int, enhancer: Enhancer) -> Tensor:
    """A recording of any length, (C, N) float32 at `rate` Hz -> (C, N); raises ValueError as `enhanced_pieces`."""
    if waveform.ndim != 2 or waveform.shape[1] == 0:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}; expected (channels, samples)")
    position = 0

    def read(count: int) -> Tensor:
        nonlocal position
        position += count
        return waveform[:, position - count : position].to("cpu", torch.float32)

    return torch.cat(list(enhanced_pieces(read, waveform.shape[1], rate, enhancer)), dim=1)


def look(path: Path) -> Facts:
    """Read a file through once; raises ValueError if it is no audio, or empty, silent or not finite."""
    samples, peak = 0, 0.0
    with opened(path) as file:
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):  # (n, C)
                samples += len(block)
                peak = float(np.maximum(peak, np.abs(block).max()))  # NaN stays
                if not np.isfinite(peak):
                    raise ValueError("it holds samples that are not finite")
        except soundfile.LibsndfileError as error:
            raise ValueError(f"it cannot be decoded to its end: {error.error_string}") from None
        facts = Facts(samples, file.samplerate, file.channels, file.format, file.subtype)
    if not samples:
        raise ValueError("it holds no samples")
    if peak == 0:
        raise ValueError(f"it is silent: all its {samples} samples are 0")
    return facts


def opened(path: Path) -> soundfile.SoundFile:
    """The audio file, to be read; raises ValueError if it is none."""
    try:
        return soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"it is no audio that can be read: {error.error_string}") from None


@torch.no_grad()
def enhance_file(
    source: Path,
    target: Path,
    facts: Facts,
    enhancer: Enhancer,
    *,
    mono: bool = False,
    advance: Callable[[float], None] = lambda seconds: None,
) -> float:
    """Write the enhanced recording in the target's format, whole or not at all; -> what it was scaled by, 1 if by nothing.

    It is scaled only where its peak would be clipped. `advance` hears of every piece's seconds. Raises ValueError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    peak = 0.0
    with opened(source) as file, TemporaryFile(dir=target.parent) as spool:

        def read(count: int) -> Tensor:
            heard = torch.from_numpy(file.read(count, dtype="float32", always_2d=True)).T  # (C, n)
            return heard.mean(0, keepdim=True) if mono else heard

        for piece in enhanced_pieces(read, facts.samples, facts.rate, enhancer):
            spool.write(piece.T.contiguous().numpy().tobytes())
            peak = max(peak, piece.abs().max().item())
            advance(piece.shape[1] / facts.rate)
        spool.seek(0)
        written = facts._replace(channels=1 if mono else facts.channels, format=container(source, target, facts))
        written = written._replace(subtype=subtype(written))
        scale = 0.999 / peak if peak > 1 and written.subtype not in FLOATING else 1.0
        _write(spool, target, written, scale)
    return scale


def _write(spool: IO[bytes], target: Path, facts: Facts, scale: float) -> None:
    """Encode interleaved float32 samples into a file beside the target, then rename it."""
    unfinished = target.with_name(UNFINISHED + target.name)
    try:
        with soundfile.SoundFile(
            unfinished, "w", facts.rate, facts.channels, facts.subtype, format=facts.format
        ) as file:
            while block := spool.read(BLOCK * facts.channels * 4):
                file.write(np.frombuffer(block, np.float32).reshape(-1, facts.channels) * np.float32(scale))
        os.replace(unfinished, target)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{target} cannot be written: {error.error_string}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def container(source: Path, target: Path, facts: Facts) -> str:
    """The source's own container if the suffix says the same, else that of the target's suffix."""
    same = source.suffix.lower() == target.suffix.lower()
    return facts.format if same else CONTAINERS[target.suffix.lower()]


def subtype(facts: Facts) -> str:
    """The source's kind of samples if the container can hold it, else 24 bits, else the container's default."""
    for kind in (facts.subtype, "PCM_24"):
        if soundfile.check_format(facts.format, kind):
            return kind
    kind = soundfile.default_subtype(facts.format)
    assert kind is not None  # every container of the table has one
    return kind
