"""A softmax policy over a finite number of states, a copy of it for every run, and the worlds that it acts in.

All runs of a claim are one policy and one batch: their weights lie beside each other and never meet. The logits of a state are
linear in its features; one-hot features make it a table. Axes: R runs, P prompts, G samples per prompt, B = R * P * G samples,
S decisions, N states, D features, K actions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from mmgrpo.entropy_clip import expected_discriminator
from mmgrpo.types import Batch, Chunk, Consumer, Evaluation, Prompt, Reference, Trajectory

END = -1  # the state after a sample's last decision


@dataclass(frozen=True)
class Drawn:
    """What one rollout shows a reward."""

    state: Tensor  # (R, P, G, S) int64
    action: Tensor  # (R, P, G, S) int64
    taken: Tensor  # (R, P, G, S) bool: the sample had not ended before
    noise: Tensor  # (R, P, G, 2) uniform in [0, 1)


Scores = Mapping[str, Tensor]  # name -> (R, P, G)
Measure = Callable[["Tables"], Tensor]  # of every prompt under the trained policy; -> (R, P)


@dataclass(frozen=True)
class World:
    """A task, drawn for each of R seeds."""

    features: Tensor  # (R, N, D)
    start: Tensor  # (R, D, K) weights
    first: Tensor  # (P,) int64 state of each prompt's first decision
    moves: Tensor  # (N, K) int64 the state after an action, or END
    decisions: int  # S at most
    reward: Callable[[Drawn], Scores]
    chance: Measure  # what training is for, in expectation and without the rewards' noise
    weights: Mapping[str, float]  # of the rewards
    trained: Tensor  # (S,) bool: other decisions are drawn and not learned from
    sampler: Tensor | None = None  # (R, N, K) what other kernels add to the sampler's logits
    columns: Sequence[Mapping[str, object]] = ()  # P, of the prompts
    gain: Tensor | None = None  # (R, P, K) expected reward of an action, for worlds of one decision


class Tables:
    """The policy of every run."""

    whole_samples = True

    def __init__(self, world: World) -> None:
        self.features = world.features
        self.weight = Parameter(world.start.clone())

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """(R, N, K), with gradient."""
        return (self.features @ self.weight / temperature).log_softmax(-1)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        table, at = self.log_probs(), places(trajectory)
        log_prob = table[*at, trajectory.record["action"]]
        entropy = -(table.exp() * table).sum(-1)[at]
        found = Evaluation(
            log_prob - trajectory.record["old"],
            entropy=entropy,
            log_prob=log_prob,
            sampler_gap=trajectory.record["gap"],
        )
        consume(Chunk(torch.arange(len(trajectory)), torch.arange(log_prob.shape[1]), found))

    @torch.no_grad()
    def facts(self, trajectory: Trajectory, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Of the decisions under today's weights; keys of states and edges are in the record."""
        table, at, action = self.log_probs(), places(trajectory), trajectory.record["action"]
        known: dict[str, Callable[[], Tensor]] = {
            "log_prob": lambda: table[*at, action],
            "entropy": lambda: -(table.exp() * table).sum(-1)[at],
            "expected_discriminator": lambda: expected_discriminator(table.exp())[at],
            "hidden": lambda: self.features[at],
            "residual": lambda: torch.eye(table.shape[-1])[action] - table.exp()[at],
        }
        hot = [name for name in names if name.startswith("log_prob at ")]
        at_temperature = {name: self.log_probs(float(name.split()[-1]))[*at, action] for name in hot}
        return {name: known[name]() for name in names if name not in hot} | at_temperature


def places(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Run and state of every decision, which index (R, N, ...)."""
    return trajectory.record["run"].unsqueeze(1), trajectory.record["state"]


@torch.no_grad()
def roll(policy: Tables, world: World, samples: int, streams: Sequence[torch.Generator]) -> tuple[Trajectory, Drawn]:
    """So many samples of every prompt in every run, drawn from the run's own stream."""
    table = policy.log_probs()
    acting = table if world.sampler is None else (table + world.sampler).log_softmax(-1)
    levels = acting.exp().cumsum(-1)
    runs, prompts, steps = len(table), len(world.first), world.decisions
    shape = (prompts, samples, steps + 2)
    uniform = torch.stack([torch.rand(shape, generator=stream) for stream in streams])  # (R, P, G, S + 2)
    run = torch.arange(runs).view(-1, 1, 1).expand(runs, prompts, samples)
    state, columns = world.first.view(1, -1, 1).expand_as(run), []
    for step in range(steps):
        there = state != END
        at = state.clamp(min=0)
        action = (uniform[..., step, None] > levels[run, at]).sum(-1).clamp(max=table.shape[-1] - 1)
        columns.append((at, action, there))
        state = torch.where(there, world.moves[at, action], END)
    states, actions, taken = (torch.stack(parts, -1) for parts in zip(*columns, strict=True))
    drawn = Drawn(states, actions, taken, uniform[..., steps:])
    return recorded(world, table, acting, drawn), drawn


def recorded(world: World, table: Tensor, acting: Tensor, drawn: Drawn) -> Trajectory:
    """A rollout as the optimizer sees it; rows are ordered by run, prompt, sample."""
    runs, prompts, samples, steps = drawn.state.shape
    state, action = drawn.state.flatten(0, 2), drawn.action.flatten(0, 2)
    run = torch.arange(runs).repeat_interleave(prompts * samples)
    old, sampled = (values[run.unsqueeze(1), state, action] for values in (table, acting))
    record = {"run": run, "state": state, "action": action, "old": old, "gap": old - sampled}
    record |= {"edge": state * table.shape[-1] + action, "present": action == 1}
    columns = world.columns or [{}] * prompts
    asked = tuple(Prompt(number, "", columns=columns[number]) for number in range(prompts) for _ in range(samples))
    group = torch.arange(runs * prompts).repeat_interleave(samples)
    batch = Batch(asked * runs, group, torch.arange(len(group)), seed=0, iteration=0)
    mask = drawn.taken.flatten(0, 2) & world.trained
    return Trajectory(batch, mask, torch.ones_like(state), record)
