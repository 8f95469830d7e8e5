"""The picture-question demo from its start to its pictures, at a length that shows a beginning."""

import json

import pytest
from PIL import Image

from pipelines import demo_vlm


@pytest.mark.slow
def test_the_demo_learns_and_leaves_what_a_person_would_look_at(tmp_path, capsys):
    demo_vlm.run(
        tmp_path, 0, ["train.iterations=12", "optimizer.decay='constant'", "ema.decay=0.5", "train.evaluate_every=6"]
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["sampled_after"] > summary["sampled_before"] + 0.05
    assert summary["greedy_after"] > summary["greedy_before"] - 0.03
    assert {f"sampled_{kind}_after" for kind in ("count", "colour", "shape", "more")} <= summary.keys()
    for name in ("answers.png", "curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600
    assert (tmp_path / "aligned" / "model.safetensors").is_file()
    assert "A rise of the first is new skill." in capsys.readouterr().out
