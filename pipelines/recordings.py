"""Clean recordings and what was heard of them: read, resampled, cut, mixed with noise and rooms on the fly.

Everything random comes from one seed per pair, so a pair can be made again at any time and on any machine with the same files.
Axes: B samples of a batch, N samples of a recording; waveforms are float32, mono, about [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import fftconvolve, resample

from mmgrpo import seeds
from mmgrpo.types import Batch, Prompt, same_shape

ENDINGS = frozenset((".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".rf64", ".w64"))
SILENCE = 1e-4  # peak below which a recording, or a stretch of it, counts as silent (-80 dB)


class Pair(NamedTuple):
    """One recording twice."""

    clean: Tensor  # (N,)
    noisy: Tensor  # (N,)


@dataclass(frozen=True)
class Mixing:
    """How clean recordings become noisy ones, where the data does not hold both."""

    rate: int  # Hz
    resample: bool = True  # recordings of other rates are converted
    seconds: float | None = None  # longer recordings are cut to this length at a random place; None: whole
    noise: Path | None = None  # folder of noise recordings, searched with all folders inside
    snr: tuple[float, float] = (0.0, 10.0)  # dB, drawn uniformly
    impulses: Path | None = None  # folder of room impulse responses; None: no rooms

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds * self.rate >= 1:
            raise ValueError(f"seconds is {self.seconds}; expected at least one sample, or none for whole recordings")
        if not self.snr[0] <= self.snr[1]:
            raise ValueError(f"snr is {list(self.snr)}; expected the lowest and the highest, in dB")
        if self.impulses is not None and self.noise is None:
            raise ValueError(f"impulses is {str(self.impulses)!r} without noise; expected a folder of noise, too")

    @property
    def longest(self) -> int | None:
        """Samples that a recording is cut to."""
        return None if self.seconds is None else round(self.seconds * self.rate)

    @cached_property
    def noises(self) -> tuple[Path, ...]:
        """The noise recordings in the order of their names."""
        return () if self.noise is None else listed(self.noise, "noise")

    @cached_property
    def rooms(self) -> tuple[Path, ...]:
        """The impulse responses in the order of their names."""
        return () if self.impulses is None else listed(self.impulses, "impulses")


def listed(folder: Path, option: str) -> tuple[Path, ...]:
    """Every recording in a folder and the folders inside, by relative name; raises ValueError if there is none."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file()]
    if not found:
        raise ValueError(f"policy.{option} is {str(folder)!r}, where there are no recordings")
    return tuple(sorted(found, key=lambda path: path.relative_to(folder).as_posix()))


def read(path: Path, rate: int) -> Tensor:
    """A recording's channels averaged, at a rate in Hz; -> (N,) float32."""
    values, own = soundfile.read(path, dtype="float32", always_2d=True)
    mono = torch.from_numpy(values).mean(1)
    return mono if own == rate else resample(mono, own, rate)


class Heard(NamedTuple):
    """The recordings of a batch; padded with zeros at the end."""

    clean: Tensor  # (B, N)
    noisy: Tensor  # (B, N)
    length: Tensor  # (B,) int64 samples


def hear(batch: Batch, mixing: Mixing) -> Heard:
    """The pair of each row, from the run's seed and the row's group: all samples of a group hear the same."""
    pairs: dict[int, Pair] = {}
    groups = batch.group.tolist()
    for prompt, group in zip(batch.prompts, groups, strict=True):
        if group not in pairs:
            pairs[group] = pair(prompt, mixing, seeds.derive(batch.seed, "mixture", group))
    clean, noisy = [pairs[group].clean for group in groups], [pairs[group].noisy for group in groups]
    length = torch.tensor([len(one) for one in clean])
    return Heard(pad_sequence(clean, batch_first=True), pad_sequence(noisy, batch_first=True), length)


