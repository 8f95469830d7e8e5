"""Train the start of the speech demo: a small flow over band gains, on mixtures of synthesised speech and drawn noises.

    apt-get install -y espeak-ng
    pip install mmgrpo[pesq]
    OMP_NUM_THREADS=1 python assets/train_speech_demo.py

writes assets/speech_demo/base and prints what it does to the validation pairs. Axes: B recordings, N samples at 16 kHz,
C channels, K bands, T frames.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # runs from a plain checkout

from assets.make_speech_demo import FOLDER, LEVEL, NOISES, spoken
from assets.speech_noises import RATE, draw
from assets.train_image_demo import exchange
from mmgrpo.data import load_prompts, requests
from mmgrpo.schedules import all_but_last
from mmgrpo.seeds import derive
from mmgrpo.transitions import flow_sde
from mmgrpo.types import Prompt, Samples
from pipelines import speech_flow, speech_models
from pipelines.recordings import hear
from pipelines.speech import SpeechPolicy, load
from pipelines.speech_models import Model
from pipelines.speech_networks import BandGainNetwork
from pipelines.speech_representations import BandGains
from rewards.speech import Name, measures

MEASURED: tuple[Name, ...] = ("si_sdr", "pesq_wide", "stoi", "dnsmos_p808")
BATCH, CROP = 8, 8 * RATE // 5  # recordings a step, their length
RATE_OF_LEARNING, WARM, DECAY = 1.5e-3, 100, 0.999  # at first, steps to reach it, EMA
DECIBELS = (-2.0, 12.0)  # wider than those of the demo, whose ends are then no ends of the training
SCHEDULES = ((3, 2.0), (3, 1.0), (6, 1.0), (10, 1.0))  # steps and the power of their times; the first is the demo's
NOISE = 0.15  # of the SDE, as in the demo
NOISE_DRAWS, NOISE_SECONDS = 40, 4  # of each kind


@dataclass(frozen=True)
class Bank:
    """What mixtures are made of."""

    speech: list[Tensor]  # (N,) each
    noises: Tensor  # (draws, N)


def bank(seed: int) -> Bank:
    """Every sentence of the base by several voices, and many draws of each of its noises."""
    speech = [wave for *_, wave in spoken("base")]
    random = np.random.default_rng(derive(seed, "bank"))
    noises = [draw(kind, random, NOISE_SECONDS * RATE, speech) for kind in NOISES["base"] for _ in range(NOISE_DRAWS)]
    return Bank([torch.from_numpy(wave) for wave in speech], torch.from_numpy(np.stack(noises)))


def window(wave: Tensor, samples: int, random: np.random.Generator) -> Tensor:
    """A part of a long recording, or a short one somewhere among zeros; (N,) -> (samples,)."""
    spare = samples - len(wave)
    if spare < 0:
        start = int(random.integers(0, -spare + 1))
        return wave[start : start + samples]
    before = int(random.integers(0, spare + 1))
    return nn.functional.pad(wave, (before, spare - before))


def mixtures(given: Bank, random: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Clean and noisy recordings, (B, N) each."""
    while True:
        clean = torch.stack(
            [window(given.speech[row], CROP, random) for row in random.integers(0, len(given.speech), BATCH)]
        )
        noise = torch.stack(
            [window(given.noises[row], CROP, random) for row in random.integers(0, len(given.noises), BATCH)]
        )
        decibels = torch.from_numpy(random.uniform(*DECIBELS, (BATCH, 1))).float()
        power = clean.square().mean(1, keepdim=True) / noise.square().mean(1, keepdim=True).clamp_min(1e-6)
        yield LEVEL * clean, LEVEL * (clean + noise * power.sqrt() * 10 ** (-decibels / 20))


