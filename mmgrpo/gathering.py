"""The rollouts of one iteration: one, or as many as it takes until enough groups have differences to learn from.

Dynamic sampling of DAPO (arXiv 2503.14476, section 3.2) with a bounded number of rounds and an honest count; groups of earlier
iterations stand in for what is still missing (mmgrpo/recall.py).
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
from mmgrpo.previewing import previewed
from mmgrpo.recall import Kept, best, fits, in_memory, places, scores, young
from mmgrpo.run import Run
from mmgrpo.scoring import score
from mmgrpo.types import Advantage, Batch, Feedback, Trajectory


class Gathered(NamedTuple):
    """What an iteration trains on, and everything that was generated for it."""

    trajectory: Trajectory  # of the P groups that are trained on
    feedback: Feedback  # of the same
    judged: Feedback  # of every sample generated
    metrics: dict[str, float]
    past: Tensor  # (B,) bool: sampled in an earlier iteration, by other weights


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
            trajectory = previewed(run.compare, run.policy, run.rewards, run.weights, trajectory, feedback)
            parts.append((trajectory, told(run.compare, run.policy, feedback, trajectory, samples)))
        run.rollouts += 1
        run.samples += len(batch)
    judged = joined_feedback([feedback for _, feedback in parts])
    metrics = {"rollout/rounds": float(len(parts)), "rollout/generated": float(len(judged.group))}
    metrics |= {
        f"rollout/{name}": value for name, value in diagnostics.lengths([part.mask for part, _ in parts]).items()
    }
    if len(parts) == 1:
        return Gathered(*parts[0], judged, metrics, torch.zeros(len(judged.group), dtype=torch.bool))
    rows = first_that_teach(teaching(run.compare, judged), judged.group, options.prompts)
    whole = joined_trajectory([trajectory for trajectory, _ in parts])
    past = torch.zeros(len(rows), dtype=torch.bool)
    return Gathered(whole.take(rows), take_feedback(judged, rows), judged, metrics, past)


def recalled(run: Run, gathered: Gathered) -> Gathered:
    """The same, groups that carry no signal replaced by kept ones of earlier iterations, as far as there are any.

    A recalled group leaves the kept ones. Without `recall.groups` nothing changes.
    """
    options, trajectory, feedback = run.recipe.recall, gathered.trajectory, gathered.feedback
    if not options.groups:
        return gathered
    run.kept = young(run.kept, run.iteration, options.age)
    dull = feedback.group[~teaching(run.compare, feedback)].unique()
    chosen = best([group for group in run.kept if fits(group, trajectory)], len(dull))
    run.kept = [group for group in run.kept if group not in chosen]
    gathered.metrics["rollout/recalled"] = float(len(chosen))
    if not chosen:
        return gathered
    gathered.metrics["rollout/recalled_age"] = sum(run.iteration - group.iteration for group in chosen) / len(chosen)
    replaced = torch.isin(feedback.group, dull[: len(chosen)])
    stay, order = (~replaced).nonzero().flatten(), places(feedback.group, replaced)
    whole = joined_trajectory([trajectory.take(stay), *(group.trajectory for group in chosen)])
    judged = joined_feedback([take_feedback(feedback, stay), *(group.feedback for group in chosen)])
    past = torch.arange(len(whole)) >= len(stay)
    return gathered._replace(trajectory=whole.take(order), feedback=take_feedback(judged, order), past=past[order])


def store(run: Run, gathered: Gathered, advantage: Advantage) -> None:
    """Keep the best of today's groups and of those kept so far; before the weights change, which costs a replay of the new ones."""
    options, feedback = run.recipe.recall, gathered.feedback
    if not options.groups:
        return
    score = torch.where(gathered.past, 0, scores(advantage.values, feedback))
    rows = {int(group): (feedback.group == group).nonzero().flatten() for group in feedback.group[score > 0].unique()}
    fresh = [
        Kept(float(score[part[0]]), run.iteration, gathered.trajectory.take(part), take_feedback(feedback, part))
        for part in rows.values()
    ]
    chosen = best([*run.kept, *fresh], options.groups)
    run.kept = [of_today(run, group) if group in fresh else group for group in chosen]
    gathered.metrics["rollout/kept"] = float(len(run.kept))


def of_today(run: Run, group: Kept) -> Kept:
    """A group of this rollout with what its replays are compared with, under the weights that sampled it."""
    known = run.policy.anchor(group.trajectory, [torch.arange(len(group.trajectory))])
    return replace(group, trajectory=in_memory(known))


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
    """The rows of several rollouts, on the first one's devices; what only some recorded, such as anchors, is NaN in the others."""
    first = parts[0].batch
    batch = replace(
        first,
        prompts=tuple(prompt for part in parts for prompt in part.batch.prompts),
        group=torch.cat([part.batch.group for part in parts]),
        sample=torch.cat([part.batch.sample for part in parts]),
    )
    names = dict.fromkeys(name for part in parts for name in part.record)
    record = {name: _whole(name, parts) for name in names}
    return Trajectory(batch, torch.cat([part.mask for part in parts]), torch.cat([part.kind for part in parts]), record)


def _whole(name: str, parts: Sequence[Trajectory]) -> Tensor:
    """What several rollouts recorded under a name, NaN for those that did not; (B, ...)."""
    like = next(part.record[name] for part in parts if name in part.record)
    return torch.cat(
        [
            part.record[name].to(like.device)
            if name in part.record
            else torch.full((len(part), *like.shape[1:]), torch.nan, dtype=like.dtype, device=like.device)
            for part in parts
        ]
    )


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
