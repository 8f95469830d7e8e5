"""How long the scoring of a batch of speech takes with two processes, with one and in this process, and beside a rollout.

Seconds are the clock's, since the work is that of several processes; things compared run in turns. The rollout is a stand-in: a small
network that this process evaluates on one thread. Target: two processes take at most 0.6 of the time of one, on two idle cores.

What may overlap: training on policy cannot roll out the next batch before the update, and the update waits for the scores.
So what scoring can hide behind is the rest of the same rollout: while its later calls are computed, its earlier ones are
scored (`Measures.submit`). `beside_against_after` is that case at its best: as much rollout left as there is to score.
On two cores two processes beside a rollout share the second core: `rollout_beside_against_alone` is what the rollout pays,
and `own_processor_seconds` what of that is this process's own work for the scoring of one batch.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmgrpo.types import Batch, Prompt, Samples
from rewards.speech import Measures, measures

RATE = 16_000
NAMES = ("si_sdr", "stoi", "pesq_wide")
Work = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--measures", nargs="+", default=NAMES)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    batch = samples(asked.recordings, asked.seconds)
    none, one, two = (measures(names=tuple(asked.measures), processes=count) for count in (0, 1, 2))
    scored = paired(lambda: two(batch), lambda: one(batch), asked.pairs)
    figures = {
        "benchmark": "speech_scoring",
        "recordings": asked.recordings,
        "audio_seconds": asked.seconds,
        "measures": list(asked.measures),
        "cores": len(os.sched_getaffinity(0)),
        "two_against_one": scored,
        "own_processor_seconds": own_seconds(lambda: two(batch)),
        "one_against_none": paired(lambda: one(batch), lambda: none(batch), asked.pairs),
    }
    for name, pool in (("one", one), ("two", two)):
        figures |= {f"{key}/{name}": value for key, value in overlap(pool, batch, asked.pairs).items()}
    print(json.dumps(figures))


def samples(count: int, length: float) -> Samples:
    """Bursts of noise as the clean recordings, with more noise as what is judged."""
    size, generator = int(length * RATE), torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, 1, size, generator=generator)
    clean = 0.2 * clean * torch.sin(torch.arange(size) * 6.28 * 2 / RATE).clamp(min=0)
    ids = torch.arange(count)
    batch = Batch(tuple(Prompt(row, "") for row in range(count)), ids, ids, seed=0, iteration=0)
    return Samples(batch, audio=clean + 0.01 * noise, rate=RATE, reference_audio=clean)


def overlap(reward: Measures, batch: Samples, pairs: int) -> dict[str, dict[str, float]]:
    """Scoring beside a rollout that takes as long as it, against one after the other; and that rollout against itself alone."""
    rollout = rollout_of(seconds(lambda: reward(batch)))
    beside_seconds: list[float] = []

    def beside() -> None:
        scores = reward.submit(batch)
        beside_seconds.append(seconds(rollout))
        scores()

    def after() -> None:
        rollout()
        reward(batch)

    whole = paired(beside, after, pairs)
    alone = statistics.median(seconds(rollout) for _ in range(pairs))
    slowed = statistics.median(beside_seconds)
    return {
        "beside_against_after": whole,
        "rollout_beside_against_alone": {"ratio": slowed / alone, "seconds": slowed, "against": alone},
    }


def rollout_of(length: float) -> Work:
    """Evaluations of a small network on one thread, of about so many seconds."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(32, 256, 5), nn.GELU(), nn.Conv1d(256, 256, 5), nn.GELU(), nn.Conv1d(256, 32, 5))
    x = torch.randn(8, 32, 200)

    @torch.no_grad()
    def step() -> Tensor:
        found: Tensor = network(x)
        return found

    once = min(seconds(step) for _ in range(5))
    return lambda: [step() for _ in range(max(1, round(length / once)))]


def paired(first: Work, second: Work, pairs: int) -> dict[str, float]:
    """Seconds of two things timed in turns, the order swapped from pair to pair, and their ratios' quartiles."""
    for work in (first, second):
        work()  # the processes start and libraries load at the first run
    ones, others = [], []
    for number in range(pairs):
        turns = ((first, ones), (second, others))
        for work, times in turns if number % 2 == 0 else turns[::-1]:
            times.append(seconds(work))
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if pairs > 1 else ratios * 3
    taken, against = statistics.median(ones), statistics.median(others)
    found = {"ratio": middle, "low": low, "high": high, "fastest": min(ones) / min(others)}
    return found | {"seconds": taken, "against": against}


def own_seconds(work: Work) -> float:
    """Of this process's processor: what a rollout on the same core loses to the handing over of recordings."""
    start = time.process_time()
    work()
    return time.process_time() - start


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
