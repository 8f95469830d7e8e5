"""The speech demo from its start to its pictures and sounds, at a length that shows a beginning."""

import importlib.util
import json

import pytest
import soundfile
from PIL import Image
from test_shipped_recipes import FOLDER

from mmgrpo import recipe
from mmgrpo.run import start
from mmgrpo.trainer import begin
from pipelines import assets, demo_speech

SHORT = ["train.iterations=6", "train.evaluate_every=3", "train.prompts=8", "train.group_size=4", "ema.decay=0.5"]
METRICS = ["pesq", "si_sdr", "stoi", "dnsmos_p808"]


@pytest.mark.slow
def test_the_demo_leaves_what_a_person_would_look_at_and_listen_to(tmp_path, capsys):
    demo_speech.run(tmp_path, 0, SHORT)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(METRICS) == summary["held_out"].keys()
    for found in summary["held_out"].values():
        assert found["before"] > found["noisy"]
    assert summary["held_out"]["si_sdr"]["change"] > -0.1
    assert summary["held_out"]["stoi"]["trained_on"] is False and summary["held_out"]["pesq"]["trained_on"] is True
    for name in ("spectrograms.png", "changes.png", "curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600
    for name in ("noisy", "before", "after", "clean"):
        wave, rate = soundfile.read(tmp_path / "sounds" / f"00_{name}.wav")
        assert rate == 16_000 and len(wave) > rate and abs(wave).max() > 0.01
    assert (tmp_path / "aligned" / "model.safetensors").is_file()
    assert "stoi (not trained on)" in capsys.readouterr().out


@pytest.mark.slow
def test_without_its_package_pesq_is_left_out_and_the_demo_says_so(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pesq" else found(name, *rest))
    demo_speech.run(tmp_path, 0, [*SHORT, "train.iterations=1", "train.evaluate_every=1"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "pesq" not in summary["held_out"] and summary["left_out"] == ["pesq"]
    assert "PESQ is left out" in capsys.readouterr().out


def test_the_two_recipes_differ_in_their_rewards_alone():
    single, multi = (recipe.load(FOLDER / f"speech_{name}_metric.toml") for name in ("single", "multi"))
    for part in ("policy", "prompts", "advantage", "objective", "loss", "optimizer", "train", "evaluation", "ema"):
        assert getattr(single, part) == getattr(multi, part)
    assert [one.name for one in single.rewards if one.weight] == ["pesq"]
    assert sorted(one.name for one in multi.rewards if one.weight) == ["pesq", "si_sdr", "stoi"]
    assert sorted(one.name for one in single.rewards) == sorted(one.name for one in multi.rewards) == sorted(METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speech_single_metric", "speech_multi_metric"])
def test_each_of_the_two_trains(name, tmp_path):
    short = ["train.iterations=1", "train.prompts=2", "train.group_size=2", "train.evaluate_every=0"]
    shipped = assets.folder("speech_demo")
    places = {"policy.model": "base", "policy.noise": "alignment/noise", "prompts.source": "alignment.jsonl",
              "evaluation.source": "validation.jsonl"}  # fmt: skip
    paths = [f"{key}={json.dumps(str(shipped / place))}" for key, place in places.items()]
    run = begin(start(recipe.load(FOLDER / f"{name}.toml", [*paths, *short])), tmp_path)
    assert run.iteration == 1
    assert {line[:4] for line in (tmp_path / "check.txt").read_text().splitlines()} == {"ok  "}
