"""The interleaved demo from its start to its pictures, at a length that shows a beginning."""

import json

import pytest
from PIL import Image

from pipelines import demo_interleaved


@pytest.mark.slow
def test_the_demo_learns_and_leaves_what_a_person_would_look_at(tmp_path):
    shorter = ["train.iterations=12", "train.evaluate_every=6", "ema.decay=0.5", "evaluation.samples=8"]
    demo_interleaved.run(tmp_path, 0, shorter)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["hybrid_sampled_after"] > summary["hybrid_sampled_before"]
    assert summary["text_sampled_after"] > summary["text_sampled_before"] + 0.02
    assert summary["text_after"] > summary["text_before"] - 0.03
    assert summary["picture_after"] > summary["picture_before"] - 0.03
    for name in ("stories.png", "curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600
    assert (tmp_path / "aligned" / "model.safetensors").is_file()
