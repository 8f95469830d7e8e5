"""The README's own example runs as it stands, and what it offers instead is there."""

import importlib
import re
from pathlib import Path

import pytest

from mmgrpo.recipe import load
from mmgrpo.trainer import train

ROOT = Path(__file__).parent.parent


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_example_of_another_pipeline_and_reward_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "mine.py").write_text(block("python"))
    (tmp_path / "mine.toml").write_text(block("toml"))
    run = train(load(tmp_path / "mine.toml", ["train.iterations=1", "train.prompts=2"]), tmp_path / "run")
    assert run.iteration == 1
    assert list(run.rewards) == ["redness"]


def test_every_sampler_and_plan_that_the_example_offers_instead_is_there() -> None:
    lines = re.findall(r'"(mmgrpo\.\w+):\w+" \} +# or ([\w, ]+)', block("toml"))
    assert len(lines) == 2
    for module, names in lines:
        assert set(names.split(", ")) <= vars(importlib.import_module(module)).keys(), names
