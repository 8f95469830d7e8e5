"""Whole runs on the image demo: a process reward model is trained, guides, is trained with, and is distilled away."""

import json
import math
from pathlib import Path

import pytest
import torch

from mmgrpo import journal
from mmgrpo.data import requests
from mmgrpo.recipe import load
from mmgrpo.run import Run, start
from mmgrpo.trainer import begin
from mmgrpo.types import Samples

DEMO = Path(__file__).parent.parent / "assets" / "image_demo"
GENERATOR = f"""
build = "pipelines.diffusion:load"
model = {json.dumps(str(DEMO))}
pipeline = "pipelines.tiny_image:TinyImagePipeline"
dtype = "float32"
sampler = {{ build = "mmgrpo.transitions:flow_sde", noise = 0.7 }}
plan = {{ build = "mmgrpo.schedules:all_but_last" }}
call = {{ num_inference_steps = 5 }}
rollout_rows = 56
replay_rows = 32
"""
DATA = f"""
[prompts]
source = {json.dumps(str(DEMO / "prompts" / "train.jsonl"))}
[evaluation]
source = {json.dumps(str(DEMO / "prompts" / "held_out.jsonl"))}
samples = 12
"""
LEARNER = f"""
rewards = []
[policy]
build = "pipelines.process_reward:learner"
reward = {{ build = "test_process_reward_runs:brightness_or_darkness" }}
network = {{ patch = 2, width = 32, blocks = 2 }}
draws = 4
[policy.generator]
{GENERATOR}
{DATA}
[optimizer]
learning_rate = 3e-3
warmup = 5
decay = "linear"
[train]
stage = "pretrain"
iterations = 48
prompts = 28
group_size = 4
updates = 2
evaluate_every = 48
"""
REST = f"""
rewards = [{{ name = "soft", build = "rewards.shapes:shape_reward" }}]
{DATA}
[optimizer]
learning_rate = 1e-5
[train]
iterations = 1
prompts = 2
group_size = 4
"""
ALIGNED = f"{REST}\n[policy]\n{GENERATOR}"
STUDENT = f'{REST}\n[policy]\nbuild = "pipelines.distilling:student"\n[policy.generator]\n{GENERATOR}'
SMALL = [
    "train.iterations=1",
    "train.prompts=4",
    "train.group_size=2",
    "train.evaluate_every=1",
    "evaluation.samples=2",
]


def brightness_or_darkness(samples: Samples) -> torch.Tensor:
    """Mean over the picture, in tenths; its opposite where the prompt asks for an even number, which must be read; (B,)."""
    even = torch.tensor([int(prompt.columns["count"]) % 2 == 0 for prompt in samples.prompts])
    return torch.where(even, -10, 10) * samples.image.flatten(1).mean(1)


def ran(recipe: str, folder: Path, *overrides: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.toml").write_text(recipe)
    return begin(start(load(folder / "given.toml", overrides)), folder / "run")


def model_of(folder: Path) -> str:
    return json.dumps(str(next((folder / "run" / "checkpoints").glob("*/model"))))


def guide_of(folder: Path, key: str, beta: float) -> str:
    return f'{key}={{build="pipelines.process_reward:guide", model={model_of(folder)}, beta={beta}}}'


def test_a_model_is_trained_guides_is_trained_with_and_distilled_by_the_one_loop(tmp_path):
    ran(LEARNER, tmp_path / "prm", *SMALL)
    (line,) = journal.read(tmp_path / "prm" / "run")
    assert {"teach/loss", "held_out/loss", "held_out/rank_correlation_at_0.5"} <= line.keys()
    ran(ALIGNED, tmp_path / "aligned", guide_of(tmp_path / "prm", "policy.guide", 0.01))
    assert "ok   guide: moves steps [0, 1, 2, 3] by" in (tmp_path / "aligned" / "run" / "check.txt").read_text()
    ran(
        STUDENT, tmp_path / "student", *SMALL, "train.stage=pretrain", guide_of(tmp_path / "prm", "policy.generator.guide", 0.01)
    )  # fmt: skip
    (line,) = journal.read(tmp_path / "student" / "run")
    assert 0 < line["teach/loss"] and "held_out/soft" in line


@pytest.mark.slow
def test_samples_guided_by_a_trained_model_score_higher_from_equal_noise(tmp_path):
    learned = ran(LEARNER, tmp_path / "prm")
    (line,) = [line for line in journal.read(tmp_path / "prm" / "run") if "held_out/loss" in line]
    assert line["held_out/rank_correlation_at_0.3"] > 0.2  # untrained: -0.16 to 0.06 in five seeds
    (tmp_path / "given.toml").write_text(ALIGNED)
    guided = start(load(tmp_path / "given.toml", [guide_of(tmp_path / "prm", "policy.guide", 0.01)]))
    batch = requests(guided.prompts, range(len(guided.prompts)), group_size=8, seed=1001, iteration=0)
    without = learned.policy.generator.rollout(batch)[1]
    change = brightness_or_darkness(guided.policy.rollout(batch)[1]) - brightness_or_darkness(without)
    of_prompts = change.view(len(guided.prompts), -1).mean(1)  # of which an untrained model raises as many as it lowers
    assert float(of_prompts.mean()) > 2 * float(of_prompts.std()) / math.sqrt(len(of_prompts))
    assert torch.isfinite(change).all()
