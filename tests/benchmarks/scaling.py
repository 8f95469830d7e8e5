"""Seconds of an update against the samples of a group and against their decisions, and the exponents fitted to them.

Target: both exponents at most 1.05.
"""

import statistics
from collections.abc import Sequence
from functools import partial

from mmgrpo.run import Run

from .measuring import (
    Bench,
    built,
    exponent,
    group,
    options,
    report,
    seconds,
    started,
    throughput,
    update,
    with_decisions,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--decisions", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(argv)
    bench = built(asked.size, asked.device)
    fewest_samples, fewest_decisions = min(asked.samples), min(asked.decisions)
    points = [(samples, fewest_decisions) for samples in asked.samples]
    points += [(fewest_samples, decisions) for decisions in asked.decisions if decisions != fewest_decisions]
    run = started(bench)
    taken = times(bench, run, points, asked.rounds)
    by_samples = {samples: taken[samples, fewest_decisions] for samples in asked.samples}
    by_decisions = {decisions: taken[fewest_samples, decisions] for decisions in asked.decisions}
    samples, decisions = points[0]
    trajectory, _ = with_decisions(bench, decisions).policy.rollout(group(bench, samples))
    rates = throughput(partial(update, run, trajectory), taken[points[0]], samples, bench)
    figures = {
        "seconds_by_samples": by_samples,
        "seconds_by_decisions": by_decisions,
        "samples_exponent": exponent(list(by_samples), list(by_samples.values())),
        "decisions_exponent": exponent(list(by_decisions), list(by_decisions.values())),
    }
    report("scaling", bench, figures | rates)


def times(bench: Bench, run: Run, points: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """Median seconds of an update at each (samples, decisions); every round visits every point."""
    found: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for number in range(rounds + 1):
        for samples, decisions in points if number else points[:1]:  # the first round is a warm-up
            trajectory, _ = with_decisions(bench, decisions).policy.rollout(group(bench, samples))
            taken = seconds(partial(update, run, trajectory), bench.device)
            if number:
                found[samples, decisions].append(taken)
    return {point: statistics.median(values) for point, values in found.items()}


if __name__ == "__main__":
    main()
