"""Test that a run would train what its recipe says, before it trains: replay, gradients, objective, rewards."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from mmgrpo import diagnostics
from mmgrpo.aggregations import token_mean
from mmgrpo.comparing import told
from mmgrpo.data import requests
from mmgrpo.improve import TOLD, Given, Measured, accumulate
from mmgrpo.offline import require_redrawable
from mmgrpo.previewing import previewed
from mmgrpo.ratios import decision
from mmgrpo.recipe import Recipe
from mmgrpo.run import Run, start
from mmgrpo.scoring import score
from mmgrpo.selection import imitated
from mmgrpo.teaching import learns
from mmgrpo.types import Batch, Evaluation, Finding, Samples, Trajectory
from mmgrpo.weighting import Clip, narrowest

FEWEST = 2  # prompts that are tried
LISTED = 32  # trained decisions that are named one by one


@dataclass(frozen=True)
class Report:
    """What a check found."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def lines(self) -> list[str]:
        return [f"{'ok  ' if finding.ok else 'FAIL'} {finding.name}: {finding.detail}" for finding in self.findings]


class Unsound(ValueError):  # noqa: N818 - names what the recipe is
    """A run that would not train what its recipe says; the message lists what failed."""


def check(recipe: Recipe) -> Report:
    """Build a recipe's components and examine them."""
    return examine(start(recipe))


def require_sound(run: Run, folder: Path) -> None:
    """Examine a run, write check.txt, and refuse to train if anything fails; raises Unsound."""
    report = examine(run)
    (folder / "check.txt").write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    if not report.ok:
        failed = "; ".join(f"{finding.name}: {finding.detail}" for finding in report.findings if not finding.ok)
        raise Unsound(f"the run would not train what its recipe says: {failed}")


def examine(run: Run) -> Report:
    """Everything that must hold at the start of a run."""
    if run.recipe.train.stage == "offline":
        require_redrawable(run)
    findings = run.policy.self_test(run.prompts[:4])
    if run.recipe.train.stage == "pretrain":
        return Report((*findings, learns(run, probe(run)), updates_survive(run)))
    trajectory, samples = run.policy.rollout(probe(run))
    findings += [trained_decisions(trajectory), *objective_pulls(run, trajectory), updates_survive(run)]
    findings += rewards_are_sound(run, samples)
    findings.append(comparison(run, trajectory, samples))
    return Report(tuple(findings))


def probe(run: Run) -> Batch:
    """Two small groups, whole ones where their samples share out several routes, under seeds that training does not use."""
    count = min(FEWEST, len(run.prompts))
    size = run.recipe.train.group_size if "routes" in run.recipe.policy else min(run.recipe.train.group_size, 4)
    return requests(run.prompts, range(count), group_size=size, seed=run.recipe.seed + 1, iteration=0)


def trained_decisions(trajectory: Trajectory) -> Finding:
    steps = trajectory.mask.any(0).nonzero().flatten().tolist()
    listed = steps if len(steps) <= LISTED else f"{steps[0]} to {steps[-1]}"
    return Finding(bool(steps), "plan", f"decisions {listed} of {trajectory.mask.shape[1]} are trained")


def objective_pulls(run: Run, trajectory: Trajectory) -> list[Finding]:
    """Each term of the loss moves the weights, and the objective has what it needs."""
    advantages = torch.ones(trajectory.mask.shape)
    advantages[1::2] = -1
    weights, evenly = run.aggregate(trajectory.mask), token_mean(trajectory.mask)
    held = run.reference if run.reference.active else None
    given = Given(advantages, weights, reward=advantages.clamp(min=0), evenly=evenly)
    measured = accumulate(run.policy, trajectory, given, run.loss, held)
    found = [value.grad for value in run.policy.trainable().values() if value.grad is not None]
    norm = torch.stack([value.norm() for value in found]).norm() if found else torch.zeros(())
    for value in run.policy.trainable().values():
        value.grad = None
    missing = [name for name in run.loss.needs if name not in {*measured.found, *TOLD}]
    worst = float(torch.where(trajectory.mask, measured.values["log_ratio"], 0).abs().max())
    return [
        Finding(not missing, "objective", f"lacks {missing}" if missing else "has every field that it needs"),
        Finding(worst == 0, "on-policy", f"largest |log-ratio| {worst:.1e}; expected exactly 0"),
        Finding(bool(norm > 0 and norm.isfinite()), "gradient of the loss", f"norm {float(norm):.3e}"),
        *sampler_noise(run, trajectory, measured),
    ]


def sampler_noise(run: Run, trajectory: Trajectory, measured: Measured) -> list[Finding]:
    """A sampler that computes by other kernels than the replay differs from it by less than what the objective clips."""
    if "sampler_gap" not in measured.values:
        return []
    gap, mask = torch.where(trajectory.mask, measured.values["sampler_gap"], 0), trajectory.mask
    width, level = narrowest(run.loss.objective) or Clip(math.inf, decision)
    moved = level(Evaluation(gap, sampler_gap=torch.zeros_like(gap), mask=mask))
    noise = float(diagnostics.masked_mean(moved.abs(), mask))
    said = f"its log-probs differ from the replay's by {noise:.1e} nats on average"
    if noise < width:
        return [Finding(True, "sampler", said)]
    wanted = "expected more: widen objective.low and objective.high, or sample in a finer dtype"
    return [Finding(False, "sampler", f"{said}, the objective clips at {width:g}; {wanted}")]


def comparison(run: Run, trajectory: Trajectory, samples: Samples) -> Finding:
    """The advantage finds what it needs in the rewards."""
    try:
        judged = score(run.rewards, run.weights, samples, trajectory.mask.shape[1])
        trajectory = previewed(run.compare, run.policy, run.rewards, run.weights, trajectory, judged)
        compare = copy.deepcopy(run.compare)  # which may remember what it saw
        advantage = compare(told(compare, run.policy, judged, trajectory, samples))
        imitated(advantage, run.loss.anchor_weight)
    except ValueError as error:
        return Finding(False, "advantage", str(error))
    return Finding(
        True, "advantage", f"values {tuple(advantage.values.shape)}, {int(advantage.keep.sum())} samples kept"
    )


def updates_survive(run: Run) -> Finding:
    """A step as long as the learning rate, about Adam's, moves most weights: in bfloat16 small ones are rounded away."""
    rate, trained = run.recipe.optimizer.learning_rate, run.policy.trainable().values()
    moved = sum(int((value.detach() + rate != value).sum()) for value in trained)
    share = moved / sum(value.numel() for value in trained)
    detail = f"a step of the learning rate {rate:g} moves {share:.0%} of the trained weights"
    return Finding(share > 0.5, "rounding", detail if share > 0.5 else f"{detail}; expected most, as in float32")


def rewards_are_sound(run: Run, samples: Samples) -> list[Finding]:
    """Shuffled samples get shuffled scores, and the start has differences to learn from."""
    asked = run.rewards | run.watched
    scores = score(asked, run.weights, samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    shuffled = score(asked, run.weights, samples.take(order))
    findings = []
    for name, values in scores.rewards.items():
        same = torch.allclose(values[order], shuffled.rewards[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        detail = "scores follow their samples" if same else "scores change when the samples are shuffled"
        findings.append(Finding(same, f"reward {name}", detail))
        heard = values[~values.isnan()]
        spread = float(heard.std(correction=0)) if len(heard) else 0.0
        findings.append(
            Finding(len(heard) > 0, f"spread of {name}", f"mean {float(heard.mean()):.4g}, std {spread:.2g}")
        )
    return findings
