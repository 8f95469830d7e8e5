"""How long a replay takes with several steps in one forward of the denoiser, in units of one with a step at a time.

Same policy, rows and decisions, forward and backward. A ratio below 1 is a gain, for which the graphs of all joined steps
are in memory at once.
"""

from collections.abc import Sequence
from dataclasses import replace

from mmgrpo.aggregations import seq_mean
from mmgrpo.improve import Given, Loss, accumulate
from mmgrpo.objectives import clipped
from mmgrpo.types import Trajectory

from .measuring import Bench, advantages, built, group, options, paired, report, throughput


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="samples in one call")
    parser.add_argument("--decisions", type=int, default=8)
    parser.add_argument("--joined", type=int, default=4, help="steps in one forward")
    asked = parser.parse_args(argv)
    bench = built(asked.size, asked.device, rows=asked.rows, decisions=asked.decisions, replay_steps=asked.joined)
    if bench.policy.engine.options.replay_steps != asked.joined:
        raise RuntimeError(f"the policy refused to join steps: {bench.policy.notes[-1]}")
    trajectory, _ = bench.policy.rollout(group(bench, 2 * asked.rows))
    pairs = paired(
        lambda: replay(bench, trajectory, asked.joined), lambda: replay(bench, trajectory, 1), asked.pairs, bench.device
    )
    rates = throughput(lambda: replay(bench, trajectory, asked.joined), pairs.seconds, len(trajectory), bench)
    shapes = {"decisions": asked.decisions, "joined": asked.joined}
    report("replay_batching", bench, pairs._asdict() | shapes | rates)


def replay(bench: Bench, trajectory: Trajectory, steps: int) -> None:
    """Forward and backward of every trained step, so many steps to a forward."""
    engine = bench.policy.engine
    engine.options = replace(engine.options, replay_steps=steps)
    engine.pipeline.transformer.zero_grad()
    accumulate(bench.policy, trajectory, Given(advantages(trajectory), seq_mean(trajectory.mask)), Loss(clipped))


if __name__ == "__main__":
    main()
