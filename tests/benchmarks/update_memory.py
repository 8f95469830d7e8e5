"""Peak memory of an update against the samples of a group and their decisions, at a fixed number of rows in a call.

An update is what the trainer does: replay, backward, clip, AdamW. The level right before it (weights, moments, the
trajectory) is subtracted, so the figure is what the update itself takes. On CUDA it is the allocator's own peak; on a CPU
the running sum of the allocator's events in torch's profiler, which keeps about 9 GB of them.
Target: the largest peak at most 1.05 times the smallest.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.autograd.profiler import profile

from mmgrpo.run import Run

from .measuring import Bench, built, group, options, report, seconds, started, throughput, update, with_decisions


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--decisions", type=int, nargs="+", default=[4, 16])
    asked = parser.parse_args(argv)
    bench = built(asked.size, asked.device)
    run = started(bench)
    warm, _ = bench.policy.rollout(group(bench, bench.size.rows))
    update(run, warm)  # AdamW's moments are made at the first update
    points = [measured(bench, run, samples, s) for s in asked.decisions for samples in asked.samples]
    peaks = [point["peak_bytes"] for point in points]
    again = partial(update, run, warm)
    rates = throughput(again, seconds(again, bench.device), len(warm), bench)
    report("update_memory", bench, {"growth": max(peaks) / min(peaks) - 1, "points": points} | rates)


def measured(bench: Bench, run: Run, samples: int, decisions: int) -> dict[str, int]:
    """Peak of one update, above the level right before it."""
    trajectory, _ = with_decisions(bench, decisions).policy.rollout(group(bench, samples))
    peak = peak_on_cuda if bench.device.type == "cuda" else peak_on_cpu
    stored = sum(tensor.nbytes for tensor in trajectory.record.values())
    size = {"samples": samples, "decisions": decisions, "trajectory_bytes": stored}
    return size | {"peak_bytes": peak(partial(update, run, trajectory))}


def peak_on_cuda(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(work: Callable[[], None]) -> int:
    with profile(profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


if __name__ == "__main__":
    main()
