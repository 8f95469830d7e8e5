"""Every video reward through the same properties, on tiny random networks; then frames, and consistency in time."""

import math
import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_rewards_image import clip_folder  # noqa: F401 - a fixture
from torch import Tensor
from transformers import CLIPModel, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgrpo.components import build, complete
from mmgrpo.types import Reward, Samples
from rewards.compose import components
from rewards.image import jpeg_incompressibility, pick_score
from rewards.motion import dynamic_degree, moving, smoothness, warping
from rewards.pictures import choose, pictures
from rewards.preservation import lpips, psnr, ssim, structure
from rewards.video import (
    adjacent_consistency,
    clip_consistency,
    framewise,
    source_likeness,
    subject_consistency,
    subject_consistency_of,
)
from rewards.video_edit import viva
from tests.clips import clip_samples, clips, seeded, tiny_dino, tiny_lpips

EDITS = ["psnr", "ssim", "lpips", "structure", "source_likeness", "viva"]
OTHERS = ["framewise", "clip_consistency", "subject_consistency", "smoothness", "warping", "dynamic_degree", "moving"]
NO_BATCH = ["framewise", "smoothness", "moving", "viva"]  # of their own; what they are made of has
Build = Callable[..., Reward]


def drift(first: Tensor, second: Tensor) -> Tensor:
    """A flow that follows from every pixel of both frames; (b, 3, H, W) -> (b, 2, H, W) px."""
    return 3 * (second - first)[:, :2]


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def builders(
    clip_folder: str,  # noqa: F811
    dino_folder: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Build]:
    weights = tiny_lpips(tmp_path_factory.mktemp("lpips") / "lpips.safetensors")
    align = pick_score(model=clip_folder, processor=clip_folder)
    likeness = source_likeness(model=clip_folder)
    degree = dynamic_degree(flow=drift, full=1.0)
    return {
        "framewise": partial(framewise, reward=jpeg_incompressibility),
        "clip_consistency": partial(clip_consistency, model=clip_folder),
        "subject_consistency": partial(subject_consistency, model=dino_folder),
        "smoothness": lambda: smoothness,
        "warping": partial(warping, flow=drift, tau=1.0),
        "dynamic_degree": partial(dynamic_degree, flow=drift, full=1.0),
        "moving": partial(moving, quality=smoothness, degree=degree),
        "psnr": lambda **options: partial(psnr, mask="", **options),
        "ssim": lambda **options: partial(ssim, mask="", **options),
        "lpips": partial(lpips, checkpoint=weights, mask=""),
        "structure": partial(structure, model=dino_folder),
        "source_likeness": partial(source_likeness, model=clip_folder),
        "viva": partial(viva, alignment=align, preference=align, likeness=likeness, frames=None),
    }


