"""The rollouts of one iteration: one, or as many as it takes until enough groups have differences to learn from.

Dynamic sampling of DAPO (arXiv 2503.14476, section 3.2) with a bounded number of rounds and an honest count.
Axes: P prompts, G samples per prompt, B = P * G samples.
"""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo import diagnostics
from mmgrpo.comparing import teaching, told
from mmgrpo.data import choose, requests
from mmgrpo.improve import evaluate
from mmgrpo.journal import Stopwatch
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.types import Batch, Feedback, Trajectory


class Gathered(NamedTuple):
    """What an iteration trains on, and everything that was generated for it."""

    trajectory: Trajectory  # of the P groups that are trained on
    feedback: Feedback  # of the same
    judged: Feedback  # of every sample generated
    metrics: dict[str, float]


def gather(run: Run, phases: Stopwatch) -> Gathered:
    """Roll out and score until P groups carry signal, at most `train.rounds` times; advances the run's counters.

    Groups that do come first, in the order they were drawn; if they are too few, the first ones that do not fill up.
    """
    options = run.recipe.train
    parts: list[tuple[Trajectory, Feedback]] = []
    while len(parts) < options.rounds and sum(groups_that_teach(run, part) for _, part in parts) < options.prompts:
        batch = next_batch(run)
        with phases.measure("rollout"):
            trajectory, samples = run.policy.rollout(batch)
        with phases.measure("score"):
            feedback = score(run.rewards, run.weights, samples, trajectory.mask.shape[1])
            parts.append((trajectory, told(run.compare, run.policy, feedback, trajectory, samples)))
        run.rollouts += 1
        run.samples += len(batch)
    judged = joined_feedback([feedback for _, feedback in parts])
    metrics = {"rollout/rounds": float(len(parts)), "rollout/generated": float(len(judged.group))}
    metrics |= {
        f"rollout/{name}": value for name, value in diagnostics.lengths([part.mask for part, _ in parts]).items()
    }
    if len(parts) == 1:
        return Gathered(*parts[0], judged, metrics)
    rows = first_that_teach(teaching(run.compare, judged), judged.group, options.prompts)
    whole = joined_trajectory([trajectory for trajectory, _ in parts])
    return Gathered(whole.take(rows), take_feedback(judged, rows), judged, metrics)


def held_back(run: Run, gathered: Gathered) -> Feedback:
    """The feedback of what is trained on, less loss.kl_in_reward * log pi_old / pi_ref of each sample (the estimate k1).

    As RLOO (arXiv 2402.14740) and REINFORCE++ (arXiv 2501.03262) hold to a reference, before the advantage; here as a further
    component "kl_to_reference", the sum over a sample's trained decisions, which an advantage that standardizes every reward
    treats as one of them. Rewards of parts stay as they are. Costs a replay without gradient.
    """
    feedback, weight = gathered.feedback, run.recipe.loss.kl_in_reward
    if not weight:
        return feedback
    away = evaluate(run.policy, gathered.trajectory, run.reference).to_reference
    assert away is not None  # there is a reference, the recipe was checked
    whole = torch.where(gathered.trajectory.mask, away.cpu(), 0).sum(1).float()
    judged = torch.where(feedback.total().isnan(), torch.nan, whole)
    gathered.metrics["rollout/kl_to_reference"] = float(judged.nanmean())
    name = "kl_to_reference"
    if name in feedback.rewards:
        raise ValueError(f"a reward is named {name!r}; expected another name beside loss.kl_in_reward, which adds one")
    return replace(feedback, rewards={**feedback.rewards, name: judged}, weights={**feedback.weights, name: -weight})


def next_batch(run: Run) -> Batch:
    """The requests of the next rollout; prompts, groups and sample ids go on from the one before."""
    options = run.recipe.train
    return requests(
        run.prompts,
        choose(len(run.prompts), options.prompts, run.recipe.seed, run.rollouts),
        group_size=options.group_size,
        seed=run.recipe.seed,
        iteration=run.iteration,
        first_group=run.rollouts * options.prompts,
    )


def groups_that_teach(run: Run, feedback: Feedback) -> int:
    """How many groups carry signal for the run's advantage."""
    return len(feedback.group[teaching(run.compare, feedback)].unique())


def first_that_teach(teach: Tensor, group: Tensor, count: int) -> Tensor:
    """The rows of `count` groups in the order of their rows, those that teach before the others; (B,), (B,) -> (b,) int64."""
    order = torch.cat([teach.nonzero().flatten(), (~teach).nonzero().flatten()])
    chosen = list(dict.fromkeys(group[order].tolist()))[:count]
    return torch.isin(group, torch.tensor(chosen)).nonzero().flatten()


def joined_trajectory(parts: Sequence[Trajectory]) -> Trajectory:
    """The rows of several rollouts of one iteration."""
    first = parts[0].batch
    batch = replace(
        first,
        prompts=tuple(prompt for part in parts for prompt in part.batch.prompts),
        group=torch.cat([part.batch.group for part in parts]),
        sample=torch.cat([part.batch.sample for part in parts]),
    )
    record = {name: torch.cat([part.record[name] for part in parts]) for name in parts[0].record}
    return Trajectory(batch, torch.cat([part.mask for part in parts]), torch.cat([part.kind for part in parts]), record)


def joined_feedback(parts: Sequence[Feedback]) -> Feedback:
    """The rows of several rollouts; raises ValueError if their rewards have other components."""
    names = list(parts[0].rewards)
    for part in parts:
        if list(part.rewards) != names:
            raise ValueError(f"rewards have components {list(part.rewards)} in one round and {names} in another")
    first = parts[0]

    def whole(name: str) -> Tensor | None:
        values = [value for value in map(attrgetter(name), parts) if value is not None]
        return torch.cat(values) if values else None

    return Feedback(
        {name: torch.cat([part.rewards[name] for part in parts]) for name in names},
        first.weights,
        torch.cat([part.group for part in parts]),
        whole("step_rewards"),
        tuple(prompt for part in parts for prompt in part.prompts),
        whole("mask"),
        {name: torch.cat([part.facts[name] for part in parts]) for name in first.facts},
    )


def take_feedback(feedback: Feedback, rows: Tensor) -> Feedback:
    """The given rows of every component."""
    steps, mask = feedback.step_rewards, feedback.mask
    return Feedback(
        {name: values[rows] for name, values in feedback.rewards.items()},
        feedback.weights,
        feedback.group[rows],
        None if steps is None else steps[rows],
        tuple(feedback.prompts[row] for row in rows.tolist()) if feedback.prompts else (),
        None if mask is None else mask[rows],
        {name: values[rows] for name, values in feedback.facts.items()},
    )
