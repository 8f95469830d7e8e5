"""One GRPO step of a speech enhancer: seconds of rollout, scoring and update, by the length of the recordings, and its memory.

Recordings are harmonic tones of changing pitch and loudness in white noise, P prompts with G enhanced ones each. The step is
the trainer's own iteration: rollout, score, compare, replay, backward, clip, AdamW. Its seconds are those of the clock, since
scores are computed in other processes, and the median over the rounds. Memory is the most that a step at
`--memory-seconds` takes above the level right before it, by the allocator's events in torch's profiler.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import soundfile
import torch

from mmgrpo import recipe, trainer
from mmgrpo.advantages import gdpo
from mmgrpo.aggregations import seq_mean
from mmgrpo.improve import Loss
from mmgrpo.journal import peak_memory
from mmgrpo.objectives import clipped
from mmgrpo.run import Run
from mmgrpo.schedules import random_subset
from mmgrpo.shadow import Reference
from mmgrpo.transitions import flow_sde
from mmgrpo.types import Prompt
from pipelines import speech_models
from pipelines.recordings import Mixing
from pipelines.speech import SpeechPolicy
from pipelines.speech_steps import Options
from rewards import speech

from .update_memory import peak_on_cpu

RATE, SNR = 16_000, 5.0  # Hz, dB
PROMPTS = 2
SMALLEST: Mapping[str, Mapping[str, object]] = {
    "band_gains": {"width": 16, "blocks": 2},
    "unet": {"widths": (8, 16)},
    "transformer": {"width": 16, "blocks": 1, "heads": 2},
}


def recording(seconds: float, seed: int) -> torch.Tensor:
    """Something that moves like a voice, (N,): twenty harmonics, syllables of a quarter of a second, pauses."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(round(seconds * RATE)) / RATE
    pitch = 120 + 40 * torch.sin(2 * torch.pi * 0.7 * t + seed)
    phase = 2 * torch.pi * (pitch / RATE).cumsum(0)
    voice = torch.stack([torch.sin(k * phase) / k for k in range(1, 21)]).sum(0)
    loud = torch.rand(int(4 * seconds) + 2, generator=generator).repeat_interleave(RATE // 4)[: len(t)]
    return 0.2 * voice * loud


def prompts(folder: Path, seconds: float) -> list[Prompt]:
    """Clean and noisy files, P prompts."""
    found = []
    for number in range(PROMPTS):
        clean = recording(seconds, number)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(100 + number))
        noise *= clean.square().mean().sqrt() * 10 ** (-SNR / 20)
        files = {"clean": folder / f"{seconds:g}_{number}.wav", "noisy": folder / f"{seconds:g}_{number}_noisy.wav"}
        for name, wave in (("clean", clean), ("noisy", clean + noise)):
            soundfile.write(files[name], wave.numpy().astype(numpy.float32), RATE, subtype="FLOAT")
        found.append(Prompt(number, "", media={name: (path,) for name, path in files.items()}))
    return found


def started(model: speech_models.Model, asked: argparse.Namespace, heard: list[Prompt]) -> Run:
    """A run of the trainer that is scored by the measures asked for."""
    rows = asked.group_size * PROMPTS
    options = Options(asked.steps, flow_sde, rollout_rows=rows, replay_rows=asked.rows)
    policy = SpeechPolicy(model, options, lambda steps, now, seed: random_subset(steps, now, seed, count=asked.trained),
                          Mixing(RATE))  # fmt: skip
    policy.prepare(heard)
    settings = recipe.Recipe(
        seed=0, policy={}, prompts=recipe.Prompts(""), rewards=(recipe.Reward("measured", {}),), advantage={}, objective={},
        loss=recipe.Loss(), reference=recipe.Reference(), ema=recipe.Ema(), optimizer=recipe.Optimizer(1e-6),
        train=recipe.Train(iterations=1, prompts=PROMPTS, group_size=asked.group_size), evaluation=recipe.Evaluation(""),
    )  # fmt: skip
    trained = policy.trainable()
    return Run(
        recipe=settings, policy=policy, prompts=heard, held_out=[],
        rewards={"measured": speech.measures(names=tuple(asked.measures), processes=asked.processes)}, compare=gdpo,
        loss=Loss(clipped), aggregate=seq_mean, reference=Reference("none", trained), average=None,
        optimizer=torch.optim.AdamW(trained.values(), 1e-6, fused=True),
    )  # fmt: skip


def split(run: Run, rounds: int) -> dict[str, float]:
    """Seconds of each part of a step; the first step chooses kernels and starts processes, and is not counted."""
    seen = []
    for _ in range(rounds + 1):
        seen.append(trainer.iteration(run))
        run.iteration += 1
    return {
        part: statistics.median(one[f"seconds/{part}"] for one in seen[1:]) for part in ("rollout", "score", "update")
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("smallest", "shipped"), default="shipped")
    parser.add_argument("--network", choices=tuple(SMALLEST), default="band_gains")
    parser.add_argument("--seconds", type=float, nargs="+", default=[2.0, 10.0])
    parser.add_argument("--memory-seconds", type=float, default=30.0)
    parser.add_argument("--measures", nargs="+", default=["si_sdr", "pesq_wide", "stoi"])
    parser.add_argument("--processes", type=int, default=2, help="that score; 0: this one")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="recordings whose graphs are held at once")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--trained", type=int, default=4, help="of the steps")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(argv)
    torch.manual_seed(0)
    options = SMALLEST[asked.network] if asked.size == "smallest" else {}
    latent = "band_gains" if asked.network == "band_gains" else "complex_spectrogram"
    model = speech_models.create({"network": {"kind": asked.network, **options}, "representation": {"kind": latent}})
    with tempfile.TemporaryDirectory() as name:
        runs = {seconds: started(model, asked, prompts(Path(name), seconds)) for seconds in asked.seconds}
        parts = {f"{seconds:g}": split(run, asked.rounds) for seconds, run in runs.items()}
        longest = started(model, asked, prompts(Path(name), asked.memory_seconds))
        peak = peak_on_cpu(lambda: trainer.iteration(longest))
    count = sum(parameter.numel() for parameter in model.network.parameters())
    about = {
        "benchmark": "speech_step", "device": f"cpu, {torch.get_num_threads()} threads", "dtype": "float32",
        "network": asked.network, "parameters": count, "trained_parameters": count, "rows": asked.rows,
        "samples": PROMPTS * asked.group_size, "steps": asked.steps, "trained_steps": asked.trained,
        "measures": asked.measures, "processes": asked.processes,
    }  # fmt: skip
    memory = {"memory_seconds": asked.memory_seconds, "step_peak_bytes": peak}
    print(json.dumps(about | {"seconds_by_length": parts} | memory | peak_memory()))


if __name__ == "__main__":
    main()
