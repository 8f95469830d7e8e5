"""Every method of the catalogue trains the image demo and the question demo, or says at once what the policy cannot tell it."""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmgrpo import journal
from mmgrpo.check import Unsound
from mmgrpo.methods import catalogue, find
from mmgrpo.recipe import load
from mmgrpo.toml import write
from mmgrpo.trainer import train
from pipelines import assets, tiny_vlm

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[1] / "pipelines" / "recipes"
# sections that belong to the method, or to the demo alone
OWN = ("advantage", "objective", "loss", "entropy", "recall", "reference", "behaviour", "ema", "watch")
PROCESS = ("sampler", "plan", "routes", "draws")  # options of a policy that say what its decisions are
STEPS = {"sampler": {"build": "mmgrpo.transitions:flow_sde"}, "plan": {"build": "mmgrpo.schedules:all_but_last"}}
SMALL = {"iterations": 2, "prompts": 2, "updates": 1, "evaluate_every": 0, "save_every": 2, "keep_share": 1.0}
TOKENS = {"dist_centric", "token_hidden_reward", "unlikeliness", "gigpo", "salt_graph", "entropy_clip_batch",
          "entropy_clip_vocabulary", "tis", "mis", "top_entropy", "entropy_bonus", "hybrid_ratio_guided", "disco", "disco_b"}  # fmt: skip
NEEDS_PARTS, NEEDS_EDGES, NEEDS_STEPS, NEEDS_COLUMNS, NEEDS_REWARDS = (
    {"process"},
    {"edge_grpo"},
    {name for name in catalogue() if "policy" in find(name, "").recipe} | {"guard", "noise_weights"},
    {"dr_irl_scaling", "a_star_po"},
    {"lightning_rl"},
)
NEEDS_FACTS = {"euphonium"}  # of rewards of single steps


@dataclass(frozen=True)
class Case:
    recipe: str
    refused: frozenset[str]


CASES = [
    Case(
        "demo_image",
        frozenset(TOKENS | NEEDS_PARTS | NEEDS_EDGES | NEEDS_COLUMNS | NEEDS_REWARDS | NEEDS_FACTS),
    ),
    Case("demo_vlm", frozenset(NEEDS_PARTS | NEEDS_EDGES | NEEDS_STEPS | NEEDS_COLUMNS | NEEDS_REWARDS)),
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.write_prompts(tmp_path_factory.mktemp("pictures"), "train", 16, 0)


def table_of(case: Case, name: str, questions: Path) -> dict[str, Any]:
    """The demo's recipe with the method in place of what it says itself, at a tiny length."""
    table = tomllib.loads((RECIPES / f"{case.recipe}.toml").read_text(encoding="utf-8"))
    table = {key: value for key, value in table.items() if key not in (*OWN, "evaluation")}
    size = find(name, "").recipe.get("train", {}).get("group_size", 4)
    table["train"] = {**SMALL, "group_size": size}
    shipped = assets.folder(case.recipe.removeprefix("demo_") + "_demo")
    named = find(name, "").recipe.get("policy", {})
    others = {key: value for key, value in table["policy"].items() if key not in (*PROCESS, *named)}
    table["policy"] = others | {"model": str(shipped)}
    if named and case.recipe == "demo_image":
        table["policy"] |= {"call": {"num_inference_steps": 16 if name == "e_grpo" else 10}}
    elif case.recipe == "demo_image":
        table["policy"] |= STEPS
    prompts = shipped / "prompts" / "train.jsonl" if case.recipe == "demo_image" else questions
    table["prompts"] |= {"source": str(prompts), "limit": 8}
    table["optimizer"] |= {"learning_rate": 1e-4}
    return {"method": name, "seed": 1} | table


@pytest.mark.parametrize("name", catalogue())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.recipe)
def test_a_method_trains_the_demo_or_says_what_is_missing(case, name, questions, tmp_path):
    (tmp_path / "mine.toml").write_text(write(table_of(case, name, questions)), encoding="utf-8")
    if name in case.refused:
        with pytest.raises((Unsound, ValueError), match=r"needs|lacks"):
            train(load(tmp_path / "mine.toml"), tmp_path / "run")
        return
    run = train(load(tmp_path / "mine.toml"), tmp_path / "run")
    lines = [line for line in journal.read(tmp_path / "run") if "update/loss" in line]
    assert run.iteration == 2
    assert all(math.isfinite(float(line["update/loss"] or 0)) for line in lines)
