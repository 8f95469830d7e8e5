"""One improvement of a policy: what the loss is, apart from how a model is evaluated in bounded memory.

The loss is a function of small (B, S) tensors. Its slopes with respect to them are taken on detached leaves; then the
policy is replayed in chunks and each chunk's values are pushed back with their slopes. The parameter gradient equals that
of one large batch for every split. Axes: B samples, S decisions, b and s those of a chunk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.aggregations import weighted_sum
from mmgrpo.entropy import Band, mean_entropy, outside
from mmgrpo.facts import facts
from mmgrpo.kl import KL
from mmgrpo.objectives import Objective
from mmgrpo.ratios import masked
from mmgrpo.types import Chunk, Evaluation, Policy, Reference, Trajectory, require_shape, same_shape
from mmgrpo.weighting import selection

TOLD = ("kind", "group", "reward")  # fields of an evaluation that no policy computes
CONSTANTS = (  # fields of an evaluation that carry no gradient
    "sampler_gap", "step_std", "dt", "old_error", "reference_error", "clean_scale", "old_prediction", "target", "mask", *TOLD,
)  # fmt: skip


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite; the message names the term, the decisions and the samples."""


@dataclass(frozen=True)
class Loss:
    """The terms of a loss, each times its weight and summed over trained decisions.

    A weight without gradient around the objective concerns the objective alone: not the KL, not the denominators.
    """

    objective: Objective
    kl: KL | None = None
    kl_weight: float = 0.0
    anchor_weight: float = 0.0  # of -log p of what is imitated: LightningRL's NLL on correct samples (arXiv 2603.13319)
    entropy_weight: float | None = None  # of -the mean entropy; None: there is no such term
    band: Band | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of the evaluation that are asked for, beyond the log-ratio and those of the KL."""
        further = {"entropy": self.entropy_weight is not None, "log_prob": self.band is not None}
        return (*facts(self.objective).needs, *(name for name, asked in further.items() if asked))

    @property
    def refers(self) -> bool:
        """Whether a reference is asked for."""
        return self.kl_weight > 0 or facts(self.objective).refers

    @property
    def every(self) -> bool:
        """Whether samples of advantage 0 matter."""
        held = self.kl_weight > 0 or self.entropy_weight is not None or self.band is not None
        return held or facts(self.objective).every

    def whole(self, policy: Policy) -> bool:
        """Whether the loss joins decisions that a chunk of the policy's replay may not hold together."""
        couples = "batch" if self.band is not None else facts(self.objective).couples
        return couples == "batch" or (couples == "sample" and not policy.whole_samples)

    def terms(self, evaluation: Evaluation, given: "Given") -> dict[str, Tensor]:
        """The named terms, each a scalar."""
        counted = evaluation if given.imitate is None else masked(evaluation, given.weights.ne(0))
        several = [given.advantages] if given.separate is None else given.separate.unbind(-1)
        pulls = [weighted_sum(self.objective(counted, advantages), given.weights) for advantages in several]
        terms = {"objective": torch.stack(pulls).sum()}
        if self.kl is not None and self.kl_weight:
            terms["kl"] = self.kl_weight * weighted_sum(self.kl(evaluation), given.weights)
        if self.anchor_weight and given.imitate is not None:  # log_ratio stands for log p: the gradient is the same
            terms["anchor"] = self.anchor_weight * weighted_sum(-evaluation.log_ratio, given.imitate)
        if self.entropy_weight and given.evenly is not None:
            mean = mean_entropy(counted, given.advantages, given.evenly, selection(self.objective))
            terms["entropy"] = -self.entropy_weight * mean
        if self.band is not None and given.evenly is not None:
            terms["band"] = self.band.weight * outside(evaluation, given.evenly, self.band)
        return terms


class Given(NamedTuple):
    """What the loss knows of each decision beside its evaluation; (b, s) each, but for one."""

    advantages: Tensor
    weights: Tensor  # the reduction, 0 where a decision is not trained
    imitate: Tensor | None = None  # the reduction of the anchor, 0 where a decision is not imitated
    reward: Tensor | None = None  # the total reward of the decision's sample
    evenly: Tensor | None = None  # the mean over the update's decisions, for terms of the entropy
    separate: Tensor | None = None  # (b, s, K) advantages of which the objective is taken one by one

    def each(self, change: Callable[[Tensor], Tensor]) -> "Given":
        """Every tensor changed."""
        further = (None if value is None else change(value) for value in self[2:])
        return Given(change(self.advantages), change(self.weights), *further)

    def used(self) -> Tensor:
        """Which decisions the loss looks at, (b, s) bool."""
        return self.weights.ne(0) if self.imitate is None else self.weights.ne(0) | self.imitate.ne(0)


@dataclass
class Measured:
    """What the chunks of one update showed, put together: (B, S), NaN where nothing was evaluated."""

    loss: float = 0.0
    values: dict[str, Tensor] = field(default_factory=dict)  # fields of the evaluation, by name
    slope: Tensor | None = None  # d loss / d log_ratio
    found: set[str] = field(default_factory=set)  # fields that the policy evaluated, whole outputs too

    def note(self, shape: torch.Size, chunk: Chunk, loss: Tensor, slope: Tensor | None) -> None:
        self.loss += float(loss)
        self.found |= chunk.evaluation.tensors().keys()
        for name, value in small(chunk.evaluation).items():
            whole = self.values.setdefault(name, torch.full(shape, torch.nan))
            whole[chunk.rows.unsqueeze(1), chunk.steps] = value.detach().float().cpu()
        if slope is not None:
            self.slope = torch.full(shape, torch.nan) if self.slope is None else self.slope
            self.slope[chunk.rows.unsqueeze(1), chunk.steps] = slope.float().cpu()


