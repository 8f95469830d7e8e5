"""The shipped recipe of a block-diffusion model trains at toy size, from a folder such as SDAR's, whose code is not run."""

import json
from pathlib import Path

import pytest
import torch
from test_shipped_recipes import FOLDER
from tiny_block_lms import MODELS, tokenizer
from transformers import AutoModelForCausalLM

from mmgrpo import checkpoint, journal, recipe
from mmgrpo.data import requests
from mmgrpo.run import start
from mmgrpo.scoring import score
from mmgrpo.trainer import begin
from mmgrpo.types import Prompt, Samples

TEMPLATE = "{% for one in messages %}{{ one.content }}{% endfor %}="


def sdar(folder: Path) -> Path:
    """A folder of weights that come with a model's own code, which is not there."""
    torch.manual_seed(0)
    MODELS["Qwen3"]().save_pretrained(folder)
    named = tokenizer()
    named.chat_template = TEMPLATE
    named.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}
    written |= {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "auto_map": own, "block_size": 4}
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    return folder


def test_the_shipped_recipe_passes_its_check_trains_and_saves_what_its_library_loads(tmp_path):
    model, folder = sdar(tmp_path / "model"), tmp_path / "run"
    rows = [{"prompt": f"{number}+{number}", "answer": str(2 * number)} for number in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sizes = ["policy.max_new_tokens=12", "policy.block_size=4", "policy.likelihood_size=2", "policy.mask_token='<mask>'",
             "policy.device='cpu'", "rewards.accuracy.limit=100", "train.prompts=4", "train.group_size=4", "train.updates=2",
             "train.iterations=2", "optimizer.warmup=0", "optimizer.learning_rate=1e-4"]  # fmt: skip
    spread = "rewards.accuracy.reward={build='rewards.length:repetition_penalty', size=1, unit='character'}"
    places = [f"policy.model='{model}'", f"prompts.source='{tmp_path / 'prompts.jsonl'}'"]
    run = start(
        recipe.load(FOLDER / "block_lm_sdar_8b.toml", [*places, *sizes, spread, "advantage.imitated='positive'"])
    )
    begin(run, folder)
    checked = (folder / "check.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in checked if not line.startswith("ok")] == []
    assert [line["reward/speed/mean"] > 0 for line in journal.read(folder)] == [True, True]
    saved = checkpoint.latest(folder)
    assert saved is not None
    plain = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)  # as a Qwen3
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in run.policy.model.state_dict().items())


def test_its_rewards_give_answers_what_they_earn():
    made = recipe.load(FOLDER / "block_lm_sdar_8b.toml")
    rewards = {reward.name: recipe.build(reward.component, reward.name) for reward in made.rewards}
    texts = (
        r"Half of 36 is 18. So it is \boxed{18}.",
        r"It is \boxed{17}.",
        r"It is \boxed{18}." + " Indeed." * 3000,
        "18",
    )
    asked = requests([Prompt(0, "How much?", target="18")], [0], group_size=4, seed=0, iteration=0)
    length, forwards = torch.tensor([20, 8, 8187, 1]), torch.tensor([5, 8, 100, 0])
    found = score(
        rewards, dict.fromkeys(rewards, 1.0), Samples(asked, text=texts, length=length, forwards=forwards)
    ).rewards
    assert found["accuracy"].tolist() == [1, 0, 0, 1]
    assert found["speed"].tolist() == pytest.approx([4, 1, 81.87, 0])