@pytest.fixture(params=[*OTHERS, *EDITS])
def name(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


def given() -> Samples:
    return clip_samples(clips(), clips(seed=7))


def scored(reward: Reward, samples: Samples) -> Tensor:
    """Every component beside the other; (B, K)."""
    return torch.stack(list(components("it", reward(samples), len(samples)).values()), dim=1)


def near(values: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


# ---- every reward


def test_scores_are_one_float32_a_sample_and_permute_with_the_samples(name: str, builders: dict[str, Build]):
    reward, samples, order = builders[name](), given(), torch.tensor([2, 0, 1])
    scores = scored(reward, samples)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu" and scores.isfinite().all()
    assert all(column.unique().numel() == 3 for column in scores.T)  # a constant would pass the next line
    near(scored(reward, samples.take(order)), scores[order])


def test_each_sample_is_judged_by_all_of_its_own_frames_and_no_others(name: str, builders: dict[str, Build]):
    reward, samples = builders[name](), given()
    assert samples.video is not None
    scores = scored(reward, samples)
    for frame in range(5):
        video = samples.video.clone()
        video[1, frame] = torch.rand(3, 36, 44, generator=seeded(50 + frame))
        changed = scored(reward, clip_samples(video, samples.source_video))
        near(changed[[0, 2]], scores[[0, 2]])
        assert ((changed[1] - scores[1]).abs() > 1e-6).all(), frame


@pytest.mark.parametrize("name", EDITS)
def test_each_edit_is_compared_with_every_frame_of_its_own_source(name: str, builders: dict[str, Build]):
    reward, samples = builders[name](), given()
    assert samples.source_video is not None
    scores = scored(reward, samples)
    for frame in range(5):
        source = samples.source_video.clone()
        source[1, frame] = torch.rand(3, 36, 44, generator=seeded(60 + frame))
        changed = scored(reward, clip_samples(samples.video, source))
        near(changed[[0, 2]], scores[[0, 2]])
        assert ((changed[1] - scores[1]).abs() > 1e-6).any(), frame


def test_a_pixel_that_is_not_finite_is_nan_and_leaves_the_other_scores_alone(name: str, builders: dict[str, Build]):
    reward, samples = builders[name](), given()
    scores = scored(reward, samples)
    for field in ("video", "source_video") if name in EDITS else ("video",):
        broken = {"video": clips(), "source_video": clips(seed=7)}
        broken[field][0, 3, 1, 2, 2] = torch.nan
        broken[field][2, 0, 0, 0, 0] = -torch.inf
        found = scored(reward, clip_samples(broken["video"], broken["source_video"]))
        assert found.isnan().tolist() == [[row != 1] * found.shape[1] for row in range(3)], field
        near(found[1], scores[1])


def test_clips_in_another_range_of_another_shape_or_missing_are_refused(name: str, builders: dict[str, Build]):
    reward = builders[name]()
    with pytest.raises(ValueError, match=r"video has values from .*; expected \[0, 1\]"):
        reward(clip_samples(2 * clips() - 1, clips()))
    with pytest.raises(ValueError, match=r"video has shape \(3, 5, 1, 36, 44\)"):
        reward(clip_samples(clips()[:, :, :1], clips()[:, :, :1]))
    with pytest.raises(ValueError, match="the samples carry no video; expected"):
        reward(clip_samples(None, None, given().prompts))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_without_its_source_is_refused_in_one_line(name: str, builders: dict[str, Build]):
    with pytest.raises(ValueError, match="^the samples carry no source_video; expected .*$"):
        builders[name]()(clip_samples(clips()))
    with pytest.raises(ValueError, match=r"^source_video has shape \(3, 4, .*; expected \(3, 5, 3, 36, 44\), .*$"):
        builders[name]()(clip_samples(clips(), clips()[:, :4]))


@pytest.mark.parametrize("name", [name for name in (*OTHERS, *EDITS) if name not in NO_BATCH])
def test_how_many_frames_are_in_memory_at_a_time_changes_no_score(name: str, builders: dict[str, Build]):
    near(scored(builders[name](batch=2), given()), scored(builders[name](), given()))
    with pytest.raises(ValueError, match="batch is 0; expected at least 1"):
        builders[name](batch=0)(given())


# ---- frames


def test_frames_are_evenly_spaced_from_the_first_to_the_last_or_those_listed():
    assert choose(9, 3) == [0, 4, 8]
    assert choose(10, 4) == [0, 3, 6, 9]
    assert choose(5, 1) == [0]
    assert choose(3, 8) == choose(3, None) == [0, 1, 2]
    assert choose(5, (4, 0, -1)) == [4, 0, 4]
    with pytest.raises(ValueError, match="frames is 0; expected at least 1"):
        choose(5, 0)
    with pytest.raises(ValueError, match=r"frames is \[5\]; expected indices into clips of 5 frames"):
        choose(5, (5,))
    with pytest.raises(ValueError, match=r"frames is \[\]"):
        choose(5, ())


def brightness(samples: Samples) -> Tensor:
    """An image reward whose answer is known: the first pixel."""
    assert samples.image is not None
    return samples.image[:, 0, 0, 0]


def two(samples: Samples) -> dict[str, Tensor]:
    return {"light": brightness(samples), "dark": 1 - brightness(samples)}


LEVELS = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.6, 0.0]])  # (B, F)