def length(prompt: Prompt, mixing: Mixing) -> int:
    """Samples of the prompt's pair, from the head of its file."""
    found = soundfile.info(prompt.media["clean"][0])
    whole = -(-found.frames * mixing.rate // found.samplerate)
    return whole if mixing.longest is None else min(whole, mixing.longest)


def pair(prompt: Prompt, mixing: Mixing, seed: int) -> Pair:
    """The prompt's clean recording, and its noisy one as it is in the data or mixed from the seed.

    Both are turned down alike where one would exceed full scale.
    """
    clean = read(prompt.media["clean"][0], mixing.rate)
    if "noisy" in prompt.media:
        both = torch.stack([clean, read(prompt.media["noisy"][0], mixing.rate)])
        clean, noisy = stretch(both, mixing.longest, seeds.derive(seed, "stretch"))
    else:
        [clean] = stretch(clean[None], mixing.longest, seeds.derive(seed, "stretch"))
        noisy = mixed(clean, mixing, seed)
    peak = torch.stack([clean.abs().max(), noisy.abs().max()]).max().clamp_min(1)
    return Pair(clean / peak, noisy / peak)


def mixed(clean: Tensor, mixing: Mixing, seed: int) -> Tensor:
    """The recording in a room, if there are any, with noise at a drawn SNR; (N,) -> (N,)."""
    heard = clean
    if mixing.rooms:
        heard = in_room(clean, read(drawn(mixing.rooms, seeds.derive(seed, "room")), mixing.rate))
    noise = read(drawn(mixing.noises, seeds.derive(seed, "noise")), mixing.rate)
    noise = fitted(noise, len(clean), seeds.derive(seed, "noise", "stretch"))
    low, high = mixing.snr
    share = torch.rand((), generator=generator(seeds.derive(seed, "snr")))
    return heard + at_snr(noise, heard, low + (high - low) * float(share))


def in_room(clean: Tensor, impulse: Tensor) -> Tensor:
    """The recording convolved with a room's response, whose direct path keeps the time and the level; (N,), (L,) -> (N,).

    The direct path is the response's largest peak: what comes before it moves ahead, what comes after is reverberation.
    """
    direct = int(impulse.abs().argmax())
    return fftconvolve(clean, impulse / impulse[direct])[direct : direct + len(clean)]


def at_snr(noise: Tensor, heard: Tensor, snr: float) -> Tensor:
    """The noise scaled so that 10 log10(power of what is heard / power of the noise) = snr dB; (N,), (N,) -> (N,)."""
    same_shape(noise=noise, heard=heard)
    power = noise.square().mean()
    return noise * (heard.square().mean() / power / 10 ** (snr / 10)).sqrt()


def fitted(noise: Tensor, length: int, seed: int) -> Tensor:
    """A random stretch of the noise, begun again at its end as often as it takes; (M,) -> (length,)."""
    if len(noise) >= length:
        return stretch(noise[None], length, seed)[0]
    start = int(torch.randint(len(noise), (), generator=generator(seed)))
    return noise.roll(-start).repeat(-(-length // len(noise)))[:length]


def stretch(recordings: Tensor, length: int | None, seed: int) -> Tensor:
    """The same random stretch of recordings, (R, N) -> (R, min(N, length)), whole without a length.

    One in which the first of them is silent gives way to the stretch around its loudest sample.
    """
    total = recordings.shape[1]
    if length is None or total <= length:
        return recordings
    start = int(torch.randint(total - length + 1, (), generator=generator(seed)))
    if recordings[0, start : start + length].abs().max() < SILENCE:
        start = min(max(0, int(recordings[0].abs().argmax()) - length // 2), total - length)
    return recordings[:, start : start + length]


def drawn(paths: Sequence[Path], seed: int) -> Path:
    """One of the files, each equally likely."""
    return paths[int(torch.randint(len(paths), (), generator=generator(seed)))]


def generator(seed: int) -> torch.Generator:
    """A stream of its own."""
    return torch.Generator().manual_seed(seed)
