"""The shipped recipes of models that answer in text train at toy size, and their rewards judge answers as they should.

Only sizes and paths are overridden; the way prompts are read, adapters, advantage, objective, reference and optimizer are the
recipe's.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_vlms
import torch
from films import film, noise
from test_shipped_recipes import FOLDER, SHORT, Case, adapter
from tiny_vlms.policy import picture
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mmgrpo import checkpoint, journal, recipe
from mmgrpo.data import load_prompts, requests
from mmgrpo.recipe import Recipe
from mmgrpo.run import Run, start
from mmgrpo.scoring import score
from mmgrpo.trainer import begin
from mmgrpo.types import Prompt, Samples

# the names that the published files use; `size` in a recipe would be ignored beside them
pytestmark = pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning")

CASES = [
    Case(
        "qwen25_vl_3b_geometry",
        "Qwen2_5_VLForConditionalGeneration",
        ("policy.processor.min_pixels=256", "policy.processor.max_pixels=1024", "train.prompts=4"),
    ),
    Case("qwen3_vl_8b_lora", "Qwen3VLForConditionalGeneration"),
    Case(
        "qwen25_vl_7b_video_qa",
        "Qwen2_5_VLForConditionalGeneration",
        ("policy.processor.min_pixels=256", "policy.processor.max_pixels=256", "policy.video_frames=4"),
    ),
]


def questions_file(folder: Path) -> Path:
    """A few questions with every column that a recipe reads: a picture or two, a video, an answer."""
    lines = []
    for number, answer in enumerate("ABCD"):
        picture(folder / f"{number}.png", 16, 16 + 8 * number, number)
        film(folder / f"{number}.mp4", noise(8, number))
        media = {"image": [f"{number}.png"] * (1 + number % 2), "video": f"{number}.mp4"}
        lines.append(json.dumps({"prompt": f"Which of {number + 2}?", "answer": answer} | media))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "questions.jsonl"


def small(case: Case, model: Path, questions: Path) -> Recipe:
    """The shipped recipe at the size of a tiny model, with a reward that tells noise apart beside its own."""
    local = [
        f"{key}={json.dumps(str(place))}" for key, place in (("policy.model", model), ("prompts.source", questions))
    ]
    sizes = ["policy.device='cpu'", "policy.max_new_tokens=8", *SHORT, "train.iterations=2", *case.sizes]
    made = recipe.load(FOLDER / f"{case.name}.toml", [*local, *sizes])
    spread = recipe.Reward("spread", {"build": "rewards.length:repetition_penalty", "size": 1, "unit": "character"})
    return replace(made, rewards=(*made.rewards, spread))


def plain_model(run: Run, model: Path, saved: Path) -> PreTrainedModel:
    """The start's model from disk with what the run saved, by its own library."""
    if run.policy.lora is None:
        return AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    plain.load_adapter(saved)
    return plain


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_shipped_recipe_passes_its_check_trains_and_saves_what_its_library_loads(case, tmp_path):
    model, folder = tiny_vlms.saved(case.tiny, tmp_path / "model"), tmp_path / "run"
    run = start(small(case, model, questions_file(tmp_path)))
    before = {name: value.detach().clone() for name, value in run.policy.trainable().items()}
    begin(run, folder)
    checked = (folder / "check.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in checked if not line.startswith("ok")] == []
    for metrics in journal.read(folder):
        assert {f"reward/{reward.name}/mean" for reward in run.recipe.rewards} <= metrics.keys()
        assert metrics["update/samples"] > 0
    assert [name for name, value in run.policy.trainable().items() if torch.equal(value, before[name])] == []
    for target in (run.policy.lora or {}).get("targets", ()):
        assert any(f".{target}.lora_" in name for name in before), target
    saved = checkpoint.latest(folder)
    assert saved is not None
    plain, adapted = plain_model(run, model, saved / "model"), run.policy.lora is not None
    expected, found = (adapter(part) if adapted else part.state_dict() for part in (run.policy.model, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def as_on_the_hub(folder: Path) -> Path:
    """The folder of a tiny Qwen2.5-VL, its processor described as by the published files, which name pixels and no size."""
    described = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    (folder / "processor_config.json").unlink()
    pixels = {"min_pixels": 3136, "max_pixels": 12845056, "processor_class": "Qwen2_5_VLProcessor"}
    published = {key: value for key, value in described.items() if key != "size"} | pixels
    (folder / "preprocessor_config.json").write_text(json.dumps(published), encoding="utf-8")
    return folder


def pixels_read(name: str, model: Path, questions: Path) -> float:
    """Pixels of a picture, or of a frame of the video, that the shipped recipe's policy reads of the first question."""
    local = [f"policy.model='{model}'", "policy.device='cpu'", f"prompts.source='{questions}'"]
    made = recipe.load(FOLDER / f"{name}.toml", local)
    policy = recipe.build(made.policy, "policy")
    read = policy.answers.reader.read(load_prompts(made.prompts.source, **made.prompts.options)[0]).inputs
    grid = read["image_grid_thw" if "image_grid_thw" in read else "video_grid_thw"][0]  # patches in time, down, across
    return float(grid[1:].prod()) * policy.model.config.vision_config.patch_size**2


def test_the_pixels_of_a_recipe_hold_over_those_that_the_published_files_name(tmp_path):
    model = as_on_the_hub(tiny_vlms.saved("Qwen2_5_VLForConditionalGeneration", tmp_path / "model"))
    questions = questions_file(tmp_path)  # of 16 x 16 pixels, the video of 32 x 32
    assert pixels_read("qwen25_vl_3b_geometry", model, questions) == pytest.approx(262144, rel=0.05)
    assert pixels_read("qwen25_vl_7b_video_qa", model, questions) == pytest.approx(100352, rel=0.05)


JUDGED = {  # recipe -> what is right, and answers with what they earn in all
    "qwen25_vl_3b_geometry": (
        r"\frac{3}{4}",
        {
            r"<think>6 of 8.</think> So it is \boxed{0.75}." + " Indeed." * 1000: 1.0,
            r"<think>6 of 8.</think> So it is \boxed{3}.": 0.1,
            r"\boxed{3/4}": 0.9,
            r"<think>6 of 8, \boxed{6}": 0.05,
        },
    ),
    "qwen3_vl_8b_lora": (
        "3/4",
        {
            "<think>6 of 8.</think>\n<answer>0.75</answer>": 2.0,
            "<think>6 of 8.</think><answer>6</answer>": 1.0,
            "<answer>3/4</answer>": 1.0,
            "3/4": 0.0,
        },
    ),
    "qwen25_vl_7b_video_qa": (
        "B",
        {
            "<think>He sits down.</think> <answer>B</answer>": 2.0,
            "<think>He sits down.</think><answer>A. He runs</answer>": 1.0,
            "It is <answer>B.</answer>": 1.0,
            "B": 0.0,
        },
    ),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_rewards_of_a_shipped_recipe_give_answers_what_they_earn(name):
    target, answers = JUDGED[name]
    made = recipe.load(FOLDER / f"{name}.toml")
    rewards = {reward.name: recipe.build(reward.component, reward.name) for reward in made.rewards}
    asked = requests([Prompt(0, "How much?", target=target)], [0], group_size=len(answers), seed=0, iteration=0)
    found = score(rewards, {reward.name: reward.weight for reward in made.rewards}, Samples(asked, text=tuple(answers)))
    assert found.total().tolist() == pytest.approx(list(answers.values()))