def levels(values: Tensor = LEVELS) -> Samples:
    return clip_samples(values[:, :, None, None, None].expand(-1, -1, 3, 2, 2))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.3, 0.5]),
        ({"over": "min"}, [0.1, 0.0]),
        ({"over": "first"}, [0.1, 0.9]),
        ({"over": "first", "frames": (1, 0)}, [0.5, 0.6]),
        ({"frames": 2}, [0.2, 0.45]),
        ({"frames": (1,)}, [0.5, 0.6]),
    ],
)
def test_an_image_reward_is_reduced_over_the_chosen_frames(options: dict[str, object], expected: list[float]):
    reward = framewise(reward=brightness, **options)  # type: ignore[arg-type]
    near(scored(reward, levels())[:, 0], torch.tensor(expected))
    parts = framewise(reward=two, **options)(levels())  # type: ignore[arg-type]
    assert isinstance(parts, dict) and list(parts) == ["light", "dark"]
    near(parts["light"], torch.tensor(expected))


def test_a_frame_without_an_opinion_leaves_the_clip_without_one():
    def fussy(samples: Samples) -> Tensor:
        return torch.where(brightness(samples) == 0.5, torch.nan, brightness(samples))

    for over in ("mean", "min"):
        assert scored(framewise(reward=fussy, over=over), levels())[:, 0].isnan().tolist() == [True, False]
    assert scored(framewise(reward=fussy, frames=2), levels()).isfinite().all()


def test_each_frame_keeps_the_prompt_of_its_sample():
    seen = []

    def look(samples: Samples) -> Tensor:
        seen.append([prompt.text for prompt in samples.prompts])
        return brightness(samples)

    framewise(reward=look)(levels())
    assert seen == [["a red cat", "two blue dogs"]] * 3


def test_a_recipes_table_names_the_image_reward_and_the_frames():
    table = {
        "build": "rewards.video:framewise",
        "reward": {"build": "rewards.image:jpeg_incompressibility", "quality": 90},
        "over": "min",
        "frames": 2,
    }
    sizes = [jpeg_incompressibility(frame(given(), at), quality=90) for at in (0, 4)]
    near(build(table, "rewards.it")(given()), torch.stack(sizes).amin(0))
    near(build(table | {"frames": [4], "over": "mean"}, "rewards.it")(given()), sizes[1])


def test_the_recipe_of_the_readme_for_videos_is_accepted():
    readme = (Path(__file__).parent.parent / "rewards" / "README.md").read_text()
    (recipe, *_) = re.findall(r"```toml\n(.*?)```", readme.split("### Video")[1], re.DOTALL)
    tables = tomllib.loads(recipe)["rewards"]
    names = [table["name"] for table in tables]
    assert names == ["text", "subject", "flow", "background", "viva", "edit", "videoalign"]
    for table in tables:
        options = {key: value for key, value in table.items() if key not in ("name", "weight")}
        assert complete(options, table["name"]).keys() >= options.keys()


def frame(samples: Samples, at: int) -> Samples:
    assert samples.video is not None
    return Samples(samples.batch, image=samples.video[:, at])


def test_an_unknown_reduction_and_a_shapeless_reward_are_refused():
    with pytest.raises(ValueError, match="over is 'median'; expected one of mean, min, first"):
        framewise(reward=brightness, over="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reward 'frame' has shape \(1,\); expected \(2\)"):
        framewise(reward=lambda samples: brightness(samples)[:1])(levels())


# ---- consistency in time


def planar(*degrees: float) -> Tensor:
    """Unit vectors at these angles; (1, F, 2)."""
    angles = torch.tensor(degrees, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None]


