"""The world model demo: its shipped models and prompts, and the command from its start to its pictures and clips."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_shipped_recipes import FOLDER
from torch import Tensor

from mmgrpo import recipe
from mmgrpo.data import load_prompts, requests
from mmgrpo.evaluation import held_out_samples
from mmgrpo.run import start
from mmgrpo.seeds import normal
from mmgrpo.types import Batch, Prompt, Samples
from pipelines import assets, demo_world
from pipelines.tiny_video import TinyVideoPipeline
from rewards.dot_world import MOVES, SIZE, STEP, Walks, drawing, middles, tracker
from rewards.inverse_dynamics import Component, ceiling, measures
from rewards.inverse_dynamics_models import pretrained

SHIPPED = Path(__file__).parents[1] / "assets" / "world_demo"
MOVE = Component("move", values=tuple(MOVES), rest="stay")
PARTS = {"held_out": 64, "validation": 32, "train": 128}
SHORT = ["train.iterations=4", "train.evaluate_every=2", "train.prompts=8", "train.group_size=6", "ema.decay=0.5",
         "evaluation.samples=1"]  # fmt: skip


def prompts(part: str) -> list[Prompt]:
    return load_prompts(str(SHIPPED / f"{part}.jsonl"), media={"image": "image"})


def frame(prompt: Prompt) -> Image.Image:
    with Image.open(prompt.media["image"][0]) as image:
        return image.convert("RGB")


def real(asked: list[Prompt]) -> Tensor:
    """The clips that obedient worlds would show, from the middle of the dot in the first frame; (B, F, 3, H, W)."""
    first = torch.stack([torch.from_numpy(np.array(frame(prompt))).permute(2, 0, 1) / 255 for prompt in asked])
    place = (middles(first[:, None])[:, 0] / STEP - 0.5).round() * STEP + STEP / 2
    moves = torch.tensor([[list(MOVES).index(word) for word in prompt.text.split()] for prompt in asked])
    colours = (torch.tensor([prompt.columns[name] for prompt in asked]) for name in ("dot", "background"))
    clips = Walks(place, moves, *colours).clips()
    assert (clips[:, 0] - first).abs().max() < 0.01
    return clips


def test_the_splits_share_neither_actions_nor_first_frames():
    parts = {part: prompts(part) for part in PARTS}
    assert {part: len(rows) for part, rows in parts.items()} == PARTS
    every = [prompt for rows in parts.values() for prompt in rows]
    assert len({prompt.text for prompt in every}) == len(every)
    assert len({frame(prompt).tobytes() for prompt in every}) == len(every)
    for prompt in every:
        assert prompt.text.split() == prompt.columns["actions"]
        assert frame(prompt).size == (SIZE, SIZE)


def test_the_shipped_inverse_dynamics_model_reads_real_clips_of_held_out_worlds():
    asked = prompts("held_out")
    model = pretrained(source=str(SHIPPED / "inverse_dynamics"), network="rewards.inverse_dynamics_models:FramePairs")
    actions = [prompt.text.split() for prompt in asked]
    found = ceiling(measures(model=model, components=(MOVE,)), real(asked), actions)
    assert found["accuracy"] > 0.98 and found["moving"] > 0.98
    backwards = ceiling(measures(model=model, components=(MOVE,)), real(asked).flip(1), actions)
    assert backwards["accuracy"] < 0.4  # the order of frames matters


def test_the_shipped_generator_obeys_as_often_as_stated_and_draws_whole_dots():
    asked = prompts("held_out")[:32]
    pipeline = TinyVideoPipeline.from_pretrained(SHIPPED / "generator", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    clips = pipeline(
        [prompt.text for prompt in asked], image=[frame(prompt) for prompt in asked], num_frames=5,
        num_inference_steps=5, latents=normal(range(32), (3, 5, SIZE, SIZE)), output_type="pt",
    ).frames  # fmt: skip
    ids = torch.arange(32)
    samples = Samples(Batch(tuple(asked), ids, ids, 0, 0), video=clips)
    tracked = measures(model=tracker(), components=(MOVE,))(samples)["accuracy"]
    assert 0.3 < tracked.mean() < 0.6  # 0.05 of a model that draws dots anywhere: most jumps are no move
    assert drawing(samples)["likeness"].mean() > 0.85


def test_the_recipe_builds_the_demo_with_its_actions_in_their_order():
    training = start(recipe.load(FOLDER / "demo_world.toml", places()))
    assert [name for name, weight in training.weights.items() if weight] == ["read"]
    found = training.rewards["read"](Samples(batch_of(prompts("held_out")), video=real(prompts("held_out"))))
    assert isinstance(found, Tensor) and found.mean() > 0.98
    shown = training.rewards["tracked"](Samples(batch_of(prompts("held_out")), video=real(prompts("held_out"))))
    assert not isinstance(shown, Tensor) and shown["accuracy"].mean() == 1


def places() -> list[str]:
    """The paths of the demo as overrides."""
    found = {
        "policy.model": "generator",
        "rewards.read.model.source": "inverse_dynamics",
        "prompts.source": "train.jsonl",
        "evaluation.source": "held_out.jsonl",
    }
    return [f"{key}={json.dumps(str(SHIPPED / place))}" for key, place in found.items()]


def batch_of(asked: list[Prompt]) -> Batch:
    return requests(asked, range(len(asked)), group_size=1, seed=0, iteration=0)


@pytest.mark.slow
def test_the_demo_leaves_what_a_person_would_look_at(tmp_path, capsys):
    demo_world.run(tmp_path, 0, SHORT)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["held_out"]
    assert {name for name, one in found.items() if one["trained_on"]} == {"read"}
    assert {"tracked.accuracy", "tracked.moving", "drawing.whole", "drawing.likeness"} < found.keys()
    assert found["tracked.accuracy"]["change"] > -0.1
    for name in ("film_strips.png", "curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600
    for name in ("before", "after"):
        with av.open(str(tmp_path / "clips" / f"00_{name}.mp4")) as file:
            frames = [one.to_ndarray(format="rgb24") for one in file.decode(video=0)]
        assert len(frames) == 5 * demo_world.LOOPS and frames[0].shape == (SIZE * demo_world.SCALE,) * 2 + (3,)
    assert (tmp_path / "aligned" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert "tracked.accuracy (not trained on)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_marks_of_a_film_strip_are_those_of_its_clip():
    training = start(recipe.load(FOLDER / "demo_world.toml", places()))
    training.policy.prepare(training.held_out)
    samples = held_out_samples(training.policy, training.held_out[:4], 1, 0)
    whole = training.rewards["tracked"](samples)
    assert not isinstance(whole, Tensor)
    for row, share in enumerate(whole["accuracy"].tolist()):
        lines = demo_world.obeyed(training, samples.take(torch.tensor([row])))
        assert [text for text, _ in lines] == samples.prompts[row].text.split()
        assert sum(bool(right) for _, right in lines) / len(lines) == share


def test_the_assets_are_found_and_small():
    folder = assets.folder("world_demo")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2e6
