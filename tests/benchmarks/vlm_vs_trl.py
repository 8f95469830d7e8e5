"""A whole GRPO step and its update by this toolkit and by TRL's GRPOTrainer: seconds, peak memory, loss and gradient.

Both train a copy of the same random model on the same prompts, all parameters, the picture encoder's included, in float32
with one thread: L prompt tokens, most of them a picture's, S new tokens, G answers to each of two prompts. TRL's own loop
runs, and between two of its steps, before one and after the next in turns, one iteration of our `Run`. An iteration is
rollout, score, compare, replay, backward, clip, AdamW and its metrics; a step of TRL is all between its callbacks
`on_step_begin` and `on_step_end`, and its update what comes after `_generate_and_score_completions`. Seconds are those of
the process; the loading of TRL's rows, before `on_step_begin`, is not counted.

The same on both sides: on-policy (one update a rollout), clip 0.2, no KL, mean over a sample's tokens and then over samples
(`loss_type="grpo"`), temperature 1 without truncation, advantages by the group's standard deviation, AdamW (fused), gradient
norm 1, no dropout, no gradient checkpointing, no autocast (TRL's default is bfloat16). Answers have exactly S tokens: the end
token is not in the model's vocabulary. TRL logs, saves and evaluates nothing. It updates from all P * G samples at once, or
from `--samples-at-once`, whose gradients it accumulates; 1 takes least memory, and on a CPU about the same time. Ours reads
`--replay-tokens` at once, by default both groups; L + S * G is one of them.
What costs TRL most: every sample's prompt and picture are read again, in `generate` and in the loss, and on a CPU its loss
computes the logits of the prompts' tokens too. What `generate` never samples, the mark of a picture, its loss still counts
among the tokens that could have been; ours does not. For the comparison of loss and gradient ours counts them too.

Memory is the peak of one whole step, and of its update, above the level right before it (weights, moments, remembered
prompts), by the allocator's events in torch's profiler.
Targets at (L, S, G) = (300, 32, 8): step at least 5 times as fast, update 6 times, memory no higher, gradient equal to 1e-4.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl
from torch.autograd.profiler import profile, record_function
from transformers import TrainerCallback
from trl import GRPOTrainer

from mmgrpo import trainer
from mmgrpo.advantages import standardized
from mmgrpo.journal import peak_memory
from mmgrpo.run import Run
from mmgrpo.types import Advantage, Feedback, Prompt
from tests.tiny_vlms.record import Built

from . import random_vlms
from .two_trainers import Asked, agreement, copied, started, trainer_of

PROMPTS = 2  # of a step
UPDATE = "update begins"  # a mark among the profiler's events
clock = time.process_time


class Cost(NamedTuple):
    """Of a whole step, and of its update: seconds, or bytes."""

    step: float
    update: float


class Side:
    """One of the two, and what its steps cost."""

    def __init__(self) -> None:
        self.seconds: list[Cost] = []
        self.peak = Cost(0, 0)
        self.begun = self.rolled = 0.0
        self.profiler: profile | None = None

    def begin(self, profiled: bool) -> None:
        if profiled:
            self.profiler = profile(profile_memory=True).__enter__()
        self.begun = clock()

    def mark(self) -> None:
        """The update begins."""
        with record_function(UPDATE):
            self.rolled = clock()

    def end(self) -> None:
        now = clock()
        if self.profiler is None:
            self.seconds.append(Cost(now - self.begun, now - self.rolled))
        else:
            self.profiler.__exit__(None, None, None)
            self.peak, self.profiler = peaks(self.profiler), None


def peaks(recorded: profile) -> Cost:
    """The most bytes above the level at the step's begin, and at its update's."""
    level = most = 0
    levels = {}
    for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == UPDATE:
            levels["step"], base, most = most, level, level
        elif event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return Cost(max(levels["step"], most), most - base)


class InTurns(TrainerCallback):
    """Runs our steps between those of TRL's loop, the order swapped from pair to pair; the last pair under the profiler."""

    def __init__(self, run: Run, opponent: GRPOTrainer, pairs: int) -> None:
        self.run, self.last = run, pairs + 1
        self.ours, self.theirs = Side(), Side()
        run.compare = self._compared
        self.generate = opponent._generate_and_score_completions
        opponent._generate_and_score_completions = self._generated
        opponent.add_callback(self)

    def _compared(self, feedback: Feedback) -> Advantage:
        advantage = standardized(feedback)
        self.ours.mark()
        return advantage

    def _generated(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outputs = self.generate(inputs)
        self.theirs.mark()
        return outputs

    def _our_step(self, pair: int) -> None:
        self.ours.begin(profiled=pair == self.last)
        trainer.iteration(self.run)
        self.ours.end()
        self.run.iteration += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step % 2 == 0:
            self._our_step(state.global_step)
        self.theirs.begin(profiled=state.global_step == self.last)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.theirs.end()
        pair = state.global_step - 1  # it has been counted up
        if pair % 2 == 1:
            self._our_step(pair)


def measured(built: Built, prompts: list[Prompt], asked: Asked, pairs: int, folder: Path) -> dict[str, object]:
    """Seconds, ratios and peaks of both sides; the first pair chooses kernels and allocates, and is not counted."""
    run = started(built, prompts, asked)
    opponent = trainer_of(copied(built), prompts, asked, pairs + 2, folder)
    turns = InTurns(run, opponent, pairs)
    opponent.train()
    found: dict[str, object] = {}
    for part in Cost._fields:
        ours, theirs = ([getattr(cost, part) for cost in side.seconds[1:]] for side in (turns.ours, turns.theirs))
        found[part] = {
            "times_as_fast": quartiles([their / our for our, their in zip(ours, theirs, strict=True)]),
            "seconds": statistics.median(ours),
            "trl_seconds": statistics.median(theirs),
            "peak_bytes": getattr(turns.ours.peak, part),
            "trl_peak_bytes": getattr(turns.theirs.peak, part),
        }
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower, the median and the upper one."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(random_vlms.SIZES), default="5m")
    parser.add_argument("--text", action="store_true", help="a Qwen3 model of the same size, without a picture")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--samples-at-once", type=int, default=0, help="of TRL; 0: all of a step")
    parser.add_argument("--replay-tokens", type=int, default=8192, help="of ours")
    parser.add_argument("--pairs", type=int, default=8)
    given = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    asked = Asked(given.new_tokens, given.group_size, given.samples_at_once, given.replay_tokens)
    size = random_vlms.SIZES[given.size]
    built = random_vlms.reading(size) if given.text else random_vlms.seeing(size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = random_vlms.prompts(built, size, given.prompt_tokens, PROMPTS, folder)
        same = {"on_policy": agreement(built, prompts, asked, 0.0, folder)}
        same["stale"] = agreement(built, prompts, asked, 0.3, folder)
        figures = measured(built, prompts, asked, given.pairs, folder)
    count = sum(parameter.numel() for parameter in built.model.parameters())
    about = {
        "benchmark": "vlm_vs_trl", "device": f"cpu, {torch.get_num_threads()} threads", "dtype": "float32",
        "model": type(built.model).__name__, "parameters": count, "trained_parameters": count,
        "prompt_tokens": given.prompt_tokens, "rows": PROMPTS * given.group_size, "pairs": given.pairs, "trl": trl.__version__,
    }  # fmt: skip
    print(json.dumps(about | asked._asdict() | figures | {"difference": same} | peak_memory()))


if __name__ == "__main__":
    main()
