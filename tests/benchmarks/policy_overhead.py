"""How much longer a recorded rollout takes than the pipeline's own call, and a replay than the denoiser alone.

Both run in this process on the same modules. The bare call has the stock scheduler, the same arguments and the same VAE.
The bare denoiser runs forward and backward at every trained step, with the arguments that the pipeline's own call gives it.
Targets: at most 1.02 and 1.05.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, nn

from mmgrpo.aggregations import seq_mean
from mmgrpo.improve import Given, Loss, accumulate
from mmgrpo.objectives import clipped
from mmgrpo.types import Batch
from pipelines import arguments

from .measuring import Bench, advantages, built, group, options, paired, report, throughput


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    asked = parser.parse_args(argv)
    bench = built(asked.size, asked.device)
    batch = group(bench, bench.size.rows)
    rollout = paired(lambda: recorded(bench, batch), lambda: bare_call(bench, batch), asked.pairs, bench.device)
    replay = Replay(bench, batch)
    update = paired(replay.policy, replay.denoiser, asked.pairs, bench.device)
    figures = {
        "rollout": rollout._asdict() | throughput(lambda: recorded(bench, batch), rollout.seconds, len(batch), bench),
        "replay": update._asdict() | throughput(replay.policy, update.seconds, len(batch), bench),
        "decisions": bench.size.decisions,
    }
    report("policy_overhead", bench, figures)


def recorded(bench: Bench, batch: Batch) -> None:
    bench.policy.rollout(batch)


def bare_call(bench: Bench, batch: Batch) -> None:
    """The stock pipeline: without a listener, what stands between it and its modules calls them."""
    engine = bench.policy.engine
    generators = [Generator().manual_seed(int(sample)) for sample in batch.sample]
    asked = arguments.call_arguments(
        engine.pipeline, batch.prompts, generators, engine.options.call, (), engine.layout.form, engine.options.video
    )
    engine.pipeline(**asked)


class Replay:
    """Forward and backward of every trained step, by the policy and by the denoiser alone."""

    def __init__(self, bench: Bench, batch: Batch) -> None:
        self.bench = bench
        self.trajectory, _ = bench.policy.rollout(batch)
        self.module: nn.Module = bench.policy.engine.pipeline.transformer
        self.calls: list[tuple[Any, ...]] = []
        hook = self.module.register_forward_pre_hook(self._note, with_kwargs=True)
        bare_call(bench, batch)
        hook.remove()
        self.calls = self.calls[: bench.size.decisions]  # the last step is not trained

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((args, kwargs))

    def policy(self) -> None:
        self.module.zero_grad()
        weights = seq_mean(self.trajectory.mask)
        accumulate(self.bench.policy, self.trajectory, Given(advantages(self.trajectory), weights), Loss(clipped))

    def denoiser(self) -> None:
        self.module.zero_grad()
        for args, kwargs in self.calls:
            output = self.module(*args, **kwargs)[0]
            output.backward(torch.ones_like(output))


if __name__ == "__main__":
    main()
