"""The three recipes of Euphonium train, each on a tiny HunyuanVideo: a process reward model, what it guides, and what does without."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from test_rewards_judge import Server, server  # noqa: F401 - a fixture
from test_shipped_recipes import (
    FOLDER,
    HUNYUAN,
    NAMED,
    SHORT,
    SMALL,
    judge_url,  # noqa: F401 - a fixture
    plain_pipeline,
    prompts_file,
    same_weights,
    trains_and_saves,
)

from mmgrpo import checkpoint, journal, recipe
from mmgrpo.run import Run, start
from mmgrpo.trainer import begin
from pipelines.process_reward_network import load

TINY = NAMED["HunyuanVideo"]
NETWORK = "policy.network={patch = 2, width = 16, blocks = 1, heads = 2}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    diffusers.logging.set_verbosity_error()
    TINY.build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shipped(name: str, model: Path, *further: str) -> Run:
    """The recipe at toy size, on the tiny model; a pipeline inside another policy is made small where it is."""
    pipeline = [f"policy.model={json.dumps(str(model))}", "policy.device=cpu", *SMALL, *HUNYUAN]
    file = FOLDER / f"{name}.toml"
    if recipe.load(file).policy["build"] != "pipelines.diffusion:load":
        pipeline = [value.replace("policy.", "policy.generator.", 1) for value in pipeline]
    source = f"prompts.source={json.dumps(str(prompts_file(model.parent)))}"
    return start(recipe.load(file, [source, *pipeline, *SHORT, *further]))


def test_the_guided_recipe_has_the_sources_schedule_strength_and_number_of_trained_steps():
    policy = recipe.load(FOLDER / "hunyuan_video_euphonium.toml").policy
    given, even = torch.tensor(policy["call"]["sigmas"]), torch.arange(16, 0, -1) / 16
    assert torch.allclose(
        7 * given / (1 + 6 * given), 5 * even / (1 + 4 * even), atol=5e-5
    )  # shifts of 7 and of 5, 5 digits
    assert policy["guide"]["kappa"] == policy["sampler"]["eta"] ** 2 / (2 * 3.125)  # beta
    assert policy["plan"]["count"] == int(0.6 * 15)


@pytest.fixture
def process_reward(model: Path, judge_url: str) -> Path:  # noqa: F811
    """What the first recipe ends with after one iteration."""
    run = shipped(
        "hunyuan_video_euphonium_reward",
        model,
        NETWORK,
        "policy.generator.plan.count=2",
        f"policy.reward.url={json.dumps(judge_url)}",
        "train.updates=1",
    )
    before = {name: value.detach().clone() for name, value in run.policy.trainable().items()}
    begin(run, model.parent / "reward")
    passed(model.parent / "reward")
    saved = checkpoint.latest(model.parent / "reward") / "model"
    assert [name for name, value in load(saved).named_parameters() if torch.equal(value, before[name])] == []
    return saved


def passed(folder: Path) -> str:
    """What the check of a run says, all of it fine."""
    checked = (folder / "check.txt").read_text(encoding="utf-8")
    assert [line for line in checked.splitlines() if not line.startswith("ok")] == []
    return checked


def guide(key: str, folder: Path) -> tuple[str, str]:
    """Overrides: the guide's model, and the beginning of its window in four steps."""
    return f"{key}.model={json.dumps(str(folder))}", f"{key}.first=1"


@pytest.mark.slow
def test_a_process_reward_model_is_trained_and_guides_a_run_that_learns_from_it(
    model,
    process_reward,
    judge_url,  # noqa: F811
    tmp_path,
):
    url = f"rewards.physics.url={json.dumps(judge_url)}"
    run = shipped("hunyuan_video_euphonium", model, *guide("policy.guide", process_reward), url, "policy.plan.count=2")  # fmt: skip
    trains_and_saves(run, TINY, model, tmp_path / "run")
    assert "ok   guide: moves steps [1, 2] by" in passed(tmp_path / "run")


@pytest.mark.slow
def test_a_student_of_the_guide_is_trained_and_saved_for_a_plain_pipeline(model, process_reward, tmp_path):
    key = "policy.generator.guide"
    run = shipped("hunyuan_video_euphonium_student", model, *guide(key, process_reward), "policy.generator.plan.indices=[1, 2]", "train.updates=2")  # fmt: skip
    before = {name: value.detach().clone() for name, value in run.policy.trainable().items()}
    begin(run, tmp_path / "run")
    passed(tmp_path / "run")
    (line,) = journal.read(tmp_path / "run")
    assert line["teach/loss"] > 0
    assert [name for name, value in run.policy.trainable().items() if torch.equal(value, before[name])] == []
    generator = run.policy.generator
    same_weights(generator, plain_pipeline(generator, model, checkpoint.latest(tmp_path / "run") / "model"))
