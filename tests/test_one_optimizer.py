"""One objective serves tokens and denoising steps alike: every one of the core over a policy of every kind."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from policy_kinds import KINDS, PolicyKind
from torch import Tensor

from mmgrpo.advantages import centered, gdpo, leave_one_out, scaled_sum, standardized
from mmgrpo.aggregations import seq_mean
from mmgrpo.contrasts import disco, disco_ratio, dno, dno_hard
from mmgrpo.data import requests
from mmgrpo.denoising import divergence_bound, noise_weighted
from mmgrpo.facts import facts
from mmgrpo.improve import TOLD, Given, Loss, accumulate, evaluate
from mmgrpo.objectives import (
    cispo,
    clipped,
    dhpo,
    dhpo_guided,
    elastic,
    gmpo,
    gspo,
    gspo_token,
    guarded,
    reinforce,
    rloo,
    sapo,
    vespo,
)
from mmgrpo.off_policy import asymre, opmd_kimi, rec_one_side_is, rec_ring, red_weight
from mmgrpo.types import Feedback, Policy, Trajectory
from mmgrpo.weighting import by_kind, sampler_corrected, top_entropy, without_stale

EVERYWHERE = {  # with every policy
    "clipped": clipped,
    "guarded": guarded,
    "gspo": gspo,
    "cispo": cispo,
    "sampler_corrected": sampler_corrected(),
    "top_entropy": top_entropy(share=0.5),
    "by_kind": by_kind(token_weight=0.5, draw=clipped),
    "disco": disco,
    "dno": dno,
}
OBJECTIVES = EVERYWHERE | {
    "divergence_bound": divergence_bound,
    "noise_weighted": noise_weighted(),
    "two-sided": partial(clipped, ceiling=3.0),
    "reinforce": reinforce,
    "gspo_token": gspo_token,
    "rloo": rloo,
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
    "dhpo": dhpo,
    "dhpo_guided": dhpo_guided,
    "elastic": elastic,
    "without_stale": without_stale(),
    "rec_one_side_is": rec_one_side_is,
    "rec_ring": rec_ring,
    "opmd_kimi": opmd_kimi,
    "asymre": asymre,
    "red_weight": red_weight,
    "disco_ratio": disco_ratio,
    "dno_hard": dno_hard,
}
FEW = ("speech", "text")  # policies that the others meet: the quickest of steps and of tokens
ADVANTAGES = {
    "standardized": standardized,
    "centered": centered,
    "leave_one_out": leave_one_out,
    "gdpo": gdpo,
    "scaled_sum": scaled_sum,
}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_objective = pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{name}-{kind.name}")
        for name in OBJECTIVES
        for kind in KINDS
        if name in EVERYWHERE or kind.name in FEW
    ],
)


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[None]:
    with TemporaryDirectory() as place:
        rolled.folder = Path(place)  # type: ignore[attr-defined]
        yield
    made.cache_clear()
    rolled.cache_clear()


@cache
def made(kind: PolicyKind, finer: bool) -> tuple[Policy, list]:
    place = Path(rolled.folder) / f"{kind.name} {finer}"  # type: ignore[attr-defined]
    place.mkdir()
    torch.manual_seed(0)
    policy, prompts = kind.make(place)
    if finer:
        kind.finer(policy)
    return policy, prompts


@cache
def rolled(kind: PolicyKind) -> Trajectory:
    policy, prompts = made(kind, False)
    return policy.rollout(requests(prompts, [0, 1], group_size=3, seed=3, iteration=0))[0]


def rewards(group: Tensor) -> Feedback:
    """Two rewards in which every group has spread."""
    draw = torch.rand(2, len(group), generator=torch.Generator().manual_seed(1))
    return Feedback({"a": draw[0], "b": draw[1]}, {"a": 1.0, "b": 0.5}, group)


def advantages(trajectory: Trajectory) -> Tensor:
    values = standardized(rewards(trajectory.group)).values
    return values.unsqueeze(1).expand(trajectory.mask.shape).contiguous()


def gradient(policy: Policy, trajectory: Trajectory, loss: Loss, fresh: bool = True) -> Tensor:
    better = advantages(trajectory)
    given = Given(better, seq_mean(trajectory.mask), reward=better.gt(0).float())
    accumulate(policy, trajectory, given, loss, fresh=fresh)
    parameters = policy.trainable().values()
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def feeds(kind: PolicyKind, name: str) -> bool:
    """Whether the policy evaluates all that an objective asks for."""
    there = evaluate(made(kind, False)[0], rolled(kind)).tensors().keys() | {*TOLD, "mask"}
    return set(facts(OBJECTIVES[name]).needs) <= there


@every_kind
def test_on_policy_every_trained_decision_has_a_log_ratio_of_exactly_zero(kind):
    policy, _ = made(kind, False)
    assert rolled(kind).mask.any()
    assert evaluate(policy, rolled(kind)).log_ratio.abs().max() == 0


@every_objective
def test_the_gradient_does_not_depend_on_the_chunks(kind, name):
    if not feeds(kind, name):
        with pytest.raises(ValueError, match=r"the objective needs '\w+' of every decision; the policy evaluates"):
            gradient(made(kind, False)[0], rolled(kind), Loss(OBJECTIVES[name]))
        return
    whole = gradient(made(kind, False)[0], rolled(kind), Loss(OBJECTIVES[name]))
    parts = gradient(made(kind, True)[0], rolled(kind), Loss(OBJECTIVES[name]))
    assert whole.norm() > 0
    assert (whole - parts).norm() <= 2e-4 * whole.norm()  # float32, other batch shapes


@every_objective
def test_a_step_raises_the_log_ratio_of_what_was_better_than_average(kind, name):
    if not feeds(kind, name):
        pytest.skip("the policy does not evaluate what it needs; the test above asks for the sentence that says so")
    policy, trajectory = made(kind, False)[0], rolled(kind)
    slope = gradient(policy, trajectory, Loss(OBJECTIVES[name]))
    parameters = list(policy.trainable().values())
    kept = [parameter.detach().clone() for parameter in parameters]
    anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
    length = 1e-3 * torch.cat([value.flatten() for value in kept]).norm() / slope.norm()
    with torch.no_grad():
        for parameter, part in zip(parameters, slope.split([p.numel() for p in parameters]), strict=True):
            parameter -= length * part.view_as(parameter)
        moved = evaluate(policy, anchored).log_ratio
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    pulled = trajectory.mask
    if "step_std" in facts(OBJECTIVES[name]).needs:  # tokens beside steps have no width to pull on
        pulled = pulled & (evaluate(policy, trajectory).step_std > 0)
    weighted = torch.where(pulled, moved * advantages(trajectory) * seq_mean(trajectory.mask), 0)
    assert weighted.sum() > 0


@every_kind
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_compare_the_samples_of_a_prompt_whatever_made_them(kind, name):
    found = ADVANTAGES[name](rewards(rolled(kind).group))
    assert found.keep.all() and found.values.isfinite().all() and found.values.abs().max() > 0
    for number in rolled(kind).group.unique():
        assert float(found.values[rolled(kind).group == number].sum()) == pytest.approx(0, abs=1e-5)
