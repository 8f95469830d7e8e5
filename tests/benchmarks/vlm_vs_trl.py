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
token is not in the model's vocabulary. TRL gets all P * G samples in one batch, which saves it the overhead of accumulation;
`--samples-at-once` gives it smaller ones. It logs, saves and evaluates nothing.
What TRL's `generate` never samples, the mark of a picture, its loss still counts among the tokens that could have been; ours
does not. For the comparison of loss and gradient ours counts them too.

Memory is the peak of one whole step, and of its update, above the level right before it (weights, moments, remembered
prompts), by the allocator's events in torch's profiler.
Targets at (300, 32, 8): step at least 5 times as fast, update 6 times, memory no higher, gradient equal to 1e-4.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import trl
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from mmgrpo import recipe, trainer
from mmgrpo.advantages import standardized
from mmgrpo.gathering import next_batch
from mmgrpo.improve import Loss, accumulate
from mmgrpo.journal import peak_memory
from mmgrpo.objectives import clipped, seq_mean
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.shadow import Reference
from mmgrpo.types import Advantage, Feedback, Prompt, Samples, Trajectory
from tests.tiny_vlms.record import Built

from . import random_vlms

PROMPTS = 2  # of a step
UPDATE = "update begins"  # a mark among the profiler's events
OPTIMIZER = recipe.Optimizer(1e-6, weight_decay=0.0)
clock = time.process_time


def mean_letter(text: str) -> float:
    """The reward of both sides: the mean code point of the text, in [0, 1] for letters of one byte."""
    return sum(map(ord, text)) / (256 * max(1, len(text)))


class Asked(NamedTuple):
    """What both sides are asked for."""

    new_tokens: int
    group_size: int
    samples_at_once: int = 0  # of TRL; 0: all of a step


# -- our side -----------------------------------------------------------------------------------------------------


def reward(samples: Samples) -> Tensor:
    assert samples.text is not None
    return torch.tensor([mean_letter(text) for text in samples.text])


def started(built: Built, prompts: list[Prompt], asked: Asked) -> Run:
    """A run of the trainer in its first state."""
    policy = random_vlms.policy(built, asked.new_tokens)
    policy.prepare(prompts)
    settings = recipe.Recipe(
        seed=0, policy={}, prompts=recipe.Prompts(""), advantage={}, objective={}, loss=recipe.Loss(),
        rewards=(recipe.Reward("letter", {}),), reference=recipe.Reference(), ema=recipe.Ema(), optimizer=OPTIMIZER,
        train=recipe.Train(iterations=1, prompts=len(prompts), group_size=asked.group_size), evaluation=recipe.Evaluation(""),
    )  # fmt: skip
    trained = policy.trainable()
    return Run(
        recipe=settings, policy=policy, prompts=prompts, held_out=[], rewards={"letter": reward}, compare=standardized,
        loss=Loss(clipped), aggregate=seq_mean, reference=Reference("none", trained), average=None,
        optimizer=torch.optim.AdamW(trained.values(), OPTIMIZER.learning_rate, weight_decay=0.0, fused=True),
    )  # fmt: skip


# -- TRL's side ---------------------------------------------------------------------------------------------------


def letters(completions: Sequence[Any], **columns: object) -> list[float]:
    return [mean_letter(completion[0]["content"]) for completion in completions]


def rows(prompts: Sequence[Prompt]) -> datasets.Dataset:
    """The prompts as TRL takes them."""
    table: dict[str, list[Any]] = {"prompt": [[{"role": "user", "content": prompt.text}] for prompt in prompts]}
    if not prompts[0].media:
        return datasets.Dataset.from_dict(table)
    table["image"] = [str(prompt.media["image"][0]) for prompt in prompts]
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())


def trainer_of(built: Built, prompts: Sequence[Prompt], asked: Asked, steps: int, folder: Path) -> GRPOTrainer:
    """TRL's trainer with the settings of `started`."""
    samples = len(prompts) * asked.group_size
    at_once = asked.samples_at_once or samples
    settings = GRPOConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=at_once, gradient_accumulation_steps=samples // at_once,
        num_generations=asked.group_size, max_completion_length=asked.new_tokens, loss_type="grpo", beta=0.0, epsilon=0.2,
        temperature=1.0, top_p=1.0, top_k=0, scale_rewards="group", bf16=False, activation_checkpointing=False, use_cpu=True,
        learning_rate=OPTIMIZER.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch_fused",
        max_grad_norm=OPTIMIZER.max_grad_norm, report_to="none", logging_strategy="no", save_strategy="no",
        eval_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    options = {"reward_funcs": letters, "train_dataset": rows(prompts), "processing_class": built.processor}
    return GRPOTrainer(built.model, args=settings, **options)


