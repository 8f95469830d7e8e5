"""Preservation of the source outside a mask: formulas by hand, and what a mask file may be."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from films import film, greys
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

from mmgrpo.components import build
from mmgrpo.types import Prompt, Samples
from rewards.masks import edited_region, read_mask
from rewards.pictures import PictureReward
from rewards.preservation import Frame, Lpips, lpips, masked_psnr, masked_ssim, psnr, ssim, ssim_map, structure_distance
from tests.clips import clip_samples, clips, seeded, tiny_lpips

SIZE = (36, 44)  # H, W of the clips


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_lpips(tmp_path_factory.mktemp("lpips") / "lpips.safetensors")


BEST = {"psnr": 60.0, "ssim": 1.0, "lpips": 0.0}  # what a copy gets


@pytest.fixture(params=BEST)
def name(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def reward(name: str, checkpoint: str) -> PictureReward:
    return {"psnr": psnr, "ssim": ssim, "lpips": lpips(checkpoint=checkpoint)}[name]


def region() -> Tensor:
    """The edited region of these tests: a block in a corner; (H, W) bool."""
    edited = torch.zeros(SIZE, dtype=torch.bool)
    edited[:20, :16] = True
    return edited


def white(edited: Tensor, path: Path) -> Path:
    """A mask as a file, white where edited."""
    Image.fromarray(edited.numpy().astype("uint8") * 255).save(path)
    return path


def masked(video: Tensor, source: Tensor, *files: Sequence[Path]) -> Samples:
    """Samples whose prompts have these masks, or none."""
    prompts = tuple(
        Prompt(row, "edit it", media={"mask": tuple(paths)} if paths else {}) for row, paths in enumerate(files)
    )
    return clip_samples(video, source, prompts)


def frame(video: Tensor, source: Tensor, kept: Tensor | None = None) -> Frame:
    everything = torch.ones(len(video), *video.shape[-2:], dtype=torch.bool)
    return Frame(video, source, everything if kept is None else kept)


# ---- formulas


def test_psnr_is_of_the_pixels_kept():
    source, video = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    video[0, :, 0, 0], video[0, 0, 1, 1] = 1.0, 0.3  # kept: one value of nine is 0.3 off
    kept = torch.tensor([[[False, True], [True, True]]]).expand(2, -1, -1)
    found = masked_psnr(frame(video, source, kept), most=60.0)
    torch.testing.assert_close(found, torch.tensor([10 * math.log10(9 / 0.09), 60.0]))


def ssim_by_hand(one: Tensor, two: Tensor) -> float:
    """One window of 11 x 11 px from the definition, weights from their formula; (11, 11) float64 both."""
    at = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    mean1, mean2 = (weights * one).sum(), (weights * two).sum()
    spread1, spread2 = (weights * (one - mean1) ** 2).sum(), (weights * (two - mean2) ** 2).sum()
    joint = (weights * (one - mean1) * (two - mean2)).sum()
    top = (2 * mean1 * mean2 + 0.0001) * (2 * joint + 0.0009)
    return float(top / ((mean1**2 + mean2**2 + 0.0001) * (spread1 + spread2 + 0.0009)))


def test_ssim_is_that_of_the_definition_in_every_window():
    one, two = torch.rand(2, 1, 2, 13, 12, generator=seeded(0), dtype=torch.float64)
    expected = torch.tensor(
        [
            [
                sum(
                    ssim_by_hand(one[0, c, y : y + 11, x : x + 11], two[0, c, y : y + 11, x : x + 11]) for c in range(2)
                )
                / 2
                for x in range(2)
            ]
            for y in range(3)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(ssim_map(one, two)[0], expected, rtol=1e-9, atol=1e-12)


def test_ssim_of_two_greys_is_that_of_their_means():
    one, two = torch.full((1, 3, 12, 12), 0.25), torch.full((1, 3, 12, 12), 0.75)
    expected = (2 * 0.25 * 0.75 + 0.0001) / (0.25**2 + 0.75**2 + 0.0001)
    assert float(masked_ssim(frame(one, two))) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"frames of \(10, 12\) px; SSIM expects at least 11 x 11"):
        ssim_map(one[..., :10, :], two[..., :10, :])


def lpips_by_hand(weights: dict[str, Tensor], one: Tensor, two: Tensor) -> float:
    """From AlexNet's layers and LPIPS' equation 1, in float64; (3, H, W) in [0, 1] both."""
    layers = {"0": (4, 2), "3": (1, 2), "6": (1, 1), "8": (1, 1), "10": (1, 1)}  # stride, padding
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    states = [((2 * image.double() - 1) - shift[:, None, None]) / scale[:, None, None] for image in (one, two)]
    distance = 0.0
    for at, (name, (stride, padding)) in enumerate(layers.items()):
        if at in (1, 2):
            states = [max_pool2d(state[None], 3, 2)[0] for state in states]
        weight, bias = weights[f"features.{name}.weight"].double(), weights[f"features.{name}.bias"].double()
        states = [conv2d(state[None], weight, bias, stride, padding)[0].relu() for state in states]
        units = [state / (state.norm(dim=0) + 1e-10) for state in states]
        row = weights[f"lin{at}.model.1.weight"][0].double()
        distance += float((row * (units[0] - units[1]) ** 2).sum(0).mean())
    return distance


def test_lpips_is_the_weighted_distance_of_unit_activations(checkpoint: str):
    weights, (one, two) = load_file(checkpoint), torch.rand(2, 3, *SIZE, generator=seeded(1))
    with torch.no_grad():
        found = Lpips(weights, checkpoint)(one[None], two[None])
    assert float(found) == pytest.approx(lpips_by_hand(weights, one, two), rel=1e-4)


def test_weights_that_are_no_lpips_are_refused(checkpoint: str, tmp_path: Path):
    weights = load_file(checkpoint)
    save_file({name: value for name, value in weights.items() if name != "lin4.model.1.weight"}, tmp_path / "few")
    with pytest.raises(ValueError, match="few' is no LPIPS: 1 weights too many or missing, such as 'lin4.model.1"):
        lpips(checkpoint=str(tmp_path / "few"))


def test_structure_is_what_patches_have_in_common_not_what_they_are():
    """Turning all patches together keeps their cosines; moving one of three by a right angle changes four of nine."""
    patches = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])[None]
    turned = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 1.0]])[None]
    moved = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None]
    assert float(structure_distance(patches, turned)) == pytest.approx(0)
    assert float(structure_distance(patches, moved)) == pytest.approx(4 / 9)


# ---- the region


def test_what_happens_inside_the_mask_changes_nothing_and_outside_something(reward: PictureReward, tmp_path: Path):
    mask, source = white(region(), tmp_path / "mask.png"), clips(seed=7, count=1)
    video = 0.9 * source + 0.1 * clips(count=1)
    inside, outside = video.clone(), video.clone()
    inside[:, :, :, :20, :16] = torch.rand(1, 5, 3, 20, 16, generator=seeded(9))
    outside[:, :, :, 20:] = torch.rand(1, 5, 3, 16, 44, generator=seeded(9))
    scores = [reward(masked(clip, source, [mask])) for clip in (video, inside, outside)]
    torch.testing.assert_close(scores[1], scores[0])
    assert float(scores[2]) < float(scores[0]) - 1e-3


def test_an_edit_within_the_mask_scores_as_a_copy(name: str, reward: PictureReward, tmp_path: Path):
    mask, source = white(region(), tmp_path / "mask.png"), clips(seed=7, count=1)
    video = torch.where(region(), clips(count=1), source)
    for clip in (source, video):
        assert float(reward(masked(clip, source, [mask]))) == pytest.approx(BEST[name], abs=1e-6)


def test_without_a_mask_beside_the_prompt_or_outside_it_there_is_no_opinion(reward: PictureReward, tmp_path: Path):
    everything = white(torch.ones(SIZE, dtype=torch.bool), tmp_path / "all.png")
    mask = white(region(), tmp_path / "mask.png")
    scores = reward(masked(clips(), clips(seed=7), [], [everything], [mask]))
    assert scores.isnan().tolist() == [True, True, False]


def test_fully_edited_frames_are_passed_over(reward: PictureReward, tmp_path: Path):
    parts = [white(torch.full(SIZE, row < 3), tmp_path / f"{row}.png") for row in range(5)]
    source, video = clips(seed=7, count=1), clips(count=1)
    found = reward(masked(video, source, parts))
    last = partial(reward, mask="")(clip_samples(video[:, 3:], source[:, 3:]))
    torch.testing.assert_close(found, last)


def test_each_sample_has_the_mask_of_its_own_prompt(reward: PictureReward, tmp_path: Path):
    one, other = white(region(), tmp_path / "one.png"), white(~region(), tmp_path / "other.png")
    video, source = clips().mul(0.5)[:1].expand(3, -1, -1, -1, -1), clips(seed=7)[:1].expand(3, -1, -1, -1, -1)
    scores = reward(masked(video, source, [one], [other], [one]))
    assert scores[0] == scores[2] != scores[1]


# ---- files


def prompt(*paths: Path) -> Prompt:
    return Prompt(3, "edit it", media={"mask": paths})


def test_a_mask_is_white_from_mid_grey_on_and_stretched_over_the_frame(tmp_path: Path):
    Image.fromarray(numpy.array([[127, 128], [255, 0]], dtype="uint8")).save(tmp_path / "mask.png")
    found = edited_region(prompt(tmp_path / "mask.png"), "mask", (2, 2, 4))
    assert found is not None and found.shape == (2, 2, 4)
    assert found[0].tolist() == found[1].tolist() == [[False, False, True, True], [True, True, False, False]]


def test_a_mask_may_be_an_image_a_frame_or_a_video(tmp_path: Path):
    levels = (0, 255, 0, 255)
    video = film(tmp_path / "mask.avi", greys(levels), codec="MJPG")
    images = [tmp_path / f"{at}.png" for at in range(4)]
    for path, grey in zip(images, greys(levels), strict=True):
        Image.fromarray(grey).save(path)
    for paths in ([video], images):
        found = edited_region(prompt(*paths), "mask", (4, 8, 8))
        assert found is not None and found.flatten(1).float().mean(1).tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="prompt 3 has a mask of 4 frames; expected 1 or 5"):
        edited_region(prompt(video), "mask", (5, 8, 8))
    assert edited_region(prompt(), "mask", (5, 8, 8)) is None


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    for name, kind in (("mask.png", "image"), ("mask.mp4", "video")):
        (tmp_path / name).write_bytes(b"no mask")
        with pytest.raises(ValueError, match=rf"the mask .*{name} is no readable {kind}: "):
            read_mask(tmp_path / name)


def test_the_names_of_a_recipe_are_those_of_the_functions(tmp_path: Path):
    path = white(region(), tmp_path / "region.png")
    prompts = tuple(Prompt(row, "edit it", media={"where": (path,)}) for row in range(3))
    samples = clip_samples(clips(), clips(seed=7), prompts)
    found = build({"build": "rewards.preservation:psnr", "mask": "where", "most": 40.0}, "rewards.it")(samples)
    torch.testing.assert_close(found, psnr(samples, mask="where"))
    with pytest.raises(ValueError, match="most is inf dB"):
        psnr(samples, most=float("inf"))
