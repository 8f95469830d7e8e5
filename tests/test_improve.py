"""The seam: the parameter gradient is the same for every way of cutting a rollout into chunks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mmgrpo.aggregations import seq_mean, token_mean
from mmgrpo.contrasts import disco, disco_ratio, dno, regressed
from mmgrpo.data import requests
from mmgrpo.entropy import Band
from mmgrpo.group_matching import dgpo, gdro, of_old
from mmgrpo.improve import Given, Loss, NonFiniteError, accumulate, slopes
from mmgrpo.kl import ByKind, estimated_k2
from mmgrpo.matching import OUTPUTS, advantage_weighted, awm_tuned, huber, nft, nft_plain
from mmgrpo.objectives import clipped, elastic, gspo, guarded, reinforce
from mmgrpo.off_policy import opmd_kimi
from mmgrpo.ratios import masked
from mmgrpo.selection import extremes, imitated, minibatches
from mmgrpo.transitions import Gaussian, kl, log_ratio
from mmgrpo.types import Advantage, Batch, Chunk, Consumer, Evaluation, Prompt, Reference, Trajectory
from mmgrpo.weighting import by_kind, top_entropy

B, S, D = 6, 4, 5


class GaussianPolicy:
    """A real policy at toy size: every decision is Gaussian around a linear map of its state; axes D features."""

    whole_samples = False

    def __init__(self, rows: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.map = nn.Linear(D, D, bias=False).double()
        with torch.no_grad():
            self.map.weight.copy_(torch.randn(D, D, generator=generator, dtype=torch.float64))
        self.rows, self.steps = rows, steps
        self.std = torch.tensor(0.5, dtype=torch.float64)

    def trajectory(self, batch: Batch) -> Trajectory:
        generator = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, B, S, D, generator=generator, dtype=torch.float64)
        state, old = draw(), draw()
        record = {"state": state, "old": old, "next": old + self.std * draw(), "reference": draw()}
        mask = torch.ones(B, S, dtype=torch.bool)
        mask[1, 2] = mask[4, 0] = False
        return Trajectory(batch, mask, torch.arange(B * S).view(B, S) % 3 % 2, record)  # kinds alternate unevenly

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        for rows in torch.arange(len(trajectory)).split(self.rows):
            for steps in torch.arange(S).split(self.steps):
                part = {name: value[rows][:, steps].flatten(0, 1) for name, value in trajectory.record.items()}
                new = Gaussian(self.map(part["state"]), self.std)
                old = Gaussian(part["old"], self.std)
                shape = (len(rows), len(steps))
                other = Gaussian(part["reference"], self.std)
                held = None if reference is None else kl(new, other).view(shape)
                distance = None if reference is None else log_ratio(part["next"], new, other).view(shape)
                consume(
                    Chunk(
                        rows,
                        steps,
                        Evaluation(
                            log_ratio(part["next"], new, old).view(shape),
                            kl=held,
                            to_reference=distance,
                            drift=kl(new, old).view(shape),
                            step_std=torch.full(shape, 0.5, dtype=torch.float64),
                            dt=torch.full(shape, 0.1, dtype=torch.float64),
                            entropy=new.mean.square().sum(1).view(shape),  # stands for any number that varies
                            log_prob=log_ratio(part["next"], new, Gaussian(0 * new.mean, self.std)).view(shape),  # too
                            **drawn(new.mean, part, shape),
                        ),
                    )
                )

    def trainable(self) -> dict[str, Parameter]:
        return {"map.weight": self.map.weight}


def drawn(new: Tensor, part: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The decisions as draws whose output is the mean and whose target is what was sampled."""
    outputs = {"prediction": new, "old_prediction": part["old"], "target": part["next"]}
    found = {name: value.view(*shape, D) for name, value in outputs.items()}
    for name, value in (("error", new), ("old_error", part["old"]), ("reference_error", part["reference"])):
        found[name] = (value - part["next"]).square().mean(1).view(shape)
    return found | {"clean_scale": part["reference"][:, 0].sigmoid().view(shape)}  # any number in (0, 1)


