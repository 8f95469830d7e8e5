"""The shipped recipes of speech train, on tiny models and recordings that are made here."""

import json
from pathlib import Path

import pytest
import soundfile
import torch
from sounds import sound
from test_rewards_speech_models import speaker, speller  # noqa: F401 - fixtures
from test_shipped_recipes import FOLDER

from mmgrpo import checkpoint, journal, recipe
from mmgrpo.run import start
from mmgrpo.trainer import begin, resume
from pipelines import speech_models

RATE = 16_000
TINY = {
    "network": {"kind": "unet", "widths": [8, 16], "time_width": 8},
    "representation": {"kind": "complex_spectrogram", "centred": True},
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Four tones of half a second, hiss to mix with them, and a list."""
    (tmp_path / "noise").mkdir()
    hiss = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / "noise/hiss.wav", hiss.numpy(), RATE)
    lines = []
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", sound(RATE // 2, number).numpy(), RATE)
        lines.append(json.dumps({"prompt": "a tone", "clean": f"{number}.wav"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "prompts.jsonl"


def shipped(name: str, prompts: Path, *sizes: str) -> recipe.Recipe:
    places = [f"prompts.source={json.dumps(str(prompts))}", f"policy.noise={json.dumps(str(prompts.parent / 'noise'))}"]
    return recipe.load(
        FOLDER / f"{name}.toml", [*places, "policy.device=cpu", "policy.seconds=0.5", "train.prompts=2", *sizes]
    )


@pytest.mark.slow
def test_an_enhancer_is_trained_from_nothing_and_goes_on_where_it_stopped(prompts, tmp_path):
    """Half a run and its rest end with the weights of a whole one; the loss falls."""
    network = "policy.new.network={kind = 'unet', widths = [8, 16], time_width = 8}"
    quick = [network, "train.iterations=8", "train.prompts=4", "optimizer.learning_rate=3e-3", "train.evaluate_every=4",
             "ema.decay=0.5"]  # fmt: skip
    held = f"evaluation={{source = {json.dumps(str(prompts))}, media = {{clean = 'clean'}}}}"
    whole = begin(start(shipped("sgmse_like_pretrain", prompts, *quick, held)), tmp_path / "whole")
    lines = journal.read(tmp_path / "whole")
    assert lines[-1]["held_out/loss"] < lines[3]["held_out/loss"]
    assert "loss (trained on)" in (tmp_path / "whole" / "held_out.txt").read_text()
    begin(start(shipped("sgmse_like_pretrain", prompts, *quick, held, "train.iterations=4")), tmp_path / "half")
    text = (tmp_path / "half" / "recipe.toml").read_text()
    (tmp_path / "half" / "recipe.toml").write_text(text.replace("iterations = 4", "iterations = 8"))
    rest = resume(tmp_path / "half")
    assert all(torch.equal(value, rest.policy.trainable()[name]) for name, value in whole.policy.trainable().items())
    saved = checkpoint.latest(tmp_path / "whole")
    loaded = speech_models.load(saved / "model")
    with whole.averaged():
        for name, value in loaded.network.state_dict().items():
            assert torch.equal(value, whole.policy.model.network.state_dict()[name])


@pytest.mark.slow
def test_three_measures_align_an_enhancer(prompts, tmp_path, speaker, speller):  # noqa: F811
    """FlowSE-GRPO's recipe passes its check and moves every weight; the words of held-out recordings are counted."""
    torch.manual_seed(0)
    model = speech_models.create(TINY)
    for value in model.network.parameters():
        value.data += 0.05 * torch.randn(value.shape)
    speech_models.save(tmp_path / "model", model.network, model.representation)
    sizes = [f"policy.model={json.dumps(str(tmp_path / 'model'))}", "train.iterations=1", "train.group_size=3",
             "rewards.speaker.device=cpu", "rewards.content.device=cpu", "rewards.words.device=cpu", "rewards.content.layer=2",
             *(f"rewards.{name}.model={json.dumps(place)}"
               for name, place in (("speaker", speaker), ("content", speaker), ("words", speller)))]  # fmt: skip
    run = start(shipped("flowse_dnsmos_multi", prompts, *sizes))
    before = {name: value.detach().clone() for name, value in run.policy.trainable().items()}
    begin(run, tmp_path / "run")
    checked = (tmp_path / "run" / "check.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in checked if not line.startswith("ok")] == []
    assert [name for name, value in run.policy.trainable().items() if torch.equal(value, before[name])] == []
    (metrics,) = journal.read(tmp_path / "run")
    assert {"reward/dnsmos/mean", "reward/speaker/mean", "reward/content/mean"} <= metrics.keys()
    assert "reward/words/mean" not in metrics
