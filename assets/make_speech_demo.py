"""Make the recordings of the speech demo: sentences spoken by espeak-ng, and noises drawn by numpy.

    apt-get install -y espeak-ng   # needed here alone: what it says is shipped as FLAC
    python assets/make_speech_demo.py

writes assets/speech_demo/{alignment,validation,held_out} and a JSONL file for each. Four parts share no voice, no sentence
and no draw of a noise: `base` (spoken anew by train_speech_demo.py, not shipped), `alignment`, `validation`, `held_out`.
Axes: N samples at 16 kHz.
"""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # runs from a plain checkout

from assets.speech_noises import COMMON, RATE, Wave, draw, unit
from mmgrpo.seeds import derive

FOLDER = HERE / "speech_demo"
LEVEL, STEP = (
    0.03,
    2**-11,
)  # root mean square of every clean recording, and what all samples are multiples of: small files
QUIET, MARGIN = 0.01, RATE // 20  # share of the peak below which ends are cut, samples kept at either end
GRID = RATE // 5  # samples; lengths are multiples, so that recordings can be put into batches
DECIBELS = (0.0, 10.0)  # of the clean recording over the noise
ALIGNMENT_SAMPLES = 9 * RATE // 5  # of every recording for alignment; what is longer is left out
NOISE_FILES, NOISE_SAMPLES = 2, 5 * RATE // 2  # of each kind for alignment, and their length
BASE_VOICES = 8  # that say each sentence of the base

# Variants of espeak-ng's voices: no part shares one with another. Two accents are heard in held_out alone.
VARIANTS = {
    "base": (
        "m1 m3 m4 m5 m7 f1 f3 f4 Alex Annie Mario Michael Mike Lee adam boris edward grandma john linda norbert pablo rob "
        "sandro shelby travis zac Gene"
    ),
    "alignment": "m2 f2 Denis aunty robert belinda miguel max",
    "validation": "m6 f5 Andy quincy victor michel",
    "held_out": "m8 Alicia Diogo Andrea grandpa david gustave paul steph pedro",
}
ACCENTS = {
    "base": "en-us en-gb-x-rp en-gb-scotland en-029 en-us-nyc",
    "alignment": "en-us en-gb-x-rp en-gb-scotland",
    "validation": "en-us en-gb-x-rp en-us-nyc",
    "held_out": "en-us en-gb-x-gbclan en-gb-x-gbcwmd",
}
NOISES = {
    "base": COMMON,
    "alignment": COMMON,
    "validation": (*COMMON, "wind"),
    "held_out": (*COMMON, "engine", "vacuum"),
}


@dataclass(frozen=True)
class Voice:
    """A speaker."""

    name: str  # accent+variant, as espeak-ng writes it
    pitch: int  # 0 to 99
    speed: int  # words a minute

    def says(self, sentence: str) -> Wave:
        """The sentence, its silent ends cut, at level 1, with zeros up to a multiple of GRID; -> (N,)."""
        command = ["espeak-ng", "-v", self.name, "-p", str(self.pitch), "-s", str(self.speed), "--stdout", sentence]
        spoken, rate = soundfile.read(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))
        wave = resample(torch.from_numpy(spoken).float(), rate, RATE).numpy()
        loud = np.flatnonzero(np.abs(wave) > QUIET * np.abs(wave).max())
        wave = unit(wave[max(0, loud[0] - MARGIN) : loud[-1] + MARGIN])
        return np.pad(wave, (0, -len(wave) % GRID))


def voices(part: str) -> list[Voice]:
    """The speakers of a part: each variant with an accent, a pitch and a speed of its own."""
    random, accents = np.random.default_rng(derive("voices", part)), ACCENTS[part].split()
    return [
        Voice(f"{accents[row % len(accents)]}+{variant}", int(random.integers(30, 71)), int(random.integers(160, 196)))
        for row, variant in enumerate(VARIANTS[part].split())
    ]


def sentences(part: str) -> list[str]:
    blocks = (HERE / "speech_sentences.txt").read_text(encoding="utf-8").split("# ")
    return {name: lines for name, *lines in (block.strip().splitlines() for block in blocks if block)}[part]


def spoken(part: str) -> Iterator[tuple[str, Voice, Wave]]:
    """Every sentence of a part, by one voice after another; a sentence of the base by several."""
    speakers, random = voices(part), np.random.default_rng(derive("speakers", part))
    for row, sentence in enumerate(sentences(part)):
        several = random.choice(len(speakers), BASE_VOICES, replace=False) if part == "base" else [row % len(speakers)]
        for number in several:
            yield sentence, speakers[number], speakers[number].says(sentence)


def mixed(clean: Wave, noise: Wave, decibels: float) -> Wave:
    """The clean recording with a noise so many decibels below it; (N,), (N,) -> (N,)."""
    gain = np.sqrt(np.mean(clean**2) / np.mean(noise**2)) * 10 ** (-decibels / 20)
    return clean + gain * noise


def write(path: Path, wave: Wave) -> str:
    """A 16-bit FLAC file whose last bits are 0; -> its path relative to the prompts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.round(wave / STEP) * STEP, RATE, subtype="PCM_16", compression_level=1.0)
    return str(path.relative_to(FOLDER))


def write_rows(part: str, rows: Sequence[dict[str, object]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (FOLDER / f"{part}.jsonl").write_text(text, encoding="utf-8")


def make_alignment() -> None:
    """Clean recordings of one length, and noises to mix them with."""
    said = [each for each in spoken("alignment") if len(each[2]) <= ALIGNMENT_SAMPLES]
    rows = []
    for number, (sentence, voice, wave) in enumerate(said):
        whole = np.pad(wave, (0, ALIGNMENT_SAMPLES - len(wave)))
        path = write(FOLDER / "alignment" / "clean" / f"{number:02d}.flac", LEVEL * whole)
        rows.append({"prompt": sentence, "clean": path, "voice": voice.name})
    write_rows("alignment", rows)
    for kind in NOISES["alignment"]:
        for number in range(NOISE_FILES):
            random = np.random.default_rng(derive("noise", "alignment", kind, number))
            noise = draw(kind, random, NOISE_SAMPLES, [wave for *_, wave in said])
            write(FOLDER / "alignment" / "noise" / f"{kind}_{number}.flac", LEVEL * noise)


def make_pairs(part: str) -> None:
    """Clean recordings, and each with a noise of its own draw at its own level."""
    said, kinds, rows = list(spoken(part)), NOISES[part], []
    for number, (sentence, voice, wave) in enumerate(said):
        random, kind = np.random.default_rng(derive("noise", part, number)), kinds[number % len(kinds)]
        others = [other for _, speaker, other in said if speaker != voice]
        decibels = round(float(random.uniform(*DECIBELS)), 1)
        noisy = mixed(wave, draw(kind, random, len(wave), others), decibels)
        paths = {
            name: write(FOLDER / part / name / f"{number:02d}.flac", LEVEL * recording)
            for name, recording in (("clean", wave), ("noisy", noisy))
        }
        rows.append({"prompt": sentence, **paths, "voice": voice.name, "noise": kind, "snr": decibels})
    write_rows(part, rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    make_alignment()
    for part in ("validation", "held_out"):
        make_pairs(part)
    for part in ("alignment", "validation", "held_out"):
        sizes = [path.stat().st_size for path in (FOLDER / part).rglob("*.flac")]
        print(part, len(sizes), "files", f"{sum(sizes) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