def batch() -> Batch:
    return requests([Prompt(0, "a"), Prompt(1, "b")], [0, 1], group_size=3, seed=0, iteration=0)


def the_kl(evaluation: Evaluation) -> Tensor:
    assert evaluation.kl is not None
    return evaluation.kl


LOSSES = {
    "clipped": Loss(partial(clipped, low=0.3, high=0.3)),
    "two-sided": Loss(partial(clipped, low=0.3, high=0.3, ceiling=2.0)),
    "reinforce": Loss(reinforce),
    "guarded": Loss(partial(guarded, low=0.3, high=0.3)),
    "clipped with KL": Loss(partial(clipped, low=0.3, high=0.3), the_kl, 0.1),
    "coupled": Loss(partial(gspo, low=0.5, high=0.5)),
    "coupled with KL": Loss(partial(gspo, low=0.5, high=0.5), the_kl, 0.1),
    "by kind": Loss(by_kind(step=partial(guarded, low=0.3, high=0.3), token=clipped, token_weight=0.1)),
    "by kind, coupled": Loss(by_kind(step=partial(gspo, low=0.5, high=0.5), token=clipped, token_weight=0.1)),
    "KL by kind": Loss(clipped, ByKind({0: (the_kl, 1.0), 1: (estimated_k2, 0.1)}), 0.1),
    "with an anchor": Loss(clipped, anchor_weight=0.1),
    "coupled with an anchor": Loss(partial(gspo, low=0.5, high=0.5), anchor_weight=0.1),
    "contrasted": Loss(disco_ratio),
    "contrasted log-probs": Loss(partial(disco, penalty=1.0)),
    "paired": Loss(dno),
    "elastic": Loss(partial(elastic, low=0.4, high=0.4, most=0.9)),
    "coupled, against the reference": Loss(partial(regressed, strength=0.1)),
    "pulled back": Loss(opmd_kimi),
    "with an entropy bonus": Loss(clipped, entropy_weight=0.3),
    "in a band of entropy": Loss(clipped, band=Band(5.0, 6.0, 0.2)),
    "with a bonus of the chosen": Loss(top_entropy(objective=clipped, share=0.5), entropy_weight=0.3),
    "matched": Loss(nft),
    "matched in the space of outputs": Loss(partial(nft_plain, strength=0.3), the_kl, 0.1),
    "advantage weighted": Loss(
        partial(advantage_weighted, objective=partial(clipped, low=0.3, high=0.3), weighting=huber)
    ),
    "coupled, advantage weighted": Loss(partial(advantage_weighted, objective=partial(gspo, low=0.5, high=0.5))),
    "advantage weighted and held": Loss(awm_tuned),
    "preferred": Loss(partial(dgpo, strength=3.0, clip=0.5)),
    "preferred to the old": Loss(partial(dgpo, strength=0.3, against=of_old, clip=None, exact=True), the_kl, 0.1),
    "ranked": Loss(partial(gdro, strength=1.0)),
    "ranked at the top": Loss(partial(gdro, strength=1.0, top=True), the_kl, 0.1),
    "coupled over the batch": Loss(top_entropy(objective=partial(clipped, low=0.3, high=0.3), share=0.5)),
}


CORRECT = torch.tensor([True, False, False, True, True, False])  # what is imitated where there is an anchor


class Held:
    """Stands for any reference: this policy records its reference means."""

    def applied(self) -> torch.no_grad:
        return torch.no_grad()


