"""What is wrong with the recordings of a run, all of it at once and before training."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import soundfile

from mmgrpo.types import Prompt
from pipelines.recordings import SILENCE, Mixing

SHOWN_PROBLEMS = 20
FULL_SCALE = 0.9999  # of a sample that was cut off: 16-bit audio ends at 0.99997
READERS = 4  # threads


def check(prompts: Sequence[Prompt], mixing: Mixing, clipped: float) -> None:
    """Read every recording that the prompts and the mixing name; raises one ValueError that lists every problem.

    Unreadable, empty or silent files, NaN, a rate that is not converted, more than the share `clipped` of the samples at
    full scale (not in noisy recordings and rooms: a defect of the former may be what is to be mended), a noisy recording as
    long as no clean one, prompts without recordings.
    """
    named = [line for prompt in prompts for line in prompt_flaws(prompt, mixing)]
    clean, noisy = (
        sorted({path for one in prompts for path in one.media.get(name, ())}) for name in ("clean", "noisy")
    )
    limits = {path: 1.0 for path in (*noisy, *mixing.rooms)} | {path: clipped for path in (*clean, *mixing.noises)}
    with ThreadPoolExecutor(READERS) as pool:
        flaws = pool.map(lambda path: file_flaws(path, limits[path], mixing), limits)
        named += [f"{path}: {flaw}" for path, found in zip(limits, flaws, strict=True) for flaw in found]
    if not named:
        named = [line for prompt in prompts for line in length_flaws(prompt)]
    if named:
        more = [f"and {len(named) - SHOWN_PROBLEMS} more"] if len(named) > SHOWN_PROBLEMS else []
        lines = [f"the recordings cannot be used, problems: {len(named)}", *named[:SHOWN_PROBLEMS], *more]
        raise ValueError("\n  ".join(lines))


def prompt_flaws(prompt: Prompt, mixing: Mixing) -> Iterator[str]:
    """Whether the prompt names one clean recording, and at most one noisy one; none is needed with noise to mix."""
    counts = {name: len(prompt.media.get(name, ())) for name in ("clean", "noisy")}
    if counts["clean"] != 1:
        yield f"prompt {prompt.id} has {counts['clean']} clean recordings; expected one, as prompts.media.clean names"
    if counts["noisy"] > 1:
        yield f"prompt {prompt.id} has {counts['noisy']} noisy recordings; expected one"
    if not counts["noisy"] and mixing.noise is None:
        yield f"prompt {prompt.id} has no noisy recording; expected prompts.media.noisy, or a folder in policy.noise"


def file_flaws(path: Path, clipped: float, mixing: Mixing) -> list[str]:
    """What is wrong with one file."""
    try:
        values, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (N, channels)
    except (soundfile.LibsndfileError, OSError) as error:
        return [f"is no readable recording ({str(error).rstrip('.')})"]
    if len(values) == 0:
        return ["holds no samples"]
    flaws = []
    if rate != mixing.rate and not mixing.resample:
        flaws.append(f"has a rate of {rate} Hz; expected {mixing.rate}, or policy.resample = true")
    unsound = int((~numpy.isfinite(values)).any(1).sum())
    if unsound:
        return [*flaws, f"holds NaN or infinity at {unsound} of {len(values)} samples"]
    peak, share = float(abs(values.mean(1)).max()), float((abs(values) >= FULL_SCALE).mean())
    if peak < SILENCE:
        flaws.append(f"is silent: its peak is {peak:.1e}")
    if share > clipped:
        flaws.append(f"is clipped: {share:.1%} of its samples are at full scale; expected at most {clipped:.1%}")
    return flaws


def length_flaws(prompt: Prompt) -> Iterator[str]:
    """Whether a noisy recording lasts as long as its clean one; both are sound by themselves."""
    [clean], noisy = prompt.media["clean"], prompt.media.get("noisy", ())
    for path in noisy:
        ours, theirs = (soundfile.info(file) for file in (path, clean))
        if ours.frames * theirs.samplerate != theirs.frames * ours.samplerate:
            lasts = f"{ours.frames} samples at {ours.samplerate} Hz"
            yield f"{path}: lasts {lasts}; expected {theirs.frames} at {theirs.samplerate} Hz as in {clean}"
