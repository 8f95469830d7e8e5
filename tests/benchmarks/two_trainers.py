"""One GRPO step by this toolkit and by TRL's GRPOTrainer: both sides built with the same settings, and their losses compared.

Axes: L tokens of a prompt, B = P * G answers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from mmgrpo import recipe
from mmgrpo.advantages import standardized
from mmgrpo.aggregations import seq_mean
from mmgrpo.gathering import next_batch
from mmgrpo.improve import Given, Loss, accumulate
from mmgrpo.objectives import clipped
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.shadow import Reference
from mmgrpo.types import Prompt, Samples, Trajectory
from tests.tiny_vlms.record import Built

from . import random_vlms

OPTIMIZER = recipe.Optimizer(1e-6, weight_decay=0.0)


def mean_byte(text: str) -> float:
    """The reward of both sides, in [0, 1]: it costs nothing, and no two texts are likely to share it."""
    data = text.encode()
    return sum(data) / (255 * max(1, len(data)))


class Asked(NamedTuple):
    """What both sides are asked for."""

    new_tokens: int
    group_size: int
    samples_at_once: int = 0  # of TRL in an update; 0: all of a step
    replay_tokens: int = 8192  # of ours at once in an update


# -- our side -----------------------------------------------------------------------------------------------------


def reward(samples: Samples) -> Tensor:
    assert samples.text is not None
    return torch.tensor([mean_byte(text) for text in samples.text])


def started(built: Built, prompts: list[Prompt], asked: Asked) -> Run:
    """A run of the trainer in its first state."""
    policy = random_vlms.policy(built, asked.new_tokens, asked.replay_tokens)
    policy.prepare(prompts)
    settings = recipe.Recipe(
        seed=0, policy={}, prompts=recipe.Prompts(""), advantage={}, objective={}, loss=recipe.Loss(),
        rewards=(recipe.Reward("bytes", {}),), reference=recipe.Reference(), ema=recipe.Ema(), optimizer=OPTIMIZER,
        train=recipe.Train(iterations=1, prompts=len(prompts), group_size=asked.group_size), evaluation=recipe.Evaluation(""),
    )  # fmt: skip
    trained = policy.trainable()
    return Run(
        recipe=settings, policy=policy, prompts=prompts, held_out=[], rewards={"bytes": reward}, compare=standardized,
        loss=Loss(clipped), aggregate=seq_mean, reference=Reference("none", trained), average=None,
        optimizer=torch.optim.AdamW(trained.values(), OPTIMIZER.learning_rate, weight_decay=0.0, fused=True),
    )  # fmt: skip


# -- TRL's side ---------------------------------------------------------------------------------------------------


def bytes_of(completions: Sequence[Any], **columns: object) -> list[float]:
    return [mean_byte(completion[0]["content"]) for completion in completions]


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
    options = {"reward_funcs": bytes_of, "train_dataset": rows(prompts), "processing_class": built.processor}
    return GRPOTrainer(built.model, args=settings, **options)


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
    """How far our advantages, loss and gradient are from TRL's on our samples; the gradient's differences are relative.

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
        "loss": abs(ours.loss - theirs.loss),
        "loss_itself": abs(theirs.loss),  # on-policy it is 0, but for rounding
        "gradient": float(difference.norm() / gradients[1].norm()),
        "gradient_largest": float(difference.abs().max() / gradients[1].abs().max()),
    }


def our_slope(run: Run, trajectory: Trajectory, advantages: Tensor) -> Slope:
    """By the trainer's own accumulation."""
    values = advantages.unsqueeze(1).expand(trajectory.mask.shape)
    found = accumulate(run.policy, trajectory, Given(values, run.aggregate(trajectory.mask)), run.loss)
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