def test_adjacent_consistency_is_the_mean_cosine_of_neighbours():
    steps = [math.acos(cosine) for cosine in (0.98, 0.95, 0.97)]
    features = planar(0, *torch.tensor(steps, dtype=torch.float64).cumsum(0).tolist()) * 3  # lengths do not count
    assert float(adjacent_consistency(features)) == pytest.approx(0.966667, abs=1e-6)


def test_subject_consistency_halves_the_cosines_with_the_first_frame_and_the_one_before():
    """(cos to the first, cos to the one before) = (.95, .95), (.90, .94): in three dimensions."""
    second = torch.tensor([0.95, math.sqrt(1 - 0.95**2), 0.0], dtype=torch.float64)
    y = (0.94 - 0.90 * 0.95) / float(second[1])
    third = torch.tensor([0.90, y, math.sqrt(1 - 0.90**2 - y**2)], dtype=torch.float64)
    features = torch.stack([torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), second, third])[None]
    assert float(subject_consistency_of(features)) == pytest.approx(0.935, abs=1e-6)


def test_a_clip_of_one_frame_has_no_consistency():
    for measure in (adjacent_consistency, subject_consistency_of):
        with pytest.raises(ValueError, match=r"the clips have 1 frame\(s\); expected at least 2"):
            measure(torch.ones(2, 1, 4))


@torch.no_grad()
def by_hand(video: Tensor, model: torch.nn.Module, process: Callable[..., dict[str, Tensor]]) -> Tensor:
    """The class token's last state of every frame, one at a time; (B, F, D)."""
    inputs = [process(images=[picture], return_tensors="pt") for picture in pictures(video.flatten(0, 1))]
    states = [model(pixel_values=one["pixel_values"]).last_hidden_state[0, 0] for one in inputs]
    return torch.stack(states).unflatten(0, video.shape[:2])


def test_subject_consistency_looks_at_dinos_class_token(builders: dict[str, Build], dino_folder: str):
    model, process = Dinov2Model.from_pretrained(dino_folder).eval(), BitImageProcessorPil.from_pretrained(dino_folder)
    expected = subject_consistency_of(by_hand(clips(), model, process))
    near(scored(builders["subject_consistency"](), given())[:, 0], expected)


@torch.no_grad()
def test_clip_consistency_and_likeness_look_at_the_projected_embedding(
    builders: dict[str, Build],
    clip_folder: str,  # noqa: F811
):
    clip, process = CLIPModel.from_pretrained(clip_folder).eval(), CLIPImageProcessorPil.from_pretrained(clip_folder)

    def embedded(video: Tensor) -> Tensor:
        pixels = process(images=pictures(video.flatten(0, 1)), return_tensors="pt")["pixel_values"]
        states = clip.vision_model(pixel_values=pixels).pooler_output @ clip.visual_projection.weight.T
        return torch.nn.functional.normalize(states, dim=-1).unflatten(0, video.shape[:2])

    ours, theirs = embedded(clips()), embedded(clips(seed=7))
    near(scored(builders["clip_consistency"](), given())[:, 0], (ours[:, 1:] * ours[:, :-1]).sum(-1).mean(1))
    near(scored(builders["source_likeness"](), given())[:, 0], (ours * theirs).sum(-1).mean(1))
    few = builders["source_likeness"](frames=(0, -1))
    near(scored(few, given())[:, 0], (ours * theirs).sum(-1)[:, [0, 4]].mean(1))


def test_a_bfloat16_network_gives_float32_scores_near_those_of_float32(builders: dict[str, Build]):
    for name in ("clip_consistency", "subject_consistency", "source_likeness", "structure"):
        exact, rounded = scored(builders[name](), given()), scored(builders[name](dtype="bfloat16"), given())
        assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03)
        with pytest.raises(ValueError, match="dtype is 'float8'; expected one of"):
            builders[name](dtype="float8")


def test_pickled_weights_are_not_loaded(dino_folder: str, tmp_path: Path):
    for file in Path(dino_folder).glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(Dinov2Model.from_pretrained(dino_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        subject_consistency(model=str(tmp_path))
