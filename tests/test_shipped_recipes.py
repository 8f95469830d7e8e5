"""Every shipped recipe trains: a tiny random model of its kind goes through the real loading, check, loop and saving.

Only sizes and paths are overridden; sampler, plan, adapters, advantage, objective, reference and optimizer are the recipe's.
"""

import json
import zlib
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from test_rewards_image import open_clip_folder  # noqa: F401 - a fixture
from test_rewards_judge import Server, reply, server  # noqa: F401 - a fixture
from tiny_pipelines import ADDITIONAL, PROMPTS, REQUIRED, TinyPipeline
from tiny_pipelines.image_flow import sd3_parts
from tiny_pipelines.parts import clip_text_projected, clip_tokenizer, clip_vision, fresh, picture, t5_tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgrpo import checkpoint, journal, recipe
from mmgrpo.check import updates_survive
from mmgrpo.recipe import Recipe
from mmgrpo.run import Run, start
from mmgrpo.trainer import begin
from pipelines.diffusion import DiffusionPolicy

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # FLUX's norms under autocast

FOLDER = Path(str(files("pipelines") / "recipes"))
NAMED = {row.name: row for row in (*REQUIRED, *ADDITIONAL)}
SMALL = ["policy.call.height=16", "policy.call.width=16", "policy.rollout_rows=4", "policy.replay_rows=4"]
SHORT = ["train.iterations=1", "train.prompts=2", "train.group_size=2"]