# -- in turns -----------------------------------------------------------------------------------------------------


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


def copied(built: Built) -> Built:
    """The same weights again: TRL puts a forward of its own into the model."""
    return Built(copy.deepcopy(built.model), built.processor)


# -- the same loss and gradient -----------------------------------------------------------------------------------


class Slope(NamedTuple):
    """A loss, what it was computed from, and its gradient by parameter."""

    prompt: Tensor  # (B, L) int64
    advantages: Tensor  # (B,)
    loss: float
    gradient: Mapping[str, Tensor]


def agreement(built: Built, prompts: list[Prompt], asked: Asked, stale: float, folder: Path) -> dict[str, float]:
    """How far our loss and gradient are from TRL's on our samples; all differences are relative but the advantages'.

    stale: spread of the log-ratios, in nats, as if the weights had moved since the rollout; 0: on-policy.
    """
    run = started(built, prompts, asked)
    trajectory, samples = run.policy.rollout(next_batch(run))
    advantages = run.compare(score(run.rewards, run.weights, samples)).values
    run.policy.answers.never = run.policy.answers.never[:0]  # as TRL's loss has it
    if stale:
        trajectory = run.policy.anchor(trajectory, [torch.arange(len(trajectory))])
        noise = stale * torch.randn(trajectory.mask.shape, generator=torch.Generator().manual_seed(2))
        trajectory = replace(trajectory, record=trajectory.record | {"anchor": trajectory.record["anchor"] + noise})
    ours, theirs = our_slope(run, trajectory, advantages), trl_slope(copied(built), trajectory, asked, folder)
    if not torch.equal(ours.prompt, theirs.prompt):
        raise RuntimeError("TRL reads the prompts as other tokens than we do")
    gradients = [torch.cat([side.gradient[name].flatten() for name in ours.gradient]) for side in (ours, theirs)]
    difference = gradients[0] - gradients[1]
    return {
        "advantages": float((ours.advantages - theirs.advantages).abs().max()),
        "loss": abs(ours.loss - theirs.loss) / max(abs(theirs.loss), 1e-3),  # on-policy it is 0
        "gradient": float(difference.norm() / gradients[1].norm()),
        "gradient_largest": float(difference.abs().max() / gradients[1].abs().max()),
    }


def our_slope(run: Run, trajectory: Trajectory, advantages: Tensor) -> Slope:
    """By the trainer's own accumulation."""
    values = advantages.unsqueeze(1).expand(trajectory.mask.shape)
    found = accumulate(run.policy, trajectory, values, run.aggregate(trajectory.mask), run.loss)
    reader = run.policy.answers.reader
    prompt = torch.cat([reader.read(prompt).inputs["input_ids"] for prompt in trajectory.batch.prompts])
    return Slope(prompt, advantages, found.loss, taken_gradient(run.policy.model))


def trl_slope(built: Built, trajectory: Trajectory, asked: Asked, folder: Path) -> Slope:
    """By TRL's own scoring and loss; what its `generate` would have sampled are the tokens of our trajectory."""
    prompts = list(dict.fromkeys(trajectory.group.tolist()))
    firsts = [trajectory.batch.prompts[trajectory.group.tolist().index(group)] for group in prompts]
    opponent = trainer_of(built, firsts, asked, 1, folder)
    opponent._generate_single_turn = lambda *prompt: (trajectory.record["token"].tolist(), None)
    opponent.model.eval()  # in training its loss is divided by what the loop accumulates
    rows = [opponent.train_dataset[prompts.index(group)] for group in trajectory.group.tolist()]
    batch = opponent._generate_and_score_completions(rows)
    if "anchor" in trajectory.record:
        batch["old_per_token_logps"] = trajectory.record["anchor"]
    loss = opponent.compute_loss(opponent.model, batch)
    loss.backward()
    return Slope(batch["prompt_ids"], batch["advantages"], float(loss.detach()), taken_gradient(opponent.model))


def taken_gradient(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient by parameter, which the model has no longer."""
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# -- report -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(random_vlms.SIZES), default="5m")
    parser.add_argument("--text", action="store_true", help="a Qwen3 model of the same size, without a picture")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--samples-at-once", type=int, default=0, help="of TRL; 0: all of a step")
    parser.add_argument("--pairs", type=int, default=8)
    given = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    size, asked = random_vlms.SIZES[given.size], Asked(given.new_tokens, given.group_size, given.samples_at_once)
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
