"""Groups that are kept and stand in for others: their score, their place, their old log-probs, their way through a checkpoint."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policy_kinds import KINDS, PolicyKind
from test_vlm_runs import lasting, recipe, states

from mmgrpo import checkpoint, journal
from mmgrpo.data import requests
from mmgrpo.gathering import gather, joined_trajectory, recalled, store, take_feedback
from mmgrpo.improve import evaluate
from mmgrpo.journal import Stopwatch
from mmgrpo.recall import Kept, anchored, best, fits, in_memory, packed, places, scores, unpacked, young
from mmgrpo.run import start
from mmgrpo.trainer import resume, train
from mmgrpo.types import Feedback, Prompt, Trajectory
from pipelines.replays import moved

__all__ = ["recipe"]  # a fixture
RECORDING = ("image flow", "image diffusion", "video flow")  # keep the outputs of their sampling, and need no anchor
GROUP = torch.tensor([4, 9, 4, 9, 4, 9, 4, 9])
REWARD = torch.tensor([0.0, 0, 1, 0, 0, 0, 1, 1])  # group 4: 0 1 0 1, group 9: 0 0 0 1
CENTRED = torch.tensor([-0.5, -0.25, 0.5, -0.25, -0.5, -0.25, 0.5, 0.75])


def judged(reward: torch.Tensor = REWARD, group: torch.Tensor = GROUP, mask: torch.Tensor | None = None) -> Feedback:
    return Feedback({"r": reward}, {"r": 1.0}, group, mask=mask)


def group_of(score: float, iteration: int, group: int = 0) -> Kept:
    batch = replace(requests([Prompt(3, "c")], [0], group_size=2, seed=5, iteration=iteration, first_group=group))
    record = {"x": torch.randn(2, 4), "y": torch.tensor([1, 2])}
    mask = torch.tensor([[True, False], [True, True]])
    feedback = Feedback({"r": torch.tensor([0.0, torch.nan])}, {"r": 2.0}, batch.group, None, batch.prompts, mask)
    return Kept(score, iteration, Trajectory(batch, mask, torch.zeros(2, 2, dtype=torch.int64), record), feedback)


# ---- the score and the choice


def test_the_score_is_the_sum_of_the_absolute_advantages_times_the_spread_of_the_rewards() -> None:
    four, nine = 2 * (1 / 3) ** 0.5, 1.5 * 0.5  # sums of |A| 2 and 1.5, standard deviations 0.577350 and 0.5
    torch.testing.assert_close(scores(CENTRED, judged()), torch.tensor([four, nine] * 4, dtype=torch.float64))
    flat = judged(torch.ones(8))
    assert scores(torch.ones(8), flat).tolist() == [0] * 8


def test_of_an_advantage_of_decisions_the_mean_over_the_trained_ones_counts() -> None:
    mask = torch.tensor([[True, True, False]]).expand(8, 3)
    values = torch.stack([CENTRED, -CENTRED, torch.full((8,), 1e9)], 1)
    torch.testing.assert_close(scores(values, judged(mask=mask)), scores(CENTRED, judged()))


def test_the_highest_score_is_first_and_the_newer_of_equals_and_the_old_are_forgotten() -> None:
    kept = [group_of(1.0, 3), group_of(2.0, 1), group_of(1.0, 5), group_of(0.5, 6)]
    assert [(group.score, group.iteration) for group in best(kept, 3)] == [(2.0, 1), (1.0, 5), (1.0, 3)]
    assert [group.iteration for group in young(kept, 7, 2)] == [5, 6]


def test_a_recalled_group_takes_the_place_of_the_one_that_it_replaces() -> None:
    group = torch.tensor([10, 10, 11, 11, 12, 12, 13, 13])
    replaced = (group == 10) | (group == 12)
    behind = torch.cat([group[~replaced], torch.tensor([2, 2, 7, 7])])
    assert behind[places(group, replaced)].tolist() == [2, 2, 11, 11, 7, 7, 13, 13]


def test_a_group_that_recorded_something_else_cannot_be_recalled() -> None:
    one = group_of(1.0, 0)
    assert fits(one, one.trajectory)
    wider = replace(one.trajectory, record={**one.trajectory.record, "x": torch.zeros(2, 5)})
    assert not fits(one, wider) and not fits(one, replace(wider, record={"z": torch.zeros(2)}))


# ---- what a replay compares a recalled group with


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_recalled_rows_log_ratio_is_new_minus_stored_and_that_of_todays_rows_is_zero(
    kind: PolicyKind, tmp_path: Path
) -> None:
    policy, prompts = kind.make(tmp_path)
    first = requests(prompts, [0, 1], group_size=2, seed=0, iteration=0)
    old, _ = policy.rollout(first)
    stored = in_memory(policy.anchor(old, [torch.arange(4)]))
    assert float(evaluate(policy, stored).log_ratio.abs().max()) == 0  # under the weights that sampled
    generator = torch.Generator().manual_seed(0)
    trained = policy.trainable()
    step = {name: torch.randn(value.shape, generator=generator) for name, value in trained.items()}
    with moved(policy, step, 1e-2):
        today, _ = policy.rollout(requests(prompts, [0, 1], group_size=2, seed=0, iteration=1, first_group=2))
        whole = joined_trajectory([today, stored])
        found, alone = evaluate(policy, whole), evaluate(policy, stored)
        past = torch.arange(8) >= 4
        assert float(found.log_ratio[past].abs().max()) > 1e-4
        torch.testing.assert_close(found.log_ratio[past], alone.log_ratio, rtol=1e-3, atol=2e-5)
        fresh = evaluate(policy, today).log_ratio
        assert float(fresh.abs().max()) == 0
        torch.testing.assert_close(found.log_ratio[~past], fresh, rtol=0, atol=2e-5)
        with moved(policy, step, 1e-2):  # further weights, with which today's rows are compared now, but not past ones
            again = evaluate(policy, anchored(policy, whole, [torch.arange(8)], past)).log_ratio
            ratio = evaluate(policy, stored).log_ratio
        torch.testing.assert_close(again[past], ratio, rtol=1e-3, atol=2e-5)
        if kind.name not in RECORDING:
            assert float(again[~past].abs().max()) == 0


# ---- checkpoints


def test_kept_groups_come_back_bit_equal_with_the_runs_prompts() -> None:
    kept, prompts = [group_of(0.1, 2), group_of(1 / 3, 4, group=8)], [Prompt(2, "b"), Prompt(3, "c")]
    back = unpacked(packed(kept), prompts)
    for one, other in zip(kept, back, strict=True):
        assert (one.score, one.iteration) == (other.score, other.iteration)
        assert other.trajectory.batch.prompts == (prompts[1],) * 2 == other.feedback.prompts
        assert (other.trajectory.batch.seed, other.trajectory.batch.iteration) == (5, one.iteration)
        for name, value in one.trajectory.record.items():
            assert torch.equal(other.trajectory.record[name], value)
        assert torch.equal(other.trajectory.mask, one.trajectory.mask) and torch.equal(
            other.feedback.group, one.feedback.group
        )
        torch.testing.assert_close(other.feedback.total(), one.feedback.total(), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="keeps a group of prompt 3, which the data no longer holds"):
        unpacked(packed(kept), prompts[:1])


# ---- runs of a tiny language model, whose prompts are "dull" in one of three cases


def test_kept_groups_replace_those_without_signal_and_are_used_once(recipe) -> None:
    run = start(recipe("recall.groups=3"))
    rolled = recalled(run, gather(run, Stopwatch(run.device)))
    assert rolled.metrics["rollout/recalled"] == 0 and not rolled.past.any()  # nothing is kept yet
    advantage = run.compare(rolled.feedback)
    store(run, rolled, advantage)
    known = scores(advantage.values, rolled.feedback)
    ranked = sorted({float(value) for value in known}, reverse=True)
    assert [group.score for group in run.kept] == [value for value in ranked if value > 0][:3]
    kept, run.iteration = list(run.kept), 1
    while True:  # until a rollout has dull prompts
        plain = gather(run, Stopwatch(run.device))
        dull = plain.feedback.total().view(4, 4).std(1) == 0
        if dull.any():
            break
    count = min(int(dull.sum()), len(kept))
    mixed = recalled(run, plain)
    assert mixed.metrics["rollout/recalled"] == count and mixed.metrics["rollout/recalled_age"] == 1
    assert run.kept == kept[count:]
    places_of = dull.nonzero().flatten()[:count]
    for place, group in zip(places_of.tolist(), kept, strict=False):
        rows = torch.arange(4 * place, 4 * place + 4)
        assert mixed.past[rows].all() and torch.equal(mixed.trajectory.group[rows], group.trajectory.group)
        assert torch.equal(mixed.trajectory.record["token"][rows], group.trajectory.record["token"])
        assert torch.equal(take_feedback(mixed.feedback, rows).total(), group.feedback.total())
    others = ~mixed.past
    assert torch.equal(mixed.trajectory.group[others], plain.trajectory.group[others])
    assert mixed.judged is plain.judged


def test_where_no_group_has_signal_all_may_be_recalled(recipe) -> None:
    run = start(recipe("recall.groups=8", "train.prompts=2"))
    while len(run.kept) < 3:
        rolled = gather(run, Stopwatch(run.device))
        store(run, rolled, run.compare(rolled.feedback))
        run.iteration += 1
    plain, before = gather(run, Stopwatch(run.device)), len(run.kept)
    silent = replace(plain.feedback, rewards={"early": torch.ones(8)})
    mixed = recalled(run, plain._replace(feedback=silent))
    assert mixed.past.all() and len(mixed.trajectory) == 8 and len(run.kept) == before - 2
    assert mixed.trajectory.batch.iteration == run.iteration
    assert (run.compare(mixed.feedback).values != 0).any()


def test_a_run_recalls_off_policy_and_is_off_by_default(recipe, tmp_path: Path) -> None:
    train(recipe("recall.groups=8", "train.iterations=3"), tmp_path / "on")
    lines = journal.read(tmp_path / "on")
    later = [line for line in lines if line["rollout/recalled"] > 0]
    assert later and all(1 <= line["rollout/recalled_age"] <= 2 for line in later)
    assert all(line["update/ratio/max_abs_log/first"] > 0 for line in later)
    assert all(line["update/samples"] == 16 for line in later if line["advantage/groups_without_spread"] == 0)
    assert lines[0]["update/ratio/max_abs_log/first"] == 0
    train(recipe("train.iterations=3"), tmp_path / "off")
    plain = journal.read(tmp_path / "off")
    assert not any(name.startswith(("rollout/recalled", "rollout/kept")) for line in plain for name in line)
    path = checkpoint.latest(tmp_path / "off")
    assert path is not None and not (path / "recall.safetensors").exists()


def test_an_objective_of_whole_groups_sees_the_ratios_of_recalled_rows_in_the_first_update(
    recipe, tmp_path: Path
) -> None:
    pairs = (
        "objective={build='mmgrpo.contrasts:dno', strength=10.0}"  # of a pair whose log-ratios are 0 the loss is log 2
    )
    train(recipe("recall.groups=8", "train.iterations=3", pairs), tmp_path / "run")
    lines = journal.read(tmp_path / "run")
    assert {line["rollout/recalled"] > 0 for line in lines} == {True, False}
    for line in lines:
        away = abs(float(line["update/loss/first"] or 0) - math.log(2))
        assert away > 1e-3 if line["rollout/recalled"] else away < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [(), ("train.updates=2", "train.passes=2", "objective={build='mmgrpo.contrasts:dno'}")]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(recipe, tmp_path: Path, overrides) -> None:
    on = ("recall.groups=3", "recall.age=2", *overrides)
    train(recipe(*on), tmp_path / "whole")
    train(recipe(*on, "train.iterations=2"), tmp_path / "half")
    text = (tmp_path / "half" / "recipe.toml").read_text()
    (tmp_path / "half" / "recipe.toml").write_text(text.replace("iterations = 2", "iterations = 4"))
    resume(tmp_path / "half")
    (one, facts), (other, expected) = states(tmp_path / "half"), states(tmp_path / "whole")
    assert facts == expected and other["recall"]
    for part, tensors in other.items():
        assert one[part].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(one[part][name].nan_to_num(7), value.nan_to_num(7)), (part, name)
    assert lasting(tmp_path / "half") == lasting(tmp_path / "whole")
    assert any(line["rollout/recalled"] > 0 for line in journal.read(tmp_path / "whole")[2:])
