"""Rewards for speech: how near a recording is to the clean one, how well it can be understood, how good it sounds.

Native measures (`rewards.speech_worker`) run in a pool of processes that all rewards share: they are slow and use one core.
The option `processes` is the number of cores up to 4 if left out; 0 computes in this process, where a crash of a library
is the run's. `timeout` seconds after its question a process is ended. Results do not depend on either.

Each recording is averaged over its channels and cut to its `audio_length`. NaN, never a number: a recording that is silent
(it moves less than a step of 16 bits), not finite or too short; a measure that failed, which is logged. NISQA and UTMOS are not
here: their weights are downloads. B samples, C channels, N audio samples.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgrpo.types import Samples, require_shape
from rewards.pool import Reply, Task, collect, count_problems, default_processes, shared
from rewards.speech_worker import COUNTS, POLYNOMIALS, measure

WORKER = Path(__file__).with_name("speech_worker.py")
BLIND = ("dnsmos", "dnsmos_p808")  # measures that need no reference
RANGE = (-20.0, 30.0)  # dB, of SI-SDR as a reward

SpeechReward = Callable[[Samples], Tensor]
Name = Literal["si_sdr", "log_spectral_distance", "stoi", "estoi", "pesq_wide", "pesq_narrow", "dnsmos", "dnsmos_p808"]
Part = Literal["sig", "bak", "ovr"]
Signal = NDArray[numpy.float32]


# ---- recordings


def lengths(samples: Samples, size: int) -> list[int]:
    """How many audio samples of each recording count, B; raises ValueError for more than there are."""
    if samples.audio_length is None:
        return [size] * len(samples)
    require_shape("audio_length", samples.audio_length, len(samples))
    found: list[int] = samples.audio_length.tolist()
    if any(not 0 <= length <= size for length in found):
        raise ValueError(f"audio_length has values from {min(found)} to {max(found)}; expected 0 to {size}")
    return found


def mono(name: str, audio: Tensor | None, count: int) -> Tensor:
    """The mean over channels; (B, C, N) -> (B, N) float32 on the CPU; raises ValueError for anything else."""
    if audio is None:
        raise ValueError(f"the samples carry no {name}; expected {name} of shape (B, 1, N)")
    require_shape(name, audio, count, None, None)
    return audio.detach().float().mean(1).cpu()


def audio_rate(samples: Samples) -> int:
    if samples.rate is None or samples.rate < 1:
        raise ValueError(f"the samples carry audio of the rate {samples.rate}; expected Hz")
    return samples.rate


def recordings(samples: Samples) -> list[Signal]:
    """What counts of each recording, B arrays (n,) float32; raises ValueError if the samples have no audio."""
    audio = mono("audio", samples.audio, len(samples))
    return [x[:length].numpy() for x, length in zip(audio, lengths(samples, audio.shape[1]), strict=True)]


def references(samples: Samples) -> list[Signal]:
    """What each recording should have been, B arrays (n,) float32; raises ValueError if the samples do not say."""
    clean = mono("reference_audio", samples.reference_audio, len(samples))
    if samples.audio is not None and samples.audio.shape[-1] != clean.shape[1]:
        have, wanted = clean.shape[1], samples.audio.shape[-1]
        raise ValueError(f"reference_audio has {have} audio samples; expected {wanted}, those of the audio")
    return [x[:length].numpy() for x, length in zip(clean, lengths(samples, clean.shape[1]), strict=True)]


# ---- measures


class Measures(NamedTuple):
    """Several measures of each recording, a reward of named components; asked all at once, so no process waits."""

    names: tuple[Name, ...]
    processes: int
    timeout: float

    def submit(self, samples: Samples) -> Callable[[], dict[str, Tensor]]:
        """Start scoring and return at once; what is returned waits for the scores. With 0 processes it computes now."""
        signals, rate = recordings(samples), audio_rate(samples)
        pairs = list(zip(signals, references(samples), strict=True)) if set(self.names) - {*BLIND} else []
        if rate < 16_000 and "pesq_wide" in self.names:
            raise ValueError(f"the audio has a rate of {rate} Hz; wide-band PESQ expects 16000 or more")
        asked = {name: [(x,) for x in signals] if name in BLIND else pairs for name in self.names}
        if not self.processes:
            answers = {name: [Reply(**measure(name, rate, *row)) for row in rows] for name, rows in asked.items()}
            return lambda: tensors(answers)
        futures = {name: self.ask(name, rate, rows) for name, rows in asked.items()}
        return lambda: tensors(collected(futures))

    def ask(self, name: Name, rate: int, rows: Sequence[tuple[Signal, ...]]) -> list[Future[Reply]]:
        pool, header = shared(WORKER, self.processes, self.timeout), {"measure": name, "rate": rate}
        return [pool.submit(Task(header, [raw(x) for x in row])) for row in rows]

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        return self.submit(samples)()


def raw(x: Signal) -> memoryview:
    """The bytes of a recording, not copied."""
    return x.astype("<f4", copy=False).view(numpy.uint8).data


def collected(futures: Mapping[Name, Sequence[Future[Reply]]]) -> dict[Name, list[Reply]]:
    replies = iter(collect([future for rows in futures.values() for future in rows]))
    return {name: [next(replies) for _ in rows] for name, rows in futures.items()}


def tensors(answers: Mapping[Name, Sequence[Reply]]) -> dict[str, Tensor]:
    """The components as (B,) float32, higher is better; missing answers are NaN and logged."""
    found: dict[str, Tensor] = {}
    for name, replies in answers.items():
        count_problems(name, replies)
        rows = [[torch.nan] * COUNTS[name] if reply.problem else reply.value for reply in replies]
        values = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), COUNTS[name])
        parts = [f"{name}_{part}" for part in POLYNOMIALS] if name == "dnsmos" else [name]
        found |= dict(zip(parts, values.unbind(1), strict=True))
    if "si_sdr" in found:
        found["si_sdr"] = found["si_sdr"].clamp(*RANGE)
    if "log_spectral_distance" in found:
        found["log_spectral_distance"] = -found["log_spectral_distance"]
    return found


def measures(*, names: tuple[Name, ...], processes: int | None = None, timeout: float = 300.0) -> Measures:
    """Several measures side by side, as the rewards below have them one by one; "dnsmos" gives _sig, _bak and _ovr.

    The components share one weight, so this is for measures to watch (weight 0) or a sum of equal parts. Raises
    ValueError if PESQ is asked for and not installed.
    """
    known = list(COUNTS)
    if not names or len({*names}) < len(names) or not {*names} <= {*known}:
        raise ValueError(f"names is {list(names)}; expected some of {', '.join(known)}, each once")
    if any(name.startswith("pesq") for name in names):
        require_pesq()
    processes = default_processes() if processes is None else processes
    if processes < 0 or not timeout > 0:
        raise ValueError(f"processes is {processes} and timeout {timeout} s; expected at least 0 and more than 0")
    return Measures(names, processes, timeout)


def require_pesq() -> None:
    """Raises ValueError if the optional package is not there."""
    try:
        importlib.import_module("pesq")
    except ImportError:
        raise ValueError(
            "PESQ needs the package pesq and a C compiler to install it: pip install mmgrpo[pesq]"
        ) from None


def single(name: Name, processes: int | None, timeout: float) -> SpeechReward:
    reward = measures(names=(name,), processes=processes, timeout=timeout)
    return lambda samples: reward(samples)[name]


def si_sdr(samples: Samples, *, clip: tuple[float, float] = RANGE) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, within `clip`; (B,). A perfect estimate has at most 156.5.

    Source: Le Roux et al. 2019 (arXiv 1811.02508), means removed; the limits are ours, so that no outlier rules a group.
    """
    if not -float("inf") < clip[0] < clip[1] < float("inf"):
        raise ValueError(f"clip is {list(clip)} dB; expected the lowest and the highest, finite, in this order")
    return here("si_sdr", samples).clamp(*clip)