def gradient(loss: Loss, rows: int, steps: int) -> tuple[float, Tensor]:
    policy = GaussianPolicy(rows, steps)
    trajectory = policy.trajectory(batch())
    advantages = torch.randn(B, S, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = Given(
        advantages,
        seq_mean(trajectory.mask).double(),
        token_mean(trajectory.mask, keep=CORRECT).double() if loss.anchor_weight else None,
        CORRECT.double().unsqueeze(1).expand(B, S),
        token_mean(trajectory.mask).double(),
    )
    measured = accumulate(policy, trajectory, given, loss, Held())
    assert policy.map.weight.grad is not None
    return measured.loss, policy.map.weight.grad


@pytest.mark.parametrize("cut", [(1, S), (B, 1), (2, 3), (1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("coupled")])
def test_any_chunking_gives_the_gradient_of_one_big_batch(name, cut):
    whole, expected = gradient(LOSSES[name], B, S)
    value, found = gradient(LOSSES[name], *cut)
    assert value == pytest.approx(whole, rel=1e-9)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert expected.norm() > 0


@pytest.mark.parametrize("cut", [(1, S), (B, 1), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("coupled")])
def test_an_objective_that_couples_decisions_sees_them_all_whatever_the_chunks(name, cut):
    _, expected = gradient(LOSSES[name], B, S)
    _, found = gradient(LOSSES[name], *cut)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert expected.norm() > 0


def test_the_gradient_is_that_of_plain_autograd():
    policy = GaussianPolicy(B, S)
    trajectory = policy.trajectory(batch())
    advantages = torch.randn(B, S, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = seq_mean(trajectory.mask).double()
    found: list[Evaluation] = []
    policy.replay(trajectory, lambda chunk: found.append(chunk.evaluation))
    (clipped(found[0], advantages, low=0.3, high=0.3) * weights).sum().backward()
    assert policy.map.weight.grad is not None
    _, ours = gradient(LOSSES["clipped"], 2, 3)
    assert (ours - policy.map.weight.grad).norm() <= 1e-9 * ours.norm()


def test_what_a_policy_evaluated_is_told_whole_outputs_too_and_only_small_fields_are_kept():
    policy = GaussianPolicy(2, 3)
    trajectory = policy.trajectory(batch())
    measured = accumulate(policy, trajectory, Given(torch.ones(B, S), seq_mean(trajectory.mask)), Loss(nft))
    assert {*OUTPUTS, "clean_scale", "log_ratio"} <= measured.found
    assert measured.values.keys() == measured.found - {*OUTPUTS}


def test_an_objective_that_compares_with_the_reference_asks_for_it():
    assert Loss(dgpo).refers and Loss(gdro).refers and Loss(regressed).refers
    assert not Loss(partial(dgpo, against=of_old)).refers and not Loss(nft).refers


@pytest.mark.parametrize("cut", [(B, S), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("objective", [partial(clipped, low=0.3, high=0.3), partial(gspo, low=0.5, high=0.5)])
def test_separate_advantages_pull_as_the_sum_of_their_losses_whatever_the_chunks(objective, cut):
    several = torch.randn(B, S, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def pulled(rows: int, steps: int, advantages: Tensor, separate: Tensor | None) -> tuple[float, Tensor]:
        policy = GaussianPolicy(rows, steps)
        trajectory = policy.trajectory(batch())
        given = Given(advantages, seq_mean(trajectory.mask).double(), separate=separate)
        measured = accumulate(policy, trajectory, given, Loss(objective))
        assert policy.map.weight.grad is not None
        return measured.loss, policy.map.weight.grad

    value, found = pulled(*cut, several.sum(-1), several)
    one, other = (pulled(B, S, advantages, None) for advantages in several.unbind(-1))
    assert value == pytest.approx(one[0] + other[0], rel=1e-9)
    assert (found - one[1] - other[1]).norm() <= 1e-6 * found.norm()


def test_decisions_of_each_kind_have_their_own_objective_weight_and_distance():
    evaluation = Evaluation(torch.randn(B, S).mul(0.3), kl=torch.rand(B, S), to_reference=torch.randn(B, S))
    kind, advantages = torch.arange(B * S).view(B, S) % 2, torch.randn(B, S)
    told = masked(replace(evaluation, kind=kind), torch.ones(B, S, dtype=torch.bool))
    losses = by_kind(step=partial(clipped, low=0.01, high=0.01), token=reinforce, token_weight=0.02)(told, advantages)
    expected = torch.where(
        kind == 0, clipped(evaluation, advantages, low=0.01, high=0.01), 0.02 * reinforce(evaluation, advantages)
    )
    assert torch.equal(losses, expected)
    distances = ByKind({0: (the_kl, 1.0), 1: (estimated_k2, 0.5)})(told)
    assert torch.equal(distances, torch.where(kind == 0, the_kl(evaluation), 0.5 * estimated_k2(evaluation)))


def test_the_anchor_raises_the_mean_log_prob_of_what_is_imitated_and_of_nothing_else():
    policy = GaussianPolicy(B, S)
    trajectory = policy.trajectory(batch())
    given = Given(torch.zeros(B, S), seq_mean(trajectory.mask), token_mean(trajectory.mask, keep=CORRECT))
    measured = accumulate(policy, trajectory, given, Loss(reinforce, anchor_weight=0.1))
    counted = trajectory.mask & CORRECT.unsqueeze(1)
    torch.testing.assert_close(measured.slope, torch.where(counted, -0.1 / counted.sum(), 0.0), equal_nan=True)
    nothing = Given(torch.zeros(B, S), seq_mean(trajectory.mask), token_mean(trajectory.mask, keep=~CORRECT & CORRECT))
    assert accumulate(policy, trajectory, nothing, Loss(reinforce, anchor_weight=0.1)).loss == 0


def test_an_anchor_needs_samples_to_imitate():
    values, keep = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    assert imitated(Advantage(values, keep, {}, keep), 0.0) is None
    assert imitated(Advantage(values, keep, {}, keep), 0.1) is keep
    with pytest.raises(ValueError, match=r"loss\.anchor_weight is 0\.1, but the advantage names no samples"):
        imitated(Advantage(values, keep), 0.1)


def test_a_loss_that_is_not_finite_names_its_term_and_decision():
    policy = GaussianPolicy(B, S)
    trajectory = policy.trajectory(batch())
    trajectory.record["next"][3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"objective term is nan: log_ratio at \(sample, decision\) \[\[3, 1\]\]"):
        accumulate(policy, trajectory, Given(torch.ones(B, S), seq_mean(trajectory.mask)), LOSSES["reinforce"])


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("coupled")])
def test_what_untrained_decisions_hold_reaches_neither_the_loss_nor_its_slopes(name):
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    found = []
    for garbage in (0.0, torch.inf, torch.nan):
        values = torch.full((2, 3), 0.1).masked_fill(~mask, garbage)
        kind = torch.tensor([[0, 1, 1], [1, 0, 0]])
        several = dict.fromkeys(("kl", "entropy", "to_reference", "drift", "step_std", "dt", "log_prob"), values)
        small = ("error", "old_error", "reference_error", "clean_scale")
        several |= {**dict.fromkeys(small, values), **dict.fromkeys(OUTPUTS, values.unsqueeze(2).expand(2, 3, D))}
        evaluation = Evaluation(
            values, **several, kind=kind, group=torch.zeros_like(kind), reward=torch.tensor([[1.0], [0.0]]).expand(2, 3)
        )
        found.append(slopes(evaluation, Given(torch.ones(2, 3), seq_mean(mask), evenly=token_mean(mask)), LOSSES[name]))
    assert torch.isfinite(found[0][0])
    for total, slope in found:
        assert total == found[0][0]
        assert all(torch.equal(slope[key], found[0][1][key]) and (slope[key][1, 2] == 0).all() for key in slope)


def test_minibatches_keep_groups_whole_and_use_every_row_once():
    group = torch.tensor([7, 7, 3, 3, 9, 9, 1, 1])
    parts = minibatches(group, 2)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    for rows in parts:
        assert not set(group[rows].tolist()) & set(
            group[[row for row in range(8) if row not in rows.tolist()]].tolist()
        )
    with pytest.raises(ValueError, match="4 groups cannot be shared among 3 updates"):
        minibatches(group, 3)


def test_the_top_and_bottom_of_each_group_are_kept():
    advantages = torch.tensor([0.0, 3.0, -2.0, 1.0, 5.0, 4.0, -1.0, -3.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    kept = extremes(advantages, group, torch.ones(8, dtype=torch.bool), 0.5)
    assert kept.tolist() == [False, True, True, False, True, False, False, True]
    assert extremes(advantages, group, kept, 1.0) is kept
