"""Train the start of the speech demo: a small flow over band gains, on mixtures of synthesised speech and drawn noises.

    apt-get install -y espeak-ng
    pip install pesq pystoi speechmos
    OMP_NUM_THREADS=1 python assets/train_speech_demo.py

writes assets/speech_demo/base and prints what it does to the validation pairs. Axes: B recordings, N samples at 16 kHz,
C channels, K bands, T frames.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from pesq import pesq
from pystoi import stoi
from speechmos import dnsmos
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # runs from a plain checkout

from assets.make_speech_demo import FOLDER, LEVEL, NOISES, spoken
from assets.speech_noises import RATE, Wave, draw
from mmgrpo.seeds import derive, normal
from mmgrpo.transitions import Level, Step, flow_sde, from_velocity
from pipelines import speech_flow, speech_models
from pipelines.speech_models import Model
from pipelines.speech_networks import BandGainNetwork
from pipelines.speech_representations import BandGains

BATCH, CROP = 8, 8 * RATE // 5  # recordings a step, their length
RATE_OF_LEARNING, WARM, DECAY = 1.5e-3, 100, 0.999  # at first, steps to reach it, EMA
DECIBELS = (-2.0, 12.0)  # wider than those of the demo, whose ends are then no ends of the training
NOISE_DRAWS, NOISE_SECONDS = 40, 4  # of each kind
Pairs = list[tuple[Wave, Wave]]  # clean, noisy


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


@torch.no_grad()
def exchange(weights: list[nn.Parameter], values: list[Tensor]) -> None:
    """Swap the contents of the two lists."""
    kept = [weight.clone() for weight in weights]
    torch._foreach_copy_(weights, values)
    torch._foreach_copy_(values, kept)


def pairs_of(part: str) -> Pairs:
    """The shipped clean and noisy recordings of a part."""
    rows = [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (
            soundfile.read(FOLDER / row["clean"], dtype="float32")[0],
            soundfile.read(FOLDER / row["noisy"], dtype="float32")[0],
        )
        for row in rows
    ]


@torch.no_grad()
def sampled(model: Model, noisy: Wave, steps: int, seed: int, noise: float) -> Wave:
    """What the policy's rollouts hear: Flow-GRPO's SDE of strength `noise`, without noise in the last step; (N,) -> (N,)."""
    given = torch.from_numpy(noisy)[None]
    condition, centre = model.representation.condition(given), model.representation.centre(given)
    random = torch.Generator().manual_seed(seed)
    x = centre + torch.randn(centre.shape, generator=random)
    levels = [Level(1 - t, t) for t in speech_flow.times(steps)]
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        velocity = model.network(x, now.sigma.expand(1), condition)
        mean, std = flow_sde(Step(x, *from_velocity(x, velocity, now), now, after, levels[1]), noise=noise)
        x = mean + std * torch.randn(x.shape, generator=random)
    return model.representation.decode(x, given)[0].numpy()


def enhanced(model: Model, noisy: Wave, steps: int, seed: int) -> Wave:
    """By the deterministic sampler; (N,) -> (N,)."""
    return speech_flow.enhance(model, torch.from_numpy(noisy)[None], steps, [derive(seed, "evaluation")])[0].numpy()


@torch.no_grad()
def oracle(model: Model, clean: Wave, noisy: Wave) -> Wave:
    """With the gains that the flow is trained to draw; (N,), (N,) -> (N,)."""
    pair = torch.from_numpy(clean)[None], torch.from_numpy(noisy)[None]
    return model.representation.decode(model.representation.encode(*pair), pair[1])[0].numpy()


def si_sdr(clean: Wave, heard: Wave) -> float:
    """Scale-invariant signal-to-distortion ratio, dB (arXiv 1811.02508)."""
    clean, heard = clean - clean.mean(), heard - heard.mean()
    target = clean * (heard @ clean) / (clean @ clean)
    return float(10 * np.log10((target @ target) / ((heard - target) @ (heard - target))))


def measure(pairs: Pairs, heard: list[Wave], slow: bool = False) -> dict[str, float]:
    """Mean SI-SDR in dB, wide-band PESQ and STOI; `slow` adds DNSMOS (overall, P.835), some 0.3 s for each recording."""
    both = [(clean, wave) for (clean, _), wave in zip(pairs, heard, strict=True)]
    scores = {
        "si_sdr": [si_sdr(clean, wave) for clean, wave in both],
        "pesq": [pesq(RATE, clean, wave, "wb") for clean, wave in both],
        "stoi": [stoi(clean, wave, RATE) for clean, wave in both],
    }
    if slow:
        scores["dnsmos"] = [dnsmos.run(wave / np.abs(wave).max() * 0.5, RATE)["ovrl_mos"] for wave in heard]
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


def table(model: Model, pairs: Pairs) -> Mapping[str, dict[str, float]]:
    """What stands in assets/README.md."""
    rows: dict[str, list[Wave]] = {
        "noisy": [noisy for _, noisy in pairs],
        "oracle gains": [oracle(model, *pair) for pair in pairs],
    }
    for steps in (6, 8, 10):
        rows[f"base, deterministic, {steps} steps"] = [
            enhanced(model, noisy, steps, row) for row, (_, noisy) in enumerate(pairs)
        ]
    for steps in (6, 8):
        rows[f"base, SDE 0.7, {steps} steps"] = [
            sampled(model, noisy, steps, row, 0.7) for row, (_, noisy) in enumerate(pairs)
        ]
    return {name: measure(pairs, heard, slow=True) for name, heard in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument(
        "--further", type=int, default=800, help="steps trained after saving, to see what more would give"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--peak", type=float, default=RATE_OF_LEARNING)
    parser.add_argument("--folder", type=Path, default=FOLDER / "base")
    parser.add_argument("--report-every", type=int, default=1000, help="steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    given, pairs = bank(options.seed), pairs_of("validation")
    representation = BandGains()
    network = BandGainNetwork(representation.channels(), width=options.width, blocks=options.blocks)
    model, start = Model(network, representation), time.process_time()
    print(
        sum(weight.numel() for weight in network.parameters()),
        "parameters",
        len(given.speech),
        "utterances",
        flush=True,
    )

    def report(step: int) -> None:
        heard = [enhanced(model, noisy, 6, row) for row, (_, noisy) in enumerate(pairs)]
        print(step, f"{time.process_time() - start:.0f} s", measure(pairs, heard), flush=True)
        speech_models.save(options.folder, copy.deepcopy(network).to(torch.bfloat16), representation)

    train(model, given, options.steps, options.peak, options.seed, report, options.report_every)
    speech_models.save(options.folder, network.to(torch.bfloat16), representation)
    shipped = speech_models.load(options.folder)
    for name, scores in table(shipped, pairs).items():
        print(f"{name}: {scores}", flush=True)
    start = time.process_time()
    model = shipped
    print("further training, after the shipped weights:")
    train(model, given, options.further, options.peak / 5, options.seed + 1, report, options.further)


if __name__ == "__main__":
    main()
