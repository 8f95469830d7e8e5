"""Whole runs of a tiny speech flow through the trainer: every objective, several updates and rounds, exact resume."""

import re
from pathlib import Path

import pytest
import torch
from sounds import recordings, saved, tiny
from test_vlm_runs import NEEDS_TOKENS, OBJECTIVES, lasting, states

from mmgrpo import journal
from mmgrpo.check import examine
from mmgrpo.recipe import Recipe, load
from mmgrpo.run import start
from mmgrpo.trainer import resume, train

REWARD = '''
import torch

def closeness(samples):
    """Minus the distance from the reference in dB, over the samples that count."""
    there = torch.arange(samples.audio.shape[2]) < samples.audio_length[:, None]
    rest = ((samples.audio - samples.reference_audio)[:, 0].square() * there).sum(1)
    return -10 * torch.log10(rest / (samples.reference_audio[:, 0].square() * there).sum(1))
'''


@pytest.fixture
def recipe(tmp_path: Path):
    """Makes a recipe of a tiny flow on recordings of different lengths; overrides are the caller's."""
    recordings(tmp_path)
    model = saved(tmp_path / "model", lambda: tiny("band gains"))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "recipe.toml").write_text(f"""
seed = 0
[policy]
build = "pipelines.speech:load"
model = "{model}"
noise = "{tmp_path / "noise"}"
snr = [0, 5]
steps = 4
plan = {{ build = "mmgrpo.schedules:random_window", size = 2, high = 3 }}
device = "cpu"
rollout_rows = 3
replay_rows = 3
[prompts]
source = "{tmp_path / "clean" / "*.wav"}"
media = {{ clean = "file" }}
[evaluation]
source = "{tmp_path / "clean" / "*.wav"}"
media = {{ clean = "file" }}
limit = 2
[[rewards]]
name = "closeness"
build = "{tmp_path / "reward.py"}:closeness"
[optimizer]
learning_rate = 1e-3
[train]
iterations = 4
prompts = 2
group_size = 3
save_every = 1
""")

    def made(*overrides: str) -> Recipe:
        return load(tmp_path / "recipe.toml", overrides)

    return made


def test_a_check_examines_replay_gradients_and_the_plain_sampler(recipe) -> None:
    report = examine(start(recipe()))
    assert report.ok, report.lines
    for words in ("other rows: alone a recording differs by", "noise off: differs from the plain Euler sampler by"):
        assert any(words in line for line in report.lines)


RESUMED = {
    "one update": (),
    "several updates and rounds": ("train.updates=2", "train.passes=2", "train.rounds=2"),
    "kl to an average, part of the weights": (
        "loss.kl_weight=0.1",
        "reference.kind='ema'",
        "reference.decay=0.5",
        "ema.decay=0.5",
        "train.updates=2",
        "policy.train=['blocks.*', 'leave.*']",
    ),
}


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(recipe, tmp_path, overrides) -> None:
    same_after_a_resume(recipe, tmp_path, overrides)


@pytest.mark.parametrize("objective", ["nft", "advantage_weighted"])
def test_so_does_one_on_draws_whose_sampling_weights_lag(recipe, tmp_path, objective) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(re.sub("(?m)^plan = .*$", "draws = { count = 2 }", path.read_text()))
    lagging = ("behaviour.lag=0.5", "ema.decay=0.5", "train.updates=2", "train.rounds=2")
    same_after_a_resume(recipe, tmp_path, (*lagging, f"objective.build='mmgrpo.matching:{objective}'"))
    assert examine(start(recipe())).ok


def same_after_a_resume(recipe, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Compare a run of four iterations with one that stops after two and goes on."""
    overrides = (*overrides, "train.evaluate_every=1")
    train(recipe(*overrides), tmp_path / "whole")
    train(recipe(*overrides, "train.iterations=2"), tmp_path / "half")
    text = (tmp_path / "half" / "recipe.toml").read_text()
    (tmp_path / "half" / "recipe.toml").write_text(text.replace("iterations = 2", "iterations = 4"))
    resume(tmp_path / "half")
    (one, facts), (other, expected) = states(tmp_path / "half"), states(tmp_path / "whole")
    assert facts == expected
    for part, tensors in other.items():
        for name, value in tensors.items():
            assert torch.equal(one[part][name], value), (part, name)
    assert lasting(tmp_path / "half") == lasting(tmp_path / "whole")
    assert len({line["held_out/closeness"] for line in lasting(tmp_path / "whole")}) == 4


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in NEEDS_TOKENS] + ["guarded", "exact KL"])
def test_every_objective_trains_denoising_steps_of_speech(recipe, name, tmp_path) -> None:
    further = {
        "guarded": ["objective.build='mmgrpo.objectives:guarded'"],
        "exact KL": ["loss.kl='exact'", "loss.kl_weight=0.1", "reference.kind='frozen'"],
    }
    chosen = (OBJECTIVES | further)[name]
    run = train(recipe(*chosen, "train.iterations=2", "train.updates=2"), tmp_path / "run")
    assert run.updates == 4
    last = journal.read(tmp_path / "run")[-1]
    assert last["update/ratio/max_abs_log"] > 0 and last["update/ratio/max_abs_log/first"] == 0
    assert last["update/sampler/mean_abs_gap"] < 1e-5


def test_recordings_get_closer_to_their_references(recipe, tmp_path) -> None:
    size = (
        "train.iterations=12",
        "train.group_size=8",
        "train.prompts=4",
        "policy.rollout_rows=16",
        "policy.replay_rows=16",
    )
    train(
        recipe(*size, "train.evaluate_every=1", "optimizer.learning_rate=3e-3", "train.save_every=12"), tmp_path / "run"
    )
    found = [line["held_out/closeness"] for line in journal.read(tmp_path / "run")]
    assert found[-1] > found[0] + 3


def test_unusable_recordings_stop_a_run_before_it_begins(recipe, tmp_path) -> None:
    (tmp_path / "clean" / "3.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"problems: 1\n.*clean/3.wav: is no readable recording"):
        start(recipe())