def log_spectral_distance(samples: Samples) -> Tensor:
    """Minus the distance of the short-time power spectra in dB, at most 0; (B,). Source: Gray and Markel 1976."""
    return -here("log_spectral_distance", samples)


def here(name: Name, samples: Samples) -> Tensor:
    """A measure that takes milliseconds, in this process; (B,)."""
    pairs = zip(recordings(samples), references(samples), strict=True)
    replies = [Reply(**measure(name, audio_rate(samples), *pair)) for pair in pairs]
    count_problems(name, replies)
    return torch.tensor([torch.nan if reply.problem else reply.value[0] for reply in replies], dtype=torch.float32)


def stoi(*, extended: bool = False, processes: int | None = None, timeout: float = 300.0) -> SpeechReward:
    """Short-time objective intelligibility, `extended` (ESTOI) or not; (B,), about 0 to 1. NaN below 0.4 s of speech.

    Source: Taal et al. 2011; Jensen and Taal 2016; computed by pystoi.
    """
    return single("estoi" if extended else "stoi", processes, timeout)


def pesq(
    *, band: Literal["wide", "narrow"] = "wide", processes: int | None = None, timeout: float = 300.0
) -> SpeechReward:
    """PESQ as a mean opinion score, wide (P.862.2, 16 kHz, 1.04 to 4.64) or narrow band (P.862.1, 8 kHz, 1.02 to 4.55).

    (B,); other rates are resampled, for the wide band only down. NaN below 0.25 s. Raises ValueError without the package.
    """
    return single("pesq_wide" if band == "wide" else "pesq_narrow", processes, timeout)


def dnsmos(*, part: Part = "ovr", processes: int | None = None, timeout: float = 300.0) -> SpeechReward:
    """DNSMOS P.835 without a reference: `part` is the speech, the background, or overall; (B,), 1 to 5.

    At 16 kHz (resampled), cut to [-1, 1]; NaN below 0.4 s. Alone it is won by clean babble: see `guarded`. Source: Reddy et
    al. 2022 (arXiv 2110.01763), the networks in the package speechmos, whose numbers these are.
    """
    reward = measures(names=("dnsmos",), processes=processes, timeout=timeout)
    return lambda samples: reward(samples)[f"dnsmos_{part}"]


def dnsmos_p808(*, processes: int | None = None, timeout: float = 300.0) -> SpeechReward:
    """DNSMOS P.808, overall quality without a reference; (B,), 1 to 5. Source: Reddy et al. 2021 (arXiv 2010.15258)."""
    return single("dnsmos_p808", processes, timeout)
