"""The stage "pretrain": supervised lessons from the data, in the same loop, with the same optimizer and checkpoints.

A policy says what a supervised loss of a prompt is (`types.Teachable`), as a flow-matching loss on clean and noisy recordings.
Axes: P prompts, G examples of each, B = P * G, b those of one chunk.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mmgrpo.descent import clip_gradient, step
from mmgrpo.gathering import next_batch
from mmgrpo.improve import NonFiniteError
from mmgrpo.journal import Stopwatch, peak_memory
from mmgrpo.run import Run
from mmgrpo.selection import minibatches
from mmgrpo.types import Batch, Finding, Policy, Teachable


@runtime_checkable
class Examinable(Protocol):
    """A policy that shows more of what it learned than its loss."""

    def examined(self, batch: Batch) -> Mapping[str, Tensor]:
        """By name, (B,) each, NaN where there is nothing to say."""
        ...


def teachable(policy: Policy) -> Teachable:
    """The policy as one that learns from data; raises ValueError if it cannot."""
    if not isinstance(policy, Teachable):
        raise ValueError(
            f"train.stage is 'pretrain', and a {type(policy).__name__} has no supervised loss; expected 'align', "
            "or a policy with `teach`, such as pipelines.speech:load"
        )
    return policy


def lesson(run: Run) -> dict[str, float]:
    """The updates of one iteration: the mean supervised loss over its examples goes down; -> metrics."""
    phases, batch = Stopwatch(run.device), next_batch(run)
    with phases.measure("teach"):
        seen = [taught(run, batch.take(rows)) for rows in minibatches(batch.group, run.recipe.train.updates)]
    run.rollouts += 1
    run.samples += len(batch)
    means = {name: sum(part[name] for part in seen) / len(seen) for name in seen[0]}
    seconds = phases.take()
    rate = {"samples_per_second": len(batch) / sum(seconds.values()), "update/learning_rate": run.learning_rate()}
    return means | rate | seconds | peak_memory(run.device)


def taught(run: Run, batch: Batch) -> dict[str, float]:
    """One optimizer update from the examples of a batch; raises NonFiniteError naming the samples."""
    found = summed(run.policy, batch, lambda values: (values.sum() / len(batch)).backward())
    loss = float(found.mean())
    bad = batch.sample[~found.isfinite()].tolist()
    if bad:
        raise NonFiniteError(f"the supervised loss is {loss}; sample ids {bad[:16]}")
    norm = clip_gradient(run)
    step(run)
    return {"teach/loss": loss, "update/grad_norm": norm}


@torch.no_grad()
def losses(policy: Policy, batch: Batch) -> Tensor:
    """The supervised loss of every example, learning nothing; (B,)."""
    return summed(policy, batch, lambda values: None)


def summed(policy: Policy, batch: Batch, use: Callable[[Tensor], object]) -> Tensor:
    """The supervised loss of every example, the sum of its parts, each of which is `use`d; NaN if it has none; (B,)."""
    found, told = torch.zeros(len(batch)), torch.zeros(len(batch), dtype=torch.bool)

    def consume(rows: Tensor, values: Tensor) -> None:
        found[rows] += values.detach().float().cpu()
        told[rows] = True
        use(values)

    teachable(policy).teach(batch, consume)
    return torch.where(told, found, torch.nan)


def learns(run: Run, batch: Batch) -> Finding:
    """The supervised loss of a few examples is finite and moves the weights."""
    loss = summed(run.policy, batch, lambda values: values.sum().backward()).mean()
    found = [value.grad.float().norm() for value in run.policy.trainable().values() if value.grad is not None]
    run.optimizer.zero_grad(set_to_none=True)
    norm = torch.stack(found).norm() if found else torch.zeros(())
    sound = bool(norm > 0 and norm.isfinite() and loss.isfinite())
    return Finding(sound, "lesson", f"loss {float(loss):.4g}, gradient of norm {float(norm):.3e}")
