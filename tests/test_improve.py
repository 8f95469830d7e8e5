"""The seam: the parameter gradient is the same for every way of cutting a rollout into chunks."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mmgrpo.data import requests
from mmgrpo.improve import Loss, NonFiniteError, accumulate, slopes
from mmgrpo.objectives import clipped, gspo, guarded, reinforce, seq_mean, top_entropy
from mmgrpo.selection import extremes, minibatches
from mmgrpo.transitions import Gaussian, kl, log_ratio
from mmgrpo.types import Batch, Chunk, Consumer, Evaluation, Prompt, Reference, Trajectory

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
        return Trajectory(batch, mask, torch.zeros(B, S, dtype=torch.int64), record)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        for rows in torch.arange(len(trajectory)).split(self.rows):
            for steps in torch.arange(S).split(self.steps):
                part = {name: value[rows][:, steps].flatten(0, 1) for name, value in trajectory.record.items()}
                new = Gaussian(self.map(part["state"]), self.std)
                old = Gaussian(part["old"], self.std)
                shape = (len(rows), len(steps))
                held = None if reference is None else kl(new, Gaussian(part["reference"], self.std)).view(shape)
                consume(
                    Chunk(
                        rows,
                        steps,
                        Evaluation(
                            log_ratio(part["next"], new, old).view(shape),
                            kl=held,
                            drift=kl(new, old).view(shape),
                            step_std=torch.full(shape, 0.5, dtype=torch.float64),
                            dt=torch.full(shape, 0.1, dtype=torch.float64),
                            entropy=new.mean.square().sum(1).view(shape),  # stands for any number that varies
                        ),
                    )
                )

    def trainable(self) -> dict[str, Parameter]:
        return {"map.weight": self.map.weight}


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
    "coupled over the batch": Loss(top_entropy(objective=partial(clipped, low=0.3, high=0.3), share=0.5)),
}


class Held:
    """Stands for any reference: this policy records its reference means."""

    def applied(self) -> torch.no_grad:
        return torch.no_grad()


def gradient(loss: Loss, rows: int, steps: int) -> tuple[float, Tensor]:
    policy = GaussianPolicy(rows, steps)
    trajectory = policy.trajectory(batch())
    advantages = torch.randn(B, S, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = seq_mean(trajectory.mask).double()
    measured = accumulate(policy, trajectory, advantages, weights, loss, Held())
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


def test_a_loss_that_is_not_finite_names_its_term_and_decision():
    policy = GaussianPolicy(B, S)
    trajectory = policy.trajectory(batch())
    trajectory.record["next"][3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"objective term is nan: log_ratio at \(sample, decision\) \[\[3, 1\]\]"):
        accumulate(policy, trajectory, torch.ones(B, S), seq_mean(trajectory.mask), LOSSES["reinforce"])


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("coupled")])
def test_what_untrained_decisions_hold_reaches_neither_the_loss_nor_its_slopes(name):
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    found = []
    for garbage in (0.0, torch.inf, torch.nan):
        values = torch.full((2, 3), 0.1).masked_fill(~mask, garbage)
        evaluation = Evaluation(values, kl=values, drift=values, step_std=values, dt=values)
        found.append(slopes(evaluation, torch.ones(2, 3), seq_mean(mask), LOSSES[name]))
    assert torch.isfinite(found[0][0])
    for total, slope in found:
        assert total == found[0][0]
        assert all(torch.equal(slope[key], found[0][1][key]) and slope[key][1, 2] == 0 for key in slope)


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
