"""The shipped recipe of answers of texts and images, at toy size: taught from data, then aligned with rewards of parts."""

import json
from pathlib import Path

import tiny_vlms
import torch
from test_rewards_image import blip_folder  # noqa: F401  a fixture
from test_rewards_judge import Server, reply, server  # noqa: F401  a fixture
from test_shipped_recipes import FOLDER, SHORT
from tiny_vlms.policy import picture
from transformers import Emu3ForConditionalGeneration

from mmgrpo import checkpoint, journal, recipe
from mmgrpo.run import start
from mmgrpo.trainer import begin

NAME = FOLDER / "emu3_interleaved.toml"
MODEL = "Emu3ForConditionalGeneration"
SIZES = [
    "policy.device='cpu'",
    "policy.height=16",
    "policy.width=16",
    "policy.max_new_tokens=30",
    "policy.dtype='float32'",
]


def rows(folder: Path) -> Path:
    """What is asked for, how many images, and an answer."""
    lines = []
    for number in range(2):
        picture(folder / f"{number}.png", 16, 16, number)
        answer = [{"text": "ab"}, {"image": f"{number}.png"}]
        lines.append(json.dumps({"prompt": f"draw {number}", "images": 1, "answer": answer}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "prompts.jsonl"


def test_a_tiny_emu3_is_taught_by_the_warm_up_and_saved_as_its_library_loads_it(tmp_path):
    model, folder = tiny_vlms.saved(MODEL, tmp_path / "model"), tmp_path / "run"
    local = [f"policy.model='{model}'", f"prompts.source='{rows(tmp_path)}'", f"policy.teaching.folder='{tmp_path}'"]
    rate = ["optimizer.learning_rate=0.01", "train.iterations=12"]
    run = start(recipe.load(FOLDER / "emu3_interleaved_warmup.toml", [*local, *SIZES, *SHORT, *rate]))
    begin(run, folder)
    losses = [line["teach/loss"] for line in journal.read(folder)]
    assert losses[-1] < 0.7 * losses[0], losses
    saved = checkpoint.latest(folder)
    assert saved is not None
    plain = Emu3ForConditionalGeneration.from_pretrained(saved / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(plain[name], value) for name, value in run.policy.answers.model.state_dict().items())


def test_a_tiny_emu3_is_aligned_by_the_recipe(server: Server, blip_folder: Path, tmp_path):  # noqa: F811
    server.behave = lambda question, before: reply(f"Score: {len(question) % 11}")
    model = tiny_vlms.saved(MODEL, tmp_path / "model")
    local = {
        "policy.model": model,
        "prompts.source": rows(tmp_path),
        "rewards.text.reward.url": server.url,
        "rewards.image.reward.checkpoint": blip_folder / "weights.safetensors",
        "rewards.image.reward.tokenizer": blip_folder,
        "rewards.image.reward.device": "cpu",
    }
    overrides = [f"{key}={json.dumps(str(value))}" for key, value in local.items()]
    run = start(recipe.load(NAME, [*overrides, *SIZES, *SHORT, "policy.image_top_k=6", "policy.temperature=4.0"]))
    before = {name: value.detach().clone() for name, value in run.policy.trainable().items()}
    folder = tmp_path / "run"
    begin(run, folder)
    checked = (folder / "check.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in checked if not line.startswith("ok")] == []
    [metrics] = list(journal.read(folder))
    assert {"reward/format/mean", "reward/text/mean", "reward/image/mean"} <= metrics.keys()
    changed = [name for name, value in run.policy.trainable().items() if not torch.equal(value, before[name])]
    assert changed and all("lora_" in name and "vqmodel" not in name for name in before)
    saved = checkpoint.latest(folder)
    assert saved is not None
    plain = Emu3ForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    plain.load_adapter(saved / "model")