def slopes(evaluation: Evaluation, given: Given, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its derivative by each field of the evaluation, on detached leaves; raises NonFiniteError."""
    trained = masked(evaluation, given.used())  # the others may hold anything, infinities included
    leaves = {name: value.detach().requires_grad_(name not in CONSTANTS) for name, value in trained.tensors().items()}
    with torch.enable_grad():
        terms = loss.terms(Evaluation(**leaves), given)
        total = torch.stack(list(terms.values())).sum()
    for name, term in terms.items():
        require_finite(name, term, trained)
    varied = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(total, list(varied.values()), allow_unused=True)
    return total.detach(), {name: slope for name, slope in zip(varied, found, strict=True) if slope is not None}


def require_finite(term: str, value: Tensor, evaluation: Evaluation) -> None:
    """Raise NonFiniteError naming the rows and columns of the chunk whose evaluation is not finite."""
    if torch.isfinite(value).all():
        return
    bad = {name: (~torch.isfinite(tensor)).nonzero().tolist()[:4] for name, tensor in evaluation.tensors().items()}
    where = ", ".join(f"{name} at (sample, decision) {places}" for name, places in bad.items() if places)
    raise NonFiniteError(f"the {term} term is {float(value.detach())}: {where or 'all of its inputs are finite'}")


def push(evaluation: Evaluation, found: Mapping[str, Tensor]) -> None:
    """Backward from the fields of a chunk's evaluation with the given slopes; frees the chunk's graph."""
    values = evaluation.tensors()
    pairs = [(values[name], slope) for name, slope in found.items() if values[name].requires_grad]
    if pairs:
        torch.autograd.backward([value for value, _ in pairs], [slope for _, slope in pairs])


def accumulate(
    policy: Policy,
    trajectory: Trajectory,
    given: Given,
    loss: Loss,
    reference: Reference | None = None,
    fresh: bool = False,
) -> Measured:
    """Add the gradient of the loss over a trajectory to the policy's parameters; what is given is (B, S).

    `fresh`: today's weights are those that sampled, so every log-ratio is known to be 0 without a forward.
    """
    same_shape(mask=trajectory.mask, advantages=given.advantages, weights=given.weights)
    held = reference if loss.refers else None
    measured = Measured()
    whole = whole_slopes(policy, trajectory, given, loss, held, fresh) if loss.whole(policy) else None

    def consume(chunk: Chunk) -> None:
        rows, steps, like = chunk.rows.unsqueeze(1), chunk.steps, chunk.evaluation.log_ratio
        require_shape("log_ratio", like, len(chunk.rows), len(chunk.steps))
        if whole is None:
            part = given.each(lambda value: value[rows, steps].to(like))
            total, found = slopes(informed(chunk.evaluation, trajectory, part, rows, steps), part, loss)
        else:
            total, found = torch.zeros(()), {name: slope[rows, steps].to(like) for name, slope in whole[1].items()}
        push(chunk.evaluation, found)
        measured.note(trajectory.mask.shape, chunk, total, found.get("log_ratio"))

    policy.replay(trajectory, consume, held)
    measured.loss += 0.0 if whole is None else float(whole[0])
    return measured


def whole_slopes(
    policy: Policy,
    trajectory: Trajectory,
    given: Given,
    loss: Loss,
    reference: Reference | None,
    fresh: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Slopes over the whole trajectory at once; costs a replay without gradient, except of the log-ratio alone when fresh."""
    if fresh and reference is None and not {*loss.needs} - {*TOLD}:
        evaluation = Evaluation(torch.zeros(trajectory.mask.shape))
    else:
        evaluation = evaluate(policy, trajectory, reference)
    like = evaluation.log_ratio
    part = given.each(lambda value: value.to(like))
    every = torch.arange(len(trajectory)).unsqueeze(1), torch.arange(trajectory.mask.shape[1])
    return slopes(informed(evaluation, trajectory, part, *every), part, loss)


def informed(evaluation: Evaluation, trajectory: Trajectory, given: Given, rows: Tensor, steps: Tensor) -> Evaluation:
    """The evaluation of the decisions [rows, steps] with their kind, group and reward."""
    device = evaluation.log_ratio.device
    kind, group = trajectory.kind[rows, steps], trajectory.group[rows].expand(evaluation.log_ratio.shape)
    return replace(evaluation, kind=kind.to(device), group=group.to(device), reward=given.reward)


def small(evaluation: Evaluation) -> dict[str, Tensor]:
    """The fields of one number per decision, by name; whole outputs (b, s, D) stay in their chunk."""
    return {name: value for name, value in evaluation.tensors().items() if value.dim() == 2}


@torch.no_grad()
def evaluate(policy: Policy, trajectory: Trajectory, reference: Reference | None = None) -> Evaluation:
    """The evaluation of every trained decision, without gradient; (B, S), 0 where nothing is trained."""
    parts: dict[str, Tensor] = {}

    def consume(chunk: Chunk) -> None:
        for name, value in small(chunk.evaluation).items():
            whole = parts.setdefault(name, torch.zeros(trajectory.mask.shape, dtype=value.dtype, device=value.device))
            whole[chunk.rows.unsqueeze(1), chunk.steps] = value

    policy.replay(trajectory, consume, reference)
    names = {item.name for item in fields(Evaluation)}
    if "log_ratio" not in parts:
        parts["log_ratio"] = torch.zeros(trajectory.mask.shape)
    return Evaluation(**{name: parts[name] for name in names & parts.keys()})
