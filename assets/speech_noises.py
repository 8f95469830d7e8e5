"""Noises of the speech demo, drawn by numpy: nothing recorded, every draw its own.

Axes: N samples at 16 kHz. Every noise is float32 with mean square 1.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.signal import butter, lfilter, sosfilt

Wave = NDArray[np.float32]
RATE = 16000  # Hz


def unit(wave: NDArray[np.floating]) -> Wave:
    """Without mean, and with mean square 1; (N,) -> (N,)."""
    centred = wave - wave.mean()
    return (centred / np.sqrt(np.mean(centred**2))).astype(np.float32)


def coloured(random: Generator, samples: int, slope: float) -> Wave:
    """Gaussian noise whose power falls with frequency ** -slope above 40 Hz, with nothing below 20 Hz; -> (N,)."""
    hertz = np.fft.rfftfreq(samples, 1 / RATE)
    spectrum = np.fft.rfft(random.standard_normal(samples)) * np.maximum(hertz, 40) ** (-slope / 2)
    return unit(np.fft.irfft(spectrum * (hertz > 20), samples))


def band(random: Generator, samples: int, low: float, high: float) -> Wave:
    """Gaussian noise between two frequencies in Hz; -> (N,)."""
    sections = butter(2, [low, high], "bandpass", fs=RATE, output="sos")
    return unit(sosfilt(sections, random.standard_normal(samples)))


def slow(random: Generator, samples: int, hertz: float, depth: float) -> Wave:
    """A positive envelope that changes `hertz` times a second, exp(depth * N(0, 1)) at its knots; -> (N,)."""
    knots = random.standard_normal(int(samples / RATE * hertz) + 3) * depth
    at = np.arange(samples) / RATE * hertz + random.random()
    return np.exp(np.interp(at, np.arange(len(knots)), knots)).astype(np.float32)


def white(random: Generator, samples: int) -> Wave:
    return coloured(random, samples, random.uniform(0.0, 0.3))


def pink(random: Generator, samples: int) -> Wave:
    return coloured(random, samples, random.uniform(0.8, 1.2))


def brown(random: Generator, samples: int) -> Wave:
    return coloured(random, samples, random.uniform(1.7, 2.2))


def hum(random: Generator, samples: int) -> Wave:
    """Mains at 50 or 60 Hz with 30 harmonics, over faint noise."""
    turns = np.arange(samples) / RATE * random.choice([50.0, 60.0]) * random.uniform(0.99, 1.01)
    order = np.arange(1, 31)
    heights = order ** -random.uniform(0.6, 1.2) * np.exp(random.standard_normal(30) * 0.7)
    phases = random.random(30)
    tones = (heights[:, None] * np.sin(2 * np.pi * (order[:, None] * turns + phases[:, None]))).sum(0)
    return unit(unit(tones) + 0.2 * coloured(random, samples, 1.0))


def clatter(random: Generator, samples: int) -> Wave:
    """Some 6 to 14 blows a second, each ringing at a few frequencies of its own, over faint noise."""
    wave, ring = np.zeros(samples), np.arange(RATE // 5) / RATE
    for start in random.integers(0, samples, int(samples / RATE * random.uniform(6, 14))):
        tones = random.uniform(400, 6000, 4)[:, None]
        blow = (np.sin(2 * np.pi * tones * ring + random.uniform(0, 6, (4, 1)))).sum(0) + random.standard_normal(
            len(ring)
        )
        blow *= np.exp(-ring * random.uniform(25, 90)) * random.uniform(0.3, 1.0)
        wave[start : start + len(ring)] += blow[: samples - start]
    return unit(unit(wave) + 0.15 * white(random, samples))


def rain(random: Generator, samples: int) -> Wave:
    """A hiss above some 1 kHz with many single drops."""
    hiss = band(random, samples, random.uniform(700, 1500), 7500) * slow(random, samples, 3, 0.15)
    drops = random.standard_normal(samples) * (random.random(samples) < random.uniform(0.002, 0.006))
    pole = random.uniform(0.7, 0.9)
    return unit(hiss + 0.8 * unit(lfilter([1 - pole], [1, -pole], drops)))


def wind(random: Generator, samples: int) -> Wave:
    """Gusts of low noise, and a whistle that comes with them."""
    gusts, whistle = slow(random, samples, 2, 0.7), random.uniform(400, 900)
    return unit(coloured(random, samples, 2.0) * gusts + 0.2 * band(random, samples, whistle, whistle * 1.2) * gusts**2)


def engine(random: Generator, samples: int) -> Wave:
    """Firings at 25 to 60 Hz of unequal strength through three resonances, over low noise."""
    speed = random.uniform(25, 60) * slow(random, samples, 4, 0.05)
    turns = np.floor(np.cumsum(speed) / RATE).astype(int)
    fired = np.diff(turns, prepend=0) > 0
    wave = fired * np.exp(random.standard_normal(samples) * 0.4)
    total = np.zeros(samples)
    for centre in (random.uniform(80, 150), random.uniform(250, 600), random.uniform(900, 2200)):
        total += unit(sosfilt(butter(1, [centre * 0.8, centre * 1.25], "bandpass", fs=RATE, output="sos"), wave))
    return unit(total + coloured(random, samples, 1.5))


def vacuum(random: Generator, samples: int) -> Wave:
    """A motor's whine with harmonics, beside rushing air."""
    turns = np.cumsum(random.uniform(180, 420) * slow(random, samples, 3, 0.02)) / RATE
    whine = sum(np.sin(2 * np.pi * (order * turns + random.random())) / order**0.7 for order in range(1, 12))
    return unit(
        unit(np.asarray(whine)) * 0.7 + band(random, samples, random.uniform(200, 500), random.uniform(3500, 6000))
    )


def babble(random: Generator, samples: int, voices: Sequence[Wave]) -> Wave:
    """Six of the given utterances at once, each repeated from a start of its own; -> (N,)."""
    chosen = random.choice(len(voices), 6, replace=False)
    starts = [random.integers(0, len(voices[number])) for number in chosen]
    looped = [np.resize(np.roll(voices[number], -start), samples) for number, start in zip(chosen, starts, strict=True)]
    return unit(sum(unit(wave) for wave in looped))  # type: ignore[arg-type]


KINDS: Mapping[str, Callable[[Generator, int], Wave]] = {
    "white": white, "pink": pink, "brown": brown, "hum": hum, "clatter": clatter, "rain": rain,
    "wind": wind, "engine": engine, "vacuum": vacuum,
}  # fmt: skip
COMMON = ("white", "pink", "brown", "hum", "clatter", "rain", "babble")  # in every part, each with draws of its own


def draw(kind: str, random: Generator, samples: int, voices: Sequence[Wave]) -> Wave:
    """One noise; `voices` are what babble is made of; -> (N,)."""
    return babble(random, samples, voices) if kind == "babble" else KINDS[kind](random, samples)
