"""Measures of speech, in numpy, and the process in which `rewards.speech` has them worked out.

It runs as a file of its own and imports neither torch nor anything of ours, so that it starts fast and can be killed at
any time. A measure takes (estimate, reference, rate): (N,) float64 in [-1, 1] each, and Hz; it returns its numbers, NaN for
a recording that is too short or that the measure cannot judge. N audio samples, T frames, K frequencies, M mel bands.
"""

import importlib
import importlib.util
import json
import math
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pystoi
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.signal import get_window, resample_poly

Signal = NDArray[numpy.float64]
Numbers = tuple[float, ...]
NAN = float("nan")
STEP = 2.0**-15  # of a file of 16 bits: a recording that moves less is silent
LEAST = 0.4  # s of speech that DNSMOS and STOI can judge


def resampled(x: Signal, rate: int, to: int) -> Signal:
    """At another rate, by a polyphase filter (Kaiser window of beta 5); (N,) -> (ceil(N to / rate),)."""
    shared = math.gcd(rate, to)
    return x if rate == to else resample_poly(x, to // shared, rate // shared)


def si_sdr(estimate: Signal, reference: Signal, rate: int) -> Numbers:
    """Scale-invariant signal-to-distortion ratio in dB, both signals without their mean; within 156.5 of 0.

    s_t = (<x, s> / |s|^2) s, 10 log10(|s_t|^2 / |x - s_t|^2). Source: Le Roux et al. 2019 (arXiv 1811.02508), eq. 2.
    """
    x, s = estimate - estimate.mean(), reference - reference.mean()
    target = numpy.sum(x * s) / numpy.sum(s * s) * s
    kept, lost = numpy.sum(target**2), numpy.sum((x - target) ** 2)
    smallest = numpy.finfo(numpy.float64).eps * numpy.sum(x * x)  # a perfect estimate has a finite score
    return (10 * math.log10(max(kept, smallest) / max(lost, smallest)),)


def powers(x: Signal, window: Signal, hop: int) -> Signal:
    """Of each frame that fits into the signal, without padding; (N,) -> (T, K)."""
    return numpy.abs(numpy.fft.rfft(sliding_window_view(x, len(window))[::hop] * window)) ** 2


def log_spectral_distance(estimate: Signal, reference: Signal, rate: int) -> Numbers:
    """Root mean square over frequencies of the difference of the power spectra in dB, averaged over frames; at least 0.

    Frames of 32 ms, Hann, each 8 ms; powers below the reference's largest - 80 dB count as that. Source: the rms log spectral
    measure of Gray and Markel 1976 (Distance measures for speech processing), eq. 5 with p = 2, on short-time spectra.
    """
    size = round(0.032 * rate)
    if len(reference) < size:
        return (NAN,)
    window, hop = get_window("hann", size), round(0.008 * rate)
    clean, found = powers(reference, window, hop), powers(estimate, window, hop)
    floor = 1e-8 * clean.max()
    gap = 10 * numpy.log10(numpy.maximum(clean, floor) / numpy.maximum(found, floor))  # (T, K)
    return (float(numpy.sqrt((gap**2).mean(1)).mean()),)


def stoi(estimate: Signal, reference: Signal, rate: int, *, extended: bool) -> Numbers:
    """Short-time objective intelligibility (Taal et al. 2011), or the extended one (Jensen and Taal 2016); about 0 to 1.

    Computed by pystoi at 10 kHz. NaN: fewer than 30 frames of speech (0.4 s).
    """
    if len(reference) <= rate * (256 + 30 * 128) / 10_000:
        return (NAN,)
    drawn = numpy.random.get_state()
    numpy.random.seed(0)  # the extended measure adds noise of 1e-16: a score must not depend on what was scored before
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # too few frames, for which it would return 1e-5
            return (float(pystoi.stoi(reference, estimate, rate, extended=extended)),)
    except RuntimeWarning:
        return (NAN,)
    finally:
        numpy.random.set_state(drawn)


def pesq(estimate: Signal, reference: Signal, rate: int, *, band: str, at: int) -> Numbers:
    """PESQ as a mean opinion score: P.862.2 of 16 kHz, about 1.04 to 4.64, or P.862.1 of 8 kHz, about 1.02 to 4.55.

    NaN: below a quarter of a second, or no speech found. The package's C code knows 50 utterances and may end the process
    at more.
    """
    package = importlib.import_module("pesq")  # optional: it comes as source alone
    score = package.pesq(at, resampled(reference, rate, at), resampled(estimate, rate, at), band, on_error=1)
    return (float(score) if score > 0 else NAN,)  # its errors are negative


# ---- DNSMOS

AT, WINDOW = 16_000, 144_160  # Hz; samples of one look, 9.01 s
POLYNOMIALS = {  # from the network's number to P.835, the constant last
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovr": (-0.06766283, 1.11546468, 0.04602535),
}


@cache
def session(name: str) -> onnxruntime.InferenceSession:
    """One of the networks that come with the package speechmos, on one thread."""
    found = importlib.util.find_spec("speechmos")
    assert found is not None and found.origin is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(Path(found.origin).parent / "dnsmos_models" / f"{name}.onnx", options)


def looks(x: Signal) -> dict[int, tuple[Signal, int]]:
    """The distinct windows of 9.01 s, one each second, and how often each occurs, by where it starts in the recording.

    A shorter recording is doubled until it is long enough. Its windows repeat wherever its length divides the seconds
    between them: of the seven of a recording of 2 s five are another's copy.
    """
    period, long = len(x), x
    while len(long) < WINDOW:
        long = numpy.append(long, long)
    found: dict[int, tuple[Signal, int]] = {}
    for second in range(int(len(long) // AT - WINDOW / AT) + 1):
        start = second * AT
        if start + WINDOW <= len(long):
            place = start % period if period < WINDOW else start
            found[place] = (long[start : start + WINDOW], found[place][1] + 1 if place in found else 1)
    return found


@cache
def mel_filters() -> Signal:
    """Slaney's triangles of equal area over 161 frequencies; (120, 161)."""
    knee, bend = 15.0, math.log(6.4) / 27  # linear below 1 kHz, 15 mel, logarithmic above
    mel = numpy.linspace(0, knee + math.log(AT / 2 / 1000) / bend, 122)
    hz = numpy.where(mel < knee, mel * 200 / 3, 1000 * numpy.exp(bend * (mel - knee)))
    width, away = numpy.diff(hz), hz[:, None] - numpy.fft.rfftfreq(321, 1 / AT)
    rising, falling = -away[:-2] / width[:-1, None], away[2:] / width[1:, None]
    return numpy.maximum(0, numpy.minimum(rising, falling)) * (2 / (hz[2:] - hz[:-2]))[:, None]


def mel_spectrogram(x: Signal) -> Signal:
    """In dB below the largest, from -80 to 0 scaled to -1 to 1; (144000,) -> (900, 120)."""
    power = powers(numpy.pad(x, 160), get_window("hann", 321), 160) @ mel_filters().T
    level = 10 * numpy.log10(numpy.maximum(power, 1e-10) / max(power.max(), 1e-10))
    return (numpy.maximum(level, -80) + 40) / 40


def averaged(judge: Callable[[Signal], Numbers], estimate: Signal, rate: int) -> Numbers:
    """Means over the windows of 9.01 s of the recording at 16 kHz, cut to [-1, 1]."""
    windows = looks(resampled(estimate, rate, AT).clip(-1, 1)).values()
    means = numpy.average([judge(x) for x, _ in windows], axis=0, weights=[count for _, count in windows])
    return tuple(float(mean) for mean in means)


def dnsmos(estimate: Signal, reference: Signal, rate: int) -> Numbers:
    """DNSMOS P.835: quality of the speech, of the background, and overall; (sig, bak, ovr), 1 to 5 each.

    At 16 kHz; the reference is not looked at. NaN below 0.4 s. Source: Reddy et al. 2022 (arXiv 2110.01763), with the networks and
    polynomials of the package speechmos.
    """

    def judge(x: Signal) -> Numbers:
        raw = session("sig_bak_ovr").run(None, {"input_1": x.astype(numpy.float32)[None]})[0][0]
        return tuple(float(numpy.polyval(line, one)) for line, one in zip(POLYNOMIALS.values(), raw, strict=True))

    return averaged(judge, estimate, rate) if len(estimate) >= LEAST * rate else (NAN,) * 3


def dnsmos_p808(estimate: Signal, reference: Signal, rate: int) -> Numbers:
    """DNSMOS P.808: overall quality, 1 to 5; otherwise as `dnsmos`. Source: Reddy et al. 2021 (arXiv 2010.15258)."""

    def judge(x: Signal) -> Numbers:
        mel = mel_spectrogram(x[:-160]).astype(numpy.float32)
        return (float(session("model_v8").run(None, {"input_1": mel[None]})[0][0][0]),)

    return averaged(judge, estimate, rate) if len(estimate) >= LEAST * rate else (NAN,)


# ---- one question

MEASURES: Mapping[str, Callable[[Signal, Signal, int], Numbers]] = {
    "si_sdr": si_sdr,
    "log_spectral_distance": log_spectral_distance,
    "stoi": partial(stoi, extended=False),
    "estoi": partial(stoi, extended=True),
    "pesq_wide": partial(pesq, band="wb", at=16_000),
    "pesq_narrow": partial(pesq, band="nb", at=8_000),
    "dnsmos": dnsmos,
    "dnsmos_p808": dnsmos_p808,
}
COUNTS = {name: len(POLYNOMIALS) if name == "dnsmos" else 1 for name in MEASURES}  # numbers of each


def silent(x: Signal) -> bool:
    """Whether a file of 16 bits would hold one value throughout, or nothing; also where a value is not finite."""
    return not len(x) or not numpy.isfinite(x).all() or x.max() - x.min() < STEP


def measure(name: str, rate: int, *signals: NDArray[numpy.float32]) -> dict[str, Any]:
    """A measure's numbers of (estimate,) or (estimate, reference) as `value`, or as `problem` the error it ended with."""
    exact = [x.astype(numpy.float64) for x in signals]
    if any(silent(x) for x in exact):
        return {"value": [NAN] * COUNTS[name]}
    try:
        return {"value": list(MEASURES[name](exact[0], exact[-1], rate))}
    except Exception as error:  # of a library; one recording must not end a run
        return {"problem": f"{type(error).__name__}: {error}"}


def serve() -> None:
    """Answer until the input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    print("ready", file=replies, flush=True)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signals = [numpy.frombuffer(sys.stdin.buffer.read(size), "<f4") for size in asked["sizes"]]
        print(json.dumps(measure(asked["measure"], asked["rate"], *signals)), file=replies, flush=True)


if __name__ == "__main__":
    serve()
