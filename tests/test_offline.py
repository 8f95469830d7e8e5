"""Samples that are made once: what is stored, who may use it, how groups are taken and drawn anew, and what an interrupt leaves."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policy_kinds import KINDS
from safetensors import safe_open
from test_trainer import lasting, same_state

from mmgrpo import checkpoint, journal, moved, offline
from mmgrpo.check import examine
from mmgrpo.data import requests
from mmgrpo.interrupt import Interrupted
from mmgrpo.journal import Stopwatch
from mmgrpo.recipe import Recipe, RecipeError, load, resolved
from mmgrpo.run import Run, start
from mmgrpo.scoring import score
from mmgrpo.trainer import resume, train
from mmgrpo.types import Trajectory
from pipelines import assets

PROMPTS, MADE, SIZE = 5, 5, 3  # prompts of the data, samples made of each, those of a group
DEMO = assets.folder("image_demo")
TEXT = """
seed = 3
method = "gdro"
[policy]
build = "pipelines.diffusion:load"
model = "{demo}"
pipeline = "pipelines.tiny_image:TinyImagePipeline"
dtype = "float32"
call = {{ num_inference_steps = 2 }}
draws = {{ count = 2, sets = 2 }}
rollout_rows = 64
[prompts]
source = "{demo}/prompts/train.jsonl"
limit = {prompts}
[evaluation]
source = "{demo}/prompts/validation.jsonl"
limit = 2
[[rewards]]
name = "soft"
build = "rewards.shapes:shape_reward"
[ema]
decay = 0.5
[optimizer]
learning_rate = 1e-3
[offline]
samples = {made}
[train]
iterations = 4
prompts = 4
group_size = {size}
save_every = 1
"""
STOPPING = """
import os, signal
from pathlib import Path
from rewards.shapes import shape_reward

def stopping(samples, *, watched: str, number: int):
    '''The demo's reward; sends a signal, once, as soon as the first two prompts have their samples.'''
    folder = Path(watched)
    if len(list(folder.glob("prompt_*"))) >= 2 and not (folder / "stopped").exists():
        (folder / "stopped").touch()
        os.kill(os.getpid(), number)
    return shape_reward(samples)
