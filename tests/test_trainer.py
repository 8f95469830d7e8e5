"""Whole runs of the image demo's model: they train, stop on request, and go on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from mmgrpo import checkpoint, journal
from mmgrpo.check import examine
from mmgrpo.evaluation import evaluate
from mmgrpo.gathering import gather
from mmgrpo.journal import Stopwatch
from mmgrpo.recipe import Recipe, load
from mmgrpo.run import start
from mmgrpo.trainer import improve, resume, train
from mmgrpo.types import Advantage
from pipelines import assets

SMALL = [
    "policy.rollout_rows=8",
    "policy.replay_rows=8",
    "train.prompts=4",
    "train.group_size=4",
    "train.iterations=4",
    "train.save_every=1",
    "train.evaluate_every=0",
    "ema.decay=0.5",
    "policy.call.num_inference_steps=5",
    "evaluation.samples=1",
]
TIMED = ("seconds/", "samples_per_second", "memory/")


def recipe(*overrides: str) -> Recipe:
    shipped = assets.folder("image_demo")
    places = [
        f"policy.model={json.dumps(str(shipped))}",
        f"prompts.source={json.dumps(str(shipped / 'prompts' / 'train.jsonl'))}",
        f"evaluation.source={json.dumps(str(shipped / 'prompts' / 'validation.jsonl'))}",
    ]
    return load(Path(str(files("pipelines") / "recipes" / "demo_image_flow_grpo.toml")), [*places, *SMALL, *overrides])


def state(folder: Path) -> tuple[dict, dict]:
    path = checkpoint.latest(folder)
    assert path is not None
    return checkpoint.read(path)


def same_state(one: Path, other: Path) -> None:
    tensors, facts = state(one)
    expected, expected_facts = state(other)
    assert facts == expected_facts
    assert tensors.keys() == expected.keys()
    for part in expected:
        assert tensors[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(tensors[part][name], value), (part, name)


def lasting(folder: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in journal.read(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("muon", [[], ["*blocks*"]], ids=["AdamW", "Muon beside AdamW"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(muon, tmp_path):
    named = f"optimizer.muon={muon}"
    train(recipe(named), tmp_path / "whole")
    train(recipe(named, "train.iterations=2"), tmp_path / "half")
    text = (tmp_path / "half" / "recipe.toml").read_text()
    (tmp_path / "half" / "recipe.toml").write_text(text.replace("iterations = 2", "iterations = 4"))
    resume(tmp_path / "half")
    same_state(tmp_path / "half", tmp_path / "whole")
    assert lasting(tmp_path / "half") == lasting(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:skipped .* it was never finished")  # what a kill leaves behind
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    train(recipe(), tmp_path / "whole")
    folder, moments = tmp_path / "killed", random.Random(0)
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})"  # another number may round otherwise
    code = f"{threads}; import sys; from pathlib import Path; from tests.test_trainer import go_on; go_on(Path(sys.argv[1]))"
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], env={**os.environ, "PYTHONPATH": "."}
        ) as process:
            until = time.monotonic() + 120
            while not list(folder.glob("checkpoints/0*")) and time.monotonic() < until and process.poll() is None:
                time.sleep(0.1)
            time.sleep(moments.uniform(0, 2))
            process.send_signal(signal.SIGKILL)
    go_on(folder)
    same_state(folder, tmp_path / "whole")


def go_on(folder: Path) -> None:
    if checkpoint.latest(folder) is None:
        train(recipe(), folder)
    else:
        resume(folder)


@pytest.mark.slow
def test_a_request_to_stop_is_obeyed_after_the_step_and_says_how_to_go_on(tmp_path):
    shipped = assets.folder("image_demo")
    small = [item for item in SMALL if not item.startswith(("train.iterations", "train.save_every"))]
    small += ["train.iterations=100", "train.save_every=100", "evaluation.source=''"]
    small += [f"policy.model='{shipped}'", f"prompts.source='{shipped / 'prompts' / 'train.jsonl'}'"]
    command = [sys.executable, "-m", "mmgrpo.cli", "train", "demo_image", *small, "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 120
    while not journal.read(tmp_path / "run") and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, complaint
    assert f"mmgrpo resume {tmp_path / 'run'}" in " ".join(complaint.split())
    _, facts = state(tmp_path / "run")
    assert facts["counters"]["iteration"] == len(journal.read(tmp_path / "run"))


def test_a_check_of_the_demo_finds_nothing_wrong_and_a_spread_to_learn_from():
    report = examine(start(recipe("policy.rollout_rows=4")))
    assert report.ok, report.lines
    assert "on-policy" in " ".join(report.lines)


def test_a_scheduler_without_noise_of_its_own_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^TinyImagePipeline cannot be replayed exactly: no step is stochastic$"):
        start(recipe("policy.sampler='native'", "policy.rollout_rows=2"))


def test_evaluation_with_a_checkpoint_uses_its_averaged_weights(tmp_path):
    train(recipe("train.iterations=1"), tmp_path / "run")
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    before = evaluate(recipe(), None, tmp_path / "before")
    after = evaluate(recipe(), tmp_path / "run", tmp_path / "after")
    assert before.keys() == after.keys() == {"soft", "exact", "distance"}
    assert before["distance"] != after["distance"]
    assert json.loads((tmp_path / "after" / "scores.json").read_text()) == after


def improved(advantage: Advantage, *overrides: str) -> dict[str, float]:
    """Metrics of an update of the demo, whose four groups of four samples are judged as given."""
    run = start(recipe("train.updates=1", *overrides))
    return improve(run, gather(run, Stopwatch(run.device)), advantage)


def test_the_best_and_worst_are_kept_of_each_group_or_of_all_that_was_generated():
    values = torch.tensor([4.0, 3, 2, 1, *[0] * 8, -1, -2, -3, -4])
    advantage = Advantage(values, torch.ones(16, dtype=torch.bool))
    assert improved(advantage, "train.keep_share=0.5")["update/samples"] == 4  # of the first and the last group
    assert improved(advantage, "train.keep_share=0.5", "train.keep_among='batch'")["update/samples"] == 8


def test_a_sample_whose_separate_advantages_cancel_is_not_left_out():
    several = torch.zeros(2, 16)
    several[:, 3], several[0, 5] = torch.tensor([1.0, -1.0]), 1.0
    keep = torch.ones(16, dtype=torch.bool)
    every = "train.keep_share=1.0"
    assert improved(Advantage(several.sum(0), keep, separate=several), every)["update/samples"] == 2
    assert improved(Advantage(several.sum(0), keep), every)["update/samples"] == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    train(recipe("train.iterations=1"), tmp_path / "run")
    with pytest.raises(FileExistsError, match="mmgrpo resume"):
        train(recipe("train.iterations=1"), tmp_path / "run")
