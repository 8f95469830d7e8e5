"""The speech demo: a tiny enhancer learns on a CPU to remove noise so that it sounds better, with the trainer of large ones.

Writes sound files and spectrograms of held-out recordings before and after, changes.png, curve.png, summary.json and the
aligned weights beside the run's own files.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from mmgrpo import journal, moved
from mmgrpo.evaluation import held_out_samples
from mmgrpo.moved import Moved
from mmgrpo.scoring import score
from mmgrpo.types import Samples
from pipelines import assets, demos, pictures, sound_pictures
from pipelines.demos import points
from pipelines.recordings import read

SHOWN = 4  # held-out recordings that are drawn and written as sound files
NEEDS = {"pesq": "pesq"}  # reward -> the package without which it is left out


def run(folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Align, measure the held-out recordings before and after, and write what a person would look at and listen to."""
    torch.set_num_threads(1)  # for so small a network; the other cores measure
    shipped = assets.folder("speech_demo")
    places = {
        "policy.model": shipped / "base",
        "policy.noise": shipped / "alignment" / "noise",
        "prompts.source": shipped / "alignment.jsonl",
        "evaluation.source": shipped / "held_out.jsonl",
    }
    missing = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    training = demos.started("demo_speech", seed, places, overrides, without=missing)
    for name in missing:
        print(f"{name.upper()} is left out: it needs a C compiler and `pip install {NEEDS[name]}`")
    before = held_out_samples(training.policy, training.held_out[:SHOWN], 1, seed)
    took = demos.align(training, folder)
    with training.averaged():
        after = held_out_samples(training.policy, training.held_out, 1, seed)
    given = score(training.rewards | training.watched, training.weights, unprocessed(after)).rewards
    reached = {name: values for name, values in moved.kept(folder, moved.NOW).items() if name in given}
    changes = moved.compared(moved.kept(folder), reached, training.weights)
    found, rate = kinds(before, after), before.rate
    assert rate is not None
    write_sounds(folder / "sounds", found, rate)
    titles = [f"{prompt.columns['noise']}, {prompt.columns['snr']} dB" for prompt in before.prompts]
    sound_pictures.spectrograms(found, titles, rate).save(folder / "spectrograms.png")
    sound_pictures.changes(changes).save(folder / "changes.png")
    draw_curve(folder, changes)
    table = {one.name: {"noisy": float(given[one.name].nanmean()), **demos.told(one)} for one in changes}
    facts = {"seed": seed, "stage": training.recipe.train.stage, "iterations": training.iteration}
    further = {"held_out_recordings": len(after), "left_out": missing}
    shown = {"spectrograms": "spectrograms.png", "changes": "changes.png", "curve": "curve.png", "sounds": "sounds"}
    demos.conclude(folder, {"held_out": table} | took | facts | further, shown)


def unprocessed(samples: Samples) -> Samples:
    """The same recordings as they were heard, noise and all."""
    assert samples.audio is not None and samples.rate is not None
    audio = torch.zeros_like(samples.audio)
    for row, prompt in enumerate(samples.prompts):
        wave = read(prompt.media["noisy"][0], samples.rate)
        audio[row, 0, : len(wave)] = wave
    return replace(samples, audio=audio)


def kinds(before: Samples, after: Samples) -> dict[str, list[Tensor]]:
    """What is drawn and written of each recording, by name; (N,) each."""
    rows = torch.arange(len(before))
    noisy, after = unprocessed(before), after.take(rows)
    both = {"noisy": noisy.audio, "before": before.audio, "after": after.audio, "clean": before.reference_audio}
    assert before.audio_length is not None
    lengths = before.audio_length.tolist()
    return {
        name: [wave[0, :length] for wave, length in zip(audio, lengths, strict=True)]
        for name, audio in both.items()
        if audio is not None
    }


def write_sounds(folder: Path, found: Mapping[str, Sequence[Tensor]], rate: int) -> None:
    """A WAV file of each, 16 bits, as loud as they are."""
    folder.mkdir(exist_ok=True)
    for name, waves in found.items():
        for row, wave in enumerate(waves):
            soundfile.write(folder / f"{row:02d}_{name}.wav", wave.clamp(-1, 1).numpy(), rate, subtype="PCM_16")


def draw_curve(folder: Path, changes: Sequence[Moved]) -> None:
    """Every held-out score against iterations done; that of the rollouts beside it if it was trained on."""
    lines = journal.read(folder)
    panels = {}
    for one in changes:
        held = {"held out": points(lines, f"held_out/{one.name}", one.before)}
        panels[one.name] = ({"rollouts": points(lines, f"reward/{one.name}/mean")} if one.trained else {}) | held
    pictures.curve(panels).save(folder / "curve.png")