"""
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    (tmp_path / "offline.toml").write_text(TEXT.format(demo=DEMO, prompts=PROMPTS, made=MADE, size=SIZE))
    return lambda *overrides: load(tmp_path / "offline.toml", overrides)


@pytest.fixture
def collected(recipe: Make, tmp_path: Path) -> Run:
    """A run whose samples have been made, before its first iteration."""
    train(recipe("train.iterations=1"), tmp_path / "made")
    run = start(recipe())
    run.stored = offline.opened(run, tmp_path / "made")
    return run


# ---- what is stored


def test_every_prompt_has_its_samples_and_their_rewards_by_the_weights_of_the_start(collected, recipe) -> None:
    run = start(recipe())
    whole = requests(run.prompts, range(PROMPTS), group_size=MADE, seed=3, iteration=0)
    trajectory, samples = run.policy.rollout(whole)
    rewards = score(run.rewards, run.weights, samples).total()
    for number, prompt in enumerate(run.prompts):
        kept, rows = offline.read(collected.stored, prompt), slice(number * MADE, (number + 1) * MADE)
        assert kept.trajectory.batch.sample.tolist() == whole.sample[rows].tolist()
        assert kept.trajectory.batch.prompts == (prompt,) * MADE
        torch.testing.assert_close(kept.trajectory.record["clean.0"], trajectory.record["clean.0"][rows])
        torch.testing.assert_close(kept.feedback.total(), rewards[rows])
    assert len(list(collected.stored.iterdir())) == PROMPTS + 1


def test_a_file_is_tensors_and_json(collected) -> None:
    with safe_open(offline.file_of(collected.stored, collected.prompts[0]), "pt") as file:
        assert json.loads(file.metadata()["facts"])


def test_parts_are_about_as_large_as_an_iteration_and_hold_every_prompt_once(recipe) -> None:
    run = start(recipe())
    assert [list(part) for part in offline.parts(run)] == [[0, 1], [2, 3], [4]]  # 4 * 3 // 5 = 2 prompts
    few = replace(run, recipe=recipe("train.prompts=1"))
    assert [len(part) for part in offline.parts(few)] == [1] * PROMPTS


# ---- groups


def draws_of(trajectory: Trajectory) -> list[tuple[int, ...]]:
    """The levels and noises of each row."""
    record = trajectory.record
    return [tuple(row) for row in torch.cat([record["entry"], record["noise"]], 1).tolist()]


def test_a_group_is_some_of_a_prompts_samples_with_their_rewards_and_none_twice(collected) -> None:
    run = collected
    found = offline.regrouped(run, Stopwatch(run.device))
    assert run.rollouts == 1 and not found.past.any() and found.judged is found.feedback
    batch = found.trajectory.batch
    assert batch.group.tolist() == [number for number in range(4) for _ in range(SIZE)]
    assert len({prompt.id for prompt in batch.prompts}) == 4
    for rows in torch.arange(4 * SIZE).view(4, SIZE):
        kept = offline.read(run.stored, batch.prompts[rows[0]])
        clean, reward = kept.trajectory.record["clean.0"], kept.feedback.total()
        same = (found.trajectory.record["clean.0"][rows].unsqueeze(1) == clean).flatten(2).all(2)  # (G, M)
        assert same.sum(1).tolist() == [1] * SIZE and same.sum(0).max() == 1
        assert torch.equal(found.feedback.total()[rows], reward[same.int().argmax(1)])


def test_draws_are_shared_in_a_group_and_new_in_every_iteration(collected) -> None:
    run, seen, levels = collected, set(), set()
    for iteration in range(3):
        run.iteration = iteration
        trajectory = offline.regrouped(run, Stopwatch(run.device)).trajectory
        rows = draws_of(trajectory)
        assert all(len(set(rows[first : first + SIZE])) == 1 for first in range(0, len(rows), SIZE))
        assert seen.isdisjoint(rows)
        seen |= set(rows)
        levels |= set(trajectory.record["entry"].flatten().tolist())
    assert len(seen) == 12 and len(levels) > 8


def test_which_samples_make_a_group_follows_from_seed_iteration_and_group_alone(collected) -> None:
    prompt = collected.prompts[0]
    first, again = (offline.chosen(collected, prompt, 7)[0] for _ in range(2))
    assert torch.equal(first.batch.sample, again.batch.sample)
    others = {tuple(offline.chosen(collected, prompt, group)[0].batch.sample.tolist()) for group in range(12)}
    collected.iteration = 1
    others |= {tuple(offline.chosen(collected, prompt, group)[0].batch.sample.tolist()) for group in range(12)}
    assert len(others) > 12
    uses = torch.stack([offline.members(16, 6, seed) for seed in range(400)])
    assert all(len(set(row)) == 6 for row in uses.tolist())
    assert (uses.flatten().bincount() / 400 - 6 / 16).abs().max() < 0.1  # 4 standard errors


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name == "draws of speech"], ids=lambda kind: kind.name)
def test_speech_is_drawn_anew_as_well(kind, tmp_path) -> None:
    policy, prompts = kind.make(tmp_path)
    batch = requests(prompts, [0, 1], group_size=2, seed=0, iteration=0)
    trajectory, _ = policy.rollout(batch)
    same = policy.redrawn(trajectory, batch)
    assert all(torch.equal(value, trajectory.record[name]) for name, value in same.record.items())
    later = policy.redrawn(trajectory, replace(batch, iteration=1))
    assert torch.equal(later.record["clean"], trajectory.record["clean"])
    assert (later.record["noise"] != trajectory.record["noise"]).all() and later.batch.iteration == 1


# ---- runs


def test_a_run_reports_the_stored_rewards_and_no_rollouts(recipe, tmp_path) -> None:
    run = train(recipe("train.evaluate_every=2"), tmp_path / "run")
    lines = journal.read(tmp_path / "run")
    assert len(lines) == 4 and run.samples == PROMPTS * MADE
    assert not any(name.startswith("rollout/") or name == "seconds/rollout" for line in lines for name in line)
    assert all(line["update/grad_norm"] > 0 and line["reward/total/group_std"] > 0 for line in lines)
    assert sorted(checkpoint.saved(tmp_path / "run")) == [
        2,
        3,
        4,
    ]  # and before them 0, that of the weights that sampled
    assert "held_out/soft" in lines[3] and moved.kept(tmp_path / "run").keys() == {"soft"}
    assert run.average is not None and run.history.metrics.keys().isdisjoint({"reward/total/mean"})


@pytest.fixture
def stopped(recipe, tmp_path) -> Callable[[int], Recipe]:
    """A recipe whose reward sends a signal to the process while samples are made; the samples' folder is told by the recipe."""
    (tmp_path / "stop.py").write_text(STOPPING)

    def made(number: int) -> Recipe:
        folder = tmp_path / "run" / "offline"
        reward = f"{{name='soft', build='{tmp_path}/stop.py:stopping', watched='{folder}', number={number}}}"
        return recipe(f"rewards=[{reward}]", "train.iterations=2")

    return made


