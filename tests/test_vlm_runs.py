"""Whole runs of a tiny language model through the trainer: several rounds, several updates, exact resume."""

import json
from pathlib import Path

import pytest
import torch
from test_trainer import recipe as image_recipe
from tiny_vlms import saved
from tiny_vlms.policy import picture

from mmgrpo import checkpoint, journal
from mmgrpo.check import examine, probe, sampler_noise
from mmgrpo.gathering import gather
from mmgrpo.improve import Measured
from mmgrpo.journal import Stopwatch
from mmgrpo.recipe import load
from mmgrpo.run import start
from mmgrpo.trainer import improve, resume, train
from mmgrpo.types import Chunk

SEES = "Qwen2_5_VLForConditionalGeneration"
REWARD = '''
import torch

def early(samples):
    """Whether the share of plain letters is high; nothing to tell apart for a prompt that says "dull"."""
    share = [sum(letter.isascii() and letter.isprintable() for letter in text) / max(len(text), 1) for text in samples.text]
    return torch.tensor([0.0 if "dull" in p.text else value for p, value in zip(samples.prompts, share)])
'''
TIMED = ("seconds/", "samples_per_second", "memory/")


@pytest.fixture
def recipe(tmp_path: Path):
    """Makes a recipe of a tiny model with eyes; further lines and overrides are the caller's."""
    model = saved(SEES, tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [
        {"prompt": f"{'dull ' if number % 3 == 0 else ''}question {number}", "image": f"{number % 2}.png"}
        for number in range(12)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number in range(2):
        picture(tmp_path / f"{number}.png", 16, 16 + 8 * number, number)
    (tmp_path / "recipe.toml").write_text(f"""
seed = 0
[policy]
build = "pipelines.vlm:load"
model = "{model}"
dtype = "float32"
device = "cpu"
max_new_tokens = 6
replay_tokens = 200
[prompts]
source = "{tmp_path / "prompts.jsonl"}"
media = {{ image = "image" }}
[[rewards]]
name = "early"
build = "{tmp_path / "reward.py"}:early"
[optimizer]
learning_rate = 1e-3
[train]
iterations = 4
prompts = 4
group_size = 4
save_every = 1
""")
    return lambda *overrides: load(tmp_path / "recipe.toml", overrides)


def states(folder: Path) -> tuple[dict, dict]:
    path = checkpoint.latest(folder)
    assert path is not None
    return checkpoint.read(path)


def lasting(folder: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in journal.read(folder)]


def test_a_check_examines_replay_gradients_and_the_samplers_rounding(recipe) -> None:
    report = examine(start(recipe()))
    assert report.ok, report.lines
    assert any("sampler: its log-probs differ from the replay's by" in line for line in report.lines)


def test_a_clip_below_the_samplers_rounding_is_refused(recipe) -> None:
    run = start(recipe("objective.low=1e-9", "objective.high=1e-9"))
    trajectory, _ = run.policy.rollout(probe(run))
    gap = torch.full(trajectory.mask.shape, 1e-6)  # what a processor rounds differs, down to nothing
    [finding] = sampler_noise(run, trajectory, Measured(values={"sampler_gap": gap}))
    assert not finding.ok and "the objective clips at 1e-09; expected more" in finding.detail


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.updates=2", "train.passes=2", "train.rounds=3"),
        (
            "loss.kl_weight=0.1",
            "loss.kl='k3_unbiased'",
            "reference.kind='ema'",
            "reference.decay=0.5",
            "train.updates=2",
        ),
        (
            "policy.lora={rank=4}",
            "loss.kl_weight=0.1",
            "loss.kl='k3'",
            "reference.kind='adapters_off'",
            "policy.top_p=0.9",
        ),
        (
            "entropy.target=9.0",
            "entropy.delta=0.1",
            "loss.kl_in_reward=0.1",
            "reference.kind='ema'",
            "reference.decay=0.5",
        ),
        ("advantage={build='mmgrpo.risk:bundle_risk', size=2}", "train.updates=2"),
        ("advantage={build='mmgrpo.shaping:distribution_centric'}",),
    ],
    ids=[
        "one update",
        "several updates and rounds",
        "kl to an average",
        "adapters, truncated",
        "entropy and kl",
        "tracked quantiles",
        "a temperature that follows the entropy",
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(recipe, tmp_path, overrides) -> None:
    train(recipe(*overrides), tmp_path / "whole")
    train(recipe(*overrides, "train.iterations=2"), tmp_path / "half")
    text = (tmp_path / "half" / "recipe.toml").read_text()
    (tmp_path / "half" / "recipe.toml").write_text(text.replace("iterations = 2", "iterations = 4"))
    resume(tmp_path / "half")
    (one, facts), (other, expected) = states(tmp_path / "half"), states(tmp_path / "whole")
    assert facts == expected
    assert bool(other.get("advantage")) == any(item.startswith("advantage") for item in overrides)
    for part, tensors in other.items():
        for name, value in tensors.items():
            assert torch.equal(one[part][name], value), (part, name)
    assert lasting(tmp_path / "half") == lasting(tmp_path / "whole")


def test_rounds_go_on_until_enough_groups_differ_and_every_sample_is_counted(recipe, tmp_path) -> None:
    run = train(recipe("train.rounds=4", "train.iterations=3"), tmp_path / "run")
    lines = journal.read(tmp_path / "run")
    assert [line["rollout/rounds"] for line in lines] != [1.0, 1.0, 1.0]  # a third of the prompts teaches nothing
    assert run.rollouts == sum(line["rollout/rounds"] for line in lines)
    assert run.samples == 16 * run.rollouts == sum(line["rollout/generated"] for line in lines)
    assert all(line["update/samples"] == 16 for line in lines)  # four groups with spread, none wasted
    assert any(line["reward/early/groups_without_spread"] > 0 for line in lines)  # told of everything generated


def test_a_bound_of_rounds_is_kept_where_too_few_groups_differ(recipe, tmp_path) -> None:
    run = train(recipe("train.rounds=2", "train.iterations=1", "prompts.limit=1", "train.prompts=1"), tmp_path / "run")
    [line] = journal.read(tmp_path / "run")
    assert line["rollout/rounds"] == 2 and run.samples == 8 and line["update/samples"] == 0


def test_several_updates_from_one_rollout_are_off_policy_and_one_is_not(recipe, tmp_path) -> None:
    train(recipe("train.updates=2", "train.passes=2", "train.iterations=1", "train.rounds=4"), tmp_path / "several")
    [line] = journal.read(tmp_path / "several")
    assert line["update/ratio/max_abs_log/first"] == 0 and line["update/ratio/max_abs_log"] > 0
    train(recipe("train.iterations=1"), tmp_path / "one")
    [line] = journal.read(tmp_path / "one")
    assert line["update/ratio/max_abs_log"] == 0 and 0 < line["update/sampler/mean_abs_gap"] < 1e-5
    assert line["rollout/decisions/max"] <= 6


OBJECTIVES = {
    "clipped": [],
    "gspo": ["objective.build='mmgrpo.objectives:gspo'"],
    "gspo_token": ["objective.build='mmgrpo.objectives:gspo_token'"],
    "cispo": ["objective.build='mmgrpo.objectives:cispo'", "loss.aggregation='token_mean'"],
    "reinforce": ["objective.build='mmgrpo.objectives:reinforce'"],
    "corrected": [
        "objective={build='mmgrpo.weighting:sampler_corrected', objective={build='mmgrpo.objectives:clipped'}}"
    ],
    "top entropy": [
        "objective={build='mmgrpo.weighting:top_entropy', objective={build='mmgrpo.objectives:clipped'}, share=0.5}"
    ],
    "vespo": ["objective.build='mmgrpo.objectives:vespo'"],
    "elastic": ["objective.build='mmgrpo.objectives:elastic'"],
    "disco": ["objective={build='mmgrpo.contrasts:disco', threshold=0.9}"],
    "dno": ["objective.build='mmgrpo.contrasts:dno'"],
    "regressed": ["objective.build='mmgrpo.contrasts:regressed'", "reference.kind='frozen'"],
    "adaptive entropy": ["entropy.target=9.0", "loss.entropy_weight=0.01"],
    "band of entropy": ["entropy.band=[1.0, 2.0]", "entropy.band_weight=0.1"],
    "kl in the reward": ["loss.kl_in_reward=0.1", "reference.kind='frozen'"],
    "k2": ["loss.kl='k2'", "loss.kl_weight=0.1", "reference.kind='frozen'"],
    "k3": ["loss.kl='k3'", "loss.kl_weight=0.1", "reference.kind='frozen'"],
    "unbiased k3": ["loss.kl='k3_unbiased'", "loss.kl_weight=0.1", "reference.kind='previous'"],
}
NEEDS_TOKENS = {
    "corrected",
    "top entropy",
    "disco",
    "adaptive entropy",
    "band of entropy",
}  # a denoising step has neither a second sampler nor an entropy that is reported, nor the probability of what was chosen


SMALL = ["train.iterations=2", "train.updates=2"]


def clip(name: str) -> list[str]:
    """A clip as wide as a token's ratio for the objectives whose own width is for samples."""
    return ["objective.low=0.1", "objective.high=0.1"] if name in ("gspo", "gspo_token") else []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_tokens(recipe, name, tmp_path) -> None:
    run = train(recipe(*OBJECTIVES[name], *clip(name), *SMALL, "train.rounds=4"), tmp_path / "tokens")
    assert run.updates == 4
    assert all(line["update/ratio/max_abs_log"] > 0 for line in journal.read(tmp_path / "tokens"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in NEEDS_TOKENS])
def test_the_same_objectives_train_denoising_steps(name, tmp_path) -> None:
    run = train(image_recipe(*plain_image(OBJECTIVES[name]), *SMALL), tmp_path / "steps")
    assert run.updates >= 2
    assert journal.read(tmp_path / "steps")[-1]["update/ratio/max_abs_log"] > 0


def plain_image(overrides: list[str]) -> list[str]:
    """Overrides for the image demo's recipe, whose own objective has options that others lack."""
    named = [item for item in overrides if item.startswith("objective")]
    chosen = named[0].split("=", 1)[1] if named else "'mmgrpo.objectives:clipped'"
    return [f"objective={{build={chosen}}}", *(item for item in overrides if not item.startswith("objective"))]


def test_the_weight_of_the_entropy_follows_its_target_from_update_to_update(recipe, tmp_path) -> None:
    overrides = ("entropy.target=9.0", "entropy.delta=0.1", "loss.entropy_weight=0.25", "train.iterations=3")
    run = train(recipe(*overrides), tmp_path / "run")
    lines = journal.read(tmp_path / "run")
    assert [line["update/entropy_weight"] for line in lines] == pytest.approx(
        [0, 0.35, 0.45]
    )  # nothing is known at first
    assert all(line["update/samples"] == 16 for line in lines)  # those without an advantage have an entropy too
    assert run.bonus.weight == pytest.approx(0.55) and run.bonus.last == lines[-1]["update/entropy_mean"]
    assert lines[-1]["update/entropy_mean"] == pytest.approx(lines[-1]["update/decisions/entropy"], rel=1e-5)


def test_a_kl_in_the_reward_changes_the_advantages_once_the_policy_has_moved(recipe, tmp_path) -> None:
    run = train(recipe("loss.kl_in_reward=10.0", "reference.kind='frozen'", "train.iterations=2"), tmp_path / "held")
    lines = journal.read(tmp_path / "held")
    assert lines[0]["rollout/kl_to_reference"] == 0 and lines[1]["rollout/kl_to_reference"] != 0
    free = train(recipe("train.iterations=2"), tmp_path / "free")
    moved = [torch.cat([value.flatten() for value in one.policy.trainable().values()]) for one in (run, free)]
    assert not torch.equal(*moved)


def test_decisions_that_an_advantage_drops_leave_the_loss_and_its_denominators(recipe) -> None:
    rate = 0.5
    options = ("loss.aggregation='token_mean'", f"optimizer.learning_rate={rate}", "optimizer.max_grad_norm=1e9")
    clipped = "advantage={build='mmgrpo.entropy_clip:entropy_clipped', by='vocabulary', width=0.5, most=0.3}"
    run = start(recipe(*options, clipped))
    run.optimizer = torch.optim.SGD(run.policy.trainable().values())  # a step is the gradient times the rate
    rolled = gather(run, Stopwatch(run.device))
    advantage = run.compare(rolled.feedback)
    mask, kept = rolled.trajectory.mask, advantage.decisions
    assert kept is not None and 0 < int((mask & ~kept).sum()) == round(
        advantage.metrics["dropped_tokens"] * int(mask.sum())
    )
    share = torch.where(kept & mask, advantage.values.unsqueeze(1), 0) / (kept & mask).sum()

    def consume(chunk: Chunk) -> None:
        (-share[chunk.rows][:, chunk.steps] * chunk.evaluation.log_ratio.exp()).sum().backward()

    run.policy.replay(rolled.trajectory, consume)
    trained = run.policy.trainable()
    wanted = {name: value.detach() - rate * value.grad for name, value in trained.items() if value.grad is not None}
    run.optimizer.zero_grad()
    metrics = improve(run, rolled, advantage)
    assert metrics["update/loss"] == pytest.approx(-float(share.sum()), abs=1e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(trained[name].detach(), value, rtol=1e-5, atol=1e-6)