def train(
    model: Model, given: Bank, steps: int, peak: float, seed: int, report: Callable[[int], None], every: int
) -> None:
    """AdamW with a warm-up and a half cosine to 0; every `every` steps `report` sees the averaged weights, which stay at the end."""
    weights = list(model.network.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    pairs, generator = mixtures(given, np.random.default_rng(derive(seed, "data"))), torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        clean, noisy = next(pairs)
        t = torch.rand(BATCH, generator=generator)
        eps = torch.randn(model.representation.centre(noisy).shape, generator=generator)
        speech_flow.matching_loss(model, clean, noisy, t, eps).mean().backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - min(DECAY, step / (step + 10)))
        if step % every == 0 or step == steps:
            exchange(weights, average)
            report(step)
            if step < steps:
                exchange(weights, average)


def spoken_by(policy: SpeechPolicy, prompts: list[Prompt], drawn: bool) -> Samples:
    """The prompts' recordings enhanced from fixed noise, with the sampler's own noise (as in rollouts) or without."""
    batch = requests(prompts, range(len(prompts)), group_size=1, seed=derive("measure"), iteration=0)
    return policy.rollout(batch)[1] if drawn else policy.generate(batch)


@torch.no_grad()
def given_to(policy: SpeechPolicy, samples: Samples, gains: bool) -> Samples:
    """The noisy recordings of the samples themselves, or with the `gains` that the flow is trained to draw."""
    heard, model = hear(samples.batch, policy.mixing), policy.model
    if not gains:
        return replace(samples, audio=heard.noisy[:, None])
    audio = torch.zeros_like(heard.clean)
    for row, length in enumerate(heard.length.tolist()):
        clean, noisy = heard.clean[row : row + 1, :length], heard.noisy[row : row + 1, :length]
        audio[row, :length] = model.representation.decode(model.representation.encode(clean, noisy), noisy)[0]
    return replace(samples, audio=audio[:, None])


def table(folder: Path, part: str, names: tuple[Name, ...]) -> Iterator[tuple[str, dict[str, float]]]:
    """Mean measures of a model's folder on a part's pairs, row after row of assets/README.md."""
    prompts = load_prompts(str(FOLDER / f"{part}.jsonl"), media={"clean": "clean", "noisy": "noisy"})
    score = measures(names=names, processes=0)
    for steps, power in SCHEDULES:
        sampler = partial(flow_sde, noise=NOISE)
        policy = load(model=str(folder), plan=all_but_last, sampler=sampler, steps=steps, power=power, device="cpu")
        policy.prepare(prompts)
        found = {"deterministic": spoken_by(policy, prompts, False), "SDE": spoken_by(policy, prompts, True)}
        if (steps, power) == SCHEDULES[0]:
            start = found["deterministic"]
            found = {"noisy": given_to(policy, start, False), "oracle gains": given_to(policy, start, True)} | found
        for name, samples in found.items():
            means = {measure: round(float(values.nanmean()), 4) for measure, values in score(samples).items()}
            yield f"{part}, {name}, {steps} steps to the power {power:g}", means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps; the rate falls to 0 within them")
    parser.add_argument("--width", type=int, default=64, help="features of the network")
    parser.add_argument("--peak", type=float, default=RATE_OF_LEARNING, help="the highest learning rate")
    parser.add_argument("--start", type=Path, help="a folder whose weights are trained further, instead of new ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER / "base")
    parser.add_argument("--report-every", type=int, default=1000, help="steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    given, representation = bank(options.seed), BandGains()
    network = BandGainNetwork(representation.channels(), width=options.width)
    if options.start is not None:
        network.load_state_dict(speech_models.load(options.start).network.state_dict())
    model, start = Model(network, representation), time.process_time()
    print(
        sum(weight.numel() for weight in network.parameters()),
        "parameters",
        len(given.speech),
        "utterances",
        flush=True,
    )

    def report(step: int) -> None:
        speech_models.save(options.folder, copy.deepcopy(network).to(torch.bfloat16), representation)
        _, scores = list(table(options.folder, "validation", MEASURED[:3]))[2]
        print(step, f"{time.process_time() - start:.0f} s", scores, flush=True)

    train(model, given, options.steps, options.peak, options.seed, report, options.report_every)
    for name, scores in table(options.folder, "validation", MEASURED):
        print(f"{name}: {scores}", flush=True)


if __name__ == "__main__":
    main()