def same_training(one: Path, other: Path) -> None:
    same_state(one, other)
    assert lasting(one) == lasting(other)


def test_an_interrupt_while_samples_are_made_is_obeyed_behind_the_part_and_the_run_goes_on(stopped, recipe, tmp_path):
    with pytest.raises(Interrupted, match=r"samples of 4 of 5 prompts, saved; continue with: mmgrpo resume"):
        train(stopped(signal.SIGINT), tmp_path / "run")
    folder = tmp_path / "run" / "offline"
    assert len(list(folder.glob("prompt_*"))) == 4 and not journal.read(tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("prompt_*")}
    resume(tmp_path / "run")
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("prompt_*")}.items()
    train(recipe("train.iterations=2"), tmp_path / "whole")
    same_training(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_while_samples_are_made_loses_one_part_and_ends_as_if_it_had_not_been(stopped, recipe, tmp_path):
    (tmp_path / "mine.toml").write_text(resolved(stopped(signal.SIGKILL)))
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()}); "  # another number may round otherwise
    code += "import sys; from pathlib import Path; from mmgrpo.recipe import load; from mmgrpo.trainer import train; "
    code += "train(load(Path(sys.argv[1])), Path(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "mine.toml"), str(tmp_path / "run")], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "run" / "offline").glob("prompt_*"))) == 2
    resume(tmp_path / "run")
    train(recipe("train.iterations=2"), tmp_path / "whole")
    same_training(tmp_path / "run", tmp_path / "whole")


def test_a_resumed_run_and_one_that_finds_its_samples_made_equal_an_uninterrupted_one_bit_for_bit(recipe, tmp_path):
    whole = tmp_path / "whole"
    train(recipe(), whole)
    train(recipe("train.iterations=2"), tmp_path / "half")
    resume(tmp_path / "half", ["train.iterations=4"])
    same_training(tmp_path / "half", whole)
    files = {path: path.stat().st_mtime_ns for path in (whole / "offline").iterdir()}
    train(recipe(f"offline.folder='{whole / 'offline'}'"), tmp_path / "shared")
    assert not (tmp_path / "shared" / "offline").exists()
    assert files == {path: path.stat().st_mtime_ns for path in (whole / "offline").iterdir()}
    same_training(tmp_path / "shared", whole)


# ---- refusals


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["seed=4"], "seed = 3; expected 4"),
        (["offline.samples=4"], "offline.samples = 5; expected 4"),
        (["prompts.limit=4"], "prompts = '5 with SHA-256"),
        (["policy.call.num_inference_steps=3"], "policy.call = {'num_inference_steps': 2}"),
        (["rewards.soft.weight=0.5"], "rewards.soft = {'weight': 1.0,"),
        (["rewards=[{name='other', build='rewards.shapes:shape_reward'}]"], "rewards.other = None"),
    ],
)
def test_samples_of_another_origin_are_refused_in_one_line(collected, recipe, tmp_path, overrides, key) -> None:
    shared = f"offline.folder='{collected.stored}'"
    with pytest.raises(
        ValueError, match=r"^offline\.folder: the samples in .* expected .*, or another folder$"
    ) as said:
        train(recipe(shared, *overrides), tmp_path / "other")
    assert key in str(said.value) and "\n" not in str(said.value)


def test_what_concerns_training_alone_may_be_another(collected, recipe) -> None:
    changed = ("policy.draws.count=1", "policy.replay_rows=3", "train.group_size=2", "objective.strength=3.0")
    run = start(recipe(*changed, f"offline.folder='{collected.stored}'"))
    assert offline.opened(run, Path("unused")) == collected.stored


def test_other_prompts_have_another_digest(collected) -> None:
    first, *rest = collected.prompts
    for other in (replace(first, text="x"), replace(first, target=1), replace(first, columns={"a": 1})):
        assert offline.digest([other, *rest]) != offline.digest(collected.prompts)