def with_t5() -> StableDiffusion3Pipeline:
    """With its third text encoder, as a model without one cannot be loaded by its folder alone."""
    t5 = T5Config(vocab_size=128, d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    further = {"text_encoder_3": fresh(T5EncoderModel, t5), "tokenizer_3": t5_tokenizer()}
    return StableDiffusion3Pipeline(**{**sd3_parts(), **further})


NAMED["StableDiffusion3"] = replace(NAMED["StableDiffusion3"], build=with_t5)


@dataclass(frozen=True)
class Case:
    """What makes a recipe small: the tiny pipeline in place of its model, and sizes beside those that all share."""

    name: str  # of the recipe
    tiny: str  # row of tests/tiny_pipelines
    sizes: tuple[str, ...] = ()  # overrides


CLIP = ("policy.call.num_frames=5", "policy.call.max_sequence_length=32")
HUNYUAN = (
    *CLIP,
    'policy.call.prompt_template={template="{}", crop_start=0}',
    "policy.call.num_inference_steps=4",
    "policy.call.sigmas=[1.0, 0.7, 0.4, 0.2]",
)
SOURCE = ("policy.video.frames=5", "policy.video.height=16", "policy.video.width=16")
FLASH = "method=mix_grpo_flash"
CASES = [
    Case("sd35_medium_pickscore", "StableDiffusion3", ("policy.call.num_inference_steps=4",)),
    Case("sd35_medium_ocr", "StableDiffusion3", ("policy.call.num_inference_steps=4",)),
    Case("sd35_medium_flow_grpo_fast", "StableDiffusion3", ("policy.call.num_inference_steps=6",)),
    Case("sd35_medium_guard", "StableDiffusion3", ("policy.call.num_inference_steps=4",)),
    Case("sd35_medium_dppo", "StableDiffusion3", ("policy.call.num_inference_steps=6",)),
    Case("sd35_medium_tempflow", "StableDiffusion3", ("policy.call.num_inference_steps=4", "train.group_size=6")),
    Case("sd35_medium_vgpo", "StableDiffusion3", ("policy.call.num_inference_steps=4",)),
    Case("sd35_medium_nft", "StableDiffusion3", ("policy.call.num_inference_steps=4",)),
    Case("sd35_medium_awm", "StableDiffusion3", ("policy.call.num_inference_steps=4",)),
    Case("sd35_medium_dgpo", "StableDiffusion3", ("policy.call.num_inference_steps=4",)),
    Case("sd35_medium_gdro", "StableDiffusion3", ("policy.call.num_inference_steps=4", "offline.samples=4")),
    Case("flux_dev_mix_grpo", "Flux", ("policy.call.num_inference_steps=5", "train.prompts=4")),
    Case("flux_dev_mix_grpo", "Flux", (FLASH, "policy.call.num_inference_steps=6", "train.prompts=4")),
    Case("flux_dev_e_grpo", "Flux", ("policy.call.num_inference_steps=6", "train.prompts=4", "train.group_size=6")),
    Case("flux_dev_dance", "Flux", ("policy.call.num_inference_steps=10", "train.prompts=4")),
    # a second update: the first one has no gradient for half of each adapter, as the other half starts at 0
    Case("wan21_1b_nft", "Wan", (*CLIP, "policy.call.num_inference_steps=4", "train.updates=2")),
    Case("flux_dev_pickscore_window", "Flux", ("policy.call.num_inference_steps=5", "train.prompts=4")),
    Case("flux_kontext_edit", "FluxKontext", ("policy.call.max_area=256", "policy.call.num_inference_steps=4")),
    Case("qwen_image_lora", "QwenImage", ("policy.call.num_inference_steps=4",)),
    Case("sdxl_ddpo_aesthetic", "StableDiffusionXLEuler", ("policy.call.num_inference_steps=4",)),
    Case("wan21_1b_t2v_videoalign", "Wan", (*CLIP, "policy.call.num_inference_steps=4")),
    Case("wan_edit_viva", "LucyEdit", (*CLIP, *SOURCE, "policy.call.num_inference_steps=6")),
    Case("hunyuan_video_dance", "HunyuanVideo", (*HUNYUAN, "policy.plan.count=2", "train.group_size=6")),
]


ELSEWHERE = {
    "demo_image",
    "demo_image_flow_grpo",
    "demo_vlm",
    "demo_world",  # in test_demo_world.py
    "demo_interleaved",  # in test_demo_interleaved.py
    "demo_video_edit",  # in test_demo_video_edit.py
    "demo_speech",  # with the pair of metrics in test_demo_speech.py
    "speech_single_metric",
    "speech_multi_metric",
    "sgmse_like_pretrain",  # these two in test_shipped_speech.py
    "flowse_dnsmos_multi",
    "qwen25_vl_3b_geometry",  # these three in test_shipped_answering.py
    "qwen3_vl_8b_lora",
    "qwen25_vl_7b_video_qa",
    "demo_block_lm",
    "block_lm_sdar_8b",  # in test_shipped_block_lm.py
    "hunyuan_video_euphonium_reward",  # these three in test_shipped_euphonium.py
    "hunyuan_video_euphonium",
    "hunyuan_video_euphonium_student",
    "emu3_interleaved_warmup",  # these two in test_shipped_interleaved.py
    "emu3_interleaved",
}


def test_every_shipped_recipe_has_a_case_here_or_a_test_of_its_own():
    assert {path.stem for path in FOLDER.glob("*.toml")} == {case.name for case in CASES} | ELSEWHERE


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP model with its tokenizer and image processor, as transformers saves them."""
    folder = tmp_path_factory.mktemp("clip")
    text, vision = clip_text_projected().config.to_dict(), clip_vision().config.to_dict()
    clip = fresh(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    torch.nn.init.constant_(clip.logit_scale, 4.6)  # as trained models have it
    clip.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def aesthetic_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head on 32 features under the published names."""
    widths, generator, weights = (32, 1024, 128, 64, 16, 1), torch.Generator().manual_seed(1), {}
    for index, wide_in, wide_out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        weights[f"layers.{index}.weight"] = torch.randn(wide_out, wide_in, generator=generator) / wide_in**0.5
        weights[f"layers.{index}.bias"] = torch.randn(wide_out, generator=generator)
    file = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(weights, file)
    return file


@pytest.fixture
def judge_url(server: Server) -> str:  # noqa: F811
    """Where a judge answers whose number is made of what it was sent."""
    server.handle = lambda path, headers, raw: reply(f"Score: {zlib.crc32(raw) % 11}")
    return server.url


@pytest.fixture
def places(
    clip_folder: Path,
    aesthetic_head: Path,
    open_clip_folder: Path,  # noqa: F811
    judge_url: str,
) -> dict[str, dict[str, str]]:
    """Where each reward finds its tiny model."""
    clip, head = str(clip_folder), str(aesthetic_head)
    return {
        "videoalign": {"url": judge_url},
        "visual_quality": {"url": judge_url},
        "viva": {
            "alignment.model": f"local-dir:{open_clip_folder}",
            "likeness.model": clip,
            "preference.model": clip,
            "preference.processor": clip,
            **{f"{part}.device": "cpu" for part in ("alignment", "likeness", "preference")},
        },
        "pickscore": {"model": clip, "processor": clip, "device": "cpu"},
        "aesthetic": {"clip": clip, "head": head, "device": "cpu"},
        "ocr": {},
    }


def prompts_file(folder: Path) -> Path:
    """A few prompts with every column that a recipe reads: a picture and a video to edit, captions, a text to draw."""
    lines = []
    for number, text in enumerate((*PROMPTS, "a green triangle")):
        still, *later = (picture(number + shift, 16) for shift in (0, 10, 20, 30, 40))
        still.save(folder / f"{number}.png")
        still.save(folder / f"{number}_video.png", save_all=True, append_images=later)
        files = {"image": f"{number}.png", "video": f"{number}_video.png"}
        captions = {"source_caption": "noise", "edited_caption": text}
        lines.append(json.dumps({"prompt": text, "target": text[:4], **files, **captions}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "prompts.jsonl"


def small(case: Case, model: Path, prompts: Path, places: dict[str, dict[str, str]]) -> Recipe:
    """The shipped recipe, at a size that a test can run."""
    local = {"policy.model": model, "policy.device": "cpu", "prompts.source": prompts}
    for reward in recipe.load(FOLDER / f"{case.name}.toml").rewards:
        local |= {f"rewards.{reward.name}.{option}": place for option, place in places[reward.name].items()}
    overrides = [f"{key}={json.dumps(str(value))}" for key, value in local.items()]
    return recipe.load(FOLDER / f"{case.name}.toml", [*overrides, *SMALL, *SHORT, *case.sizes])


def with_something_to_learn(made: Recipe) -> Recipe:
    """Pictures of noise hold no letters to tell them apart by, so the size of the file is scored beside them."""
    if made.rewards[0].name != "ocr":
        return made
    size = recipe.Reward("size", {"build": "rewards.image:jpeg_incompressibility", "quality": 95})
    return replace(made, rewards=(*made.rewards, size))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_shipped_recipe_passes_its_check_trains_and_saves_what_a_plain_pipeline_loads(case, places, tmp_path):
    diffusers.logging.set_verbosity_error()
    tiny, model = NAMED[case.tiny], tmp_path / "model"
    tiny.build().save_pretrained(model)
    run = start(with_something_to_learn(small(case, model, prompts_file(tmp_path), places)))
    trains_and_saves(run, tiny, model, tmp_path / "run")


def trains_and_saves(run: Run, tiny: TinyPipeline, model: Path, folder: Path) -> None:
    """The check passes, every weight moves, and the checkpoint holds them for a plain pipeline."""
    before = {name: value.detach().clone() for name, value in run.policy.trainable().items()}
    begin(run, folder)
    checked = (folder / "check.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in checked if not line.startswith("ok")] == []
    (metrics,) = journal.read(folder)
    assert metrics["reward/total/group_std"] > 0
    assert metrics["update/samples"] > 0
    still = [name for name, value in run.policy.trainable().items() if torch.equal(value, before[name])]
    assert [name for name in still if not any(part in name for part in tiny.unused)] == []
    for target in (run.policy.lora or {}).get("targets", ()):
        assert any(f".{target}.lora_" in name for name in before), target
    saved = checkpoint.latest(folder)
    assert saved is not None
    with run.averaged():
        same_weights(run.policy, plain_pipeline(run.policy, model, saved / "model"))


def test_whole_weights_in_bfloat16_are_refused_where_the_learning_rate_rounds_away(places, tmp_path):
    case = next(case for case in CASES if case.name == "flux_dev_pickscore_window")
    NAMED[case.tiny].build().save_pretrained(tmp_path / "model")
    exact = small(case, tmp_path / "model", prompts_file(tmp_path), places)
    rounded = replace(exact, policy={**exact.policy, "dtype": "bfloat16"})
    assert updates_survive(start(exact)).ok
    found = updates_survive(start(rounded))
    assert not found.ok
    assert "the learning rate 1e-05 moves" in found.detail


def plain_pipeline(policy: DiffusionPolicy, model: Path, saved: Path) -> DiffusionPipeline:
    """The start's pipeline from disk, in its own class, with what was saved."""
    plain = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    if policy.lora is not None:
        plain.load_lora_weights(saved)
        return plain
    (part,) = saved.iterdir()
    setattr(plain, part.name, type(plain.components[part.name]).from_pretrained(part, dtype=torch.float32))
    return plain


def adapter(module: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of the module's only adapter, whatever its name."""
    (name,) = module.peft_config
    return get_peft_model_state_dict(module, adapter_name=name)


def same_weights(policy: DiffusionPolicy, plain: DiffusionPipeline) -> None:
    """The plain pipeline predicts with the policy's weights, adapters with their scale."""
    (name,) = policy.engine.modules()
    trained, loaded = policy.engine.pipeline.components[name], plain.components[name]
    assert type(loaded) is type(trained)
    adapted = policy.lora is not None
    expected, found = (adapter(module) if adapted else module.state_dict() for module in (trained, loaded))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    if adapted:
        (mine,), (theirs,) = trained.peft_config.values(), loaded.peft_config.values()
        assert (mine.r, mine.lora_alpha) == (theirs.r, theirs.lora_alpha)