def test_samples_that_are_lost_after_the_weights_have_moved_are_not_made_again(recipe, tmp_path) -> None:
    train(recipe("train.iterations=1"), tmp_path / "run")
    lost = tmp_path / "run" / "offline" / "prompt_2.safetensors"
    lost.unlink()
    with pytest.raises(ValueError, match=r"lacks samples of prompt 2, and the weights that made them have gone 1 iter"):
        resume(tmp_path / "run", ["train.iterations=2"])
    assert not lost.exists()


def test_a_damaged_file_is_named(collected) -> None:
    path = offline.file_of(collected.stored, collected.prompts[0])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"prompt_0\.safetensors is damaged: .*; expected the samples of prompt 0"):
        offline.read(collected.stored, collected.prompts[0])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.group_size=6"], r"offline\.samples: 5 arrived with train\.group_size 6; expected at least as many"),
        (["train.rounds=2"], r"offline: .* arrived with train\.rounds; expected none"),
        (["behaviour.lag=0.5"], r"offline: .* arrived with behaviour\.lag; expected none"),
        (["loss.kl_in_reward=0.1"], r"offline: .* arrived with loss\.kl_in_reward; expected none"),
        (["recall.groups=4"], r"recall\.groups: .* expected the stage 'align'"),
        (["train.stage=align"], r"offline\.samples or folder: 5 and '' arrived with train\.stage 'align'; expected"),
    ],
)
def test_what_needs_rollouts_is_refused(recipe, overrides, said) -> None:
    with pytest.raises(RecipeError, match=rf"^offline\.toml: {said}"):
        recipe(*overrides)


def test_a_policy_of_steps_is_refused(recipe, tmp_path) -> None:
    text = (tmp_path / "offline.toml").read_text().replace('method = "gdro"\n', "")
    steps = 'sampler = { build = "mmgrpo.transitions:flow_sde" }\nplan = { build = "mmgrpo.schedules:all_but_last" }'
    text = text.replace("draws = { count = 2, sets = 2 }", steps).replace("[train]", '[train]\nstage = "offline"')
    (tmp_path / "offline.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"^offline\.toml: policy\.draws: missing, with train\.stage 'offline'; exp"):
        recipe()


def test_a_policy_that_cannot_draw_anew_and_an_advantage_that_asks_for_decisions_are_refused(recipe, tmp_path) -> None:
    text, _ = next(kind for kind in KINDS if kind.name == "text").make(tmp_path)
    with pytest.raises(
        ValueError, match=r"^train\.stage is 'offline', and a LanguagePolicy cannot draw anew from samples"
    ):
        offline.redrawing(text)
    run = start(recipe("advantage={build='mmgrpo.credit:anchored_states'}"))
    with pytest.raises(
        ValueError, match=r"^the advantage needs .* of every decision, which samples that were made once"
    ):
        examine(run)


# ---- learning


LEARNING = (  # chosen on the validation prompts
    f"prompts={{source='{DEMO}/prompts/train.jsonl'}}",
    f"evaluation={{source='{DEMO}/prompts/held_out.jsonl', samples=32}}",
    "policy.call.num_inference_steps=4",
    "policy.evaluation_call={num_inference_steps=8}",
    "policy.draws={count=2, low=0.5, sets=8}",  # how many shapes there are is decided among much noise
    "policy.rollout_rows=128",
    "policy.replay_rows=64",
    "offline.samples=16",
    "objective.strength=40.0",  # at the published 12 the images of this model lose their quality
    "reference.kind=previous",  # held to the start, as published, it gains a tenth of this in as many iterations
    "loss.kl_weight=20.0",
    "optimizer={learning_rate=1e-3, max_grad_norm=0.01, warmup=2, decay='linear', muon=['*transformer_blocks*']}",
    "ema.decay=0.9",
    "train={iterations=12, prompts=28, group_size=6, updates=2, evaluate_every=12, save_every=12}",
)


@pytest.mark.slow
def test_on_samples_that_are_made_once_the_image_demo_learns_what_held_out_prompts_ask(recipe, tmp_path) -> None:
    """Seeds 0, 1, 2: 0.728 to 0.857, 0.693 to 0.799, 0.707 to 0.842, in 40 seconds of one thread each."""
    train(recipe("seed=0", *LEARNING), tmp_path / "run")
    before = float(moved.kept(tmp_path / "run")["soft"].mean())
    assert journal.read(tmp_path / "run")[-1]["held_out/soft"] > before + 0.06
