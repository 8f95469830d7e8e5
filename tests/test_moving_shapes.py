"""The video editing task's rewards on clips whose scores are worked out by hand, and on true and false edits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples
from rewards.moving_shapes import (
    COLOURS,
    GREYS,
    SCENES,
    background_error,
    colour_match,
    draw,
    edit_distance,
    edit_reward,
    motion_iou,
    paint,
    palette,
    recoloured,
)

REWARDS = [edit_reward, colour_match, motion_iou, background_error, edit_distance]
RED, GREEN, YELLOW = (torch.tensor(COLOURS[name]) for name in ("red", "green", "yellow"))


def samples(video: Tensor | None, source: Tensor | None, colours: list[str]) -> Samples:
    ids = torch.arange(len(colours))
    prompts = tuple(Prompt(row, f"make it {colour}", columns={"colour": colour}) for row, colour in enumerate(colours))
    return Samples(Batch(prompts, ids, ids, 0, 0), video=video, source_video=source)


def block(colour: Tensor, left: int, ground: float = 0.2, frames: int = 2) -> Tensor:
    """One clip (1, F, 3, 8, 8) with a square of 2x2 px on a grey ground, moving right by 1 px a frame."""
    clip = torch.full((1, frames, 3, 8, 8), ground)
    for frame in range(frames):
        clip[0, frame, :, 3:5, left + frame : left + frame + 2] = colour[:, None, None]
    return clip


def scores(video: Tensor, source: Tensor, colour: str = "green") -> dict[str, float]:
    return {reward.__name__: float(reward(samples(video, source, [colour]))) for reward in REWARDS}


# ---- by hand


def test_a_true_edit_scores_one_and_the_source_itself_nothing():
    source = block(RED, 2)
    assert scores(block(GREEN, 2), source) == pytest.approx(
        {"edit_reward": 1, "colour_match": 1, "motion_iou": 1, "background_error": 0, "edit_distance": 0}, abs=1e-6
    )
    assert scores(source, source)["colour_match"] == 0
    assert scores(source, source)["motion_iou"] == 1


def test_a_shape_one_pixel_aside_shares_a_third_of_its_union():
    found = scores(block(GREEN, 3), block(RED, 2))
    assert found["motion_iou"] == pytest.approx(1 / 3)  # 2 of 6 px in both frames
    assert found["edit_reward"] == pytest.approx(1 / 3)


def test_half_of_the_shape_in_the_wrong_colour_is_half_a_match():
    clip = block(GREEN, 2)
    clip[0, :, :, 4] = block(RED, 2)[0, :, :, 4]  # the lower row of the shape
    assert scores(clip, block(RED, 2))["colour_match"] == pytest.approx(0.5)


@pytest.mark.parametrize(("share", "match"), [(0.0, 1), (0.2, 1), (0.5, 2 / 3), (0.7, 0.4), (1.0, 0)])
def test_a_hue_on_the_way_to_the_next_colour_matches_less_and_the_next_not_at_all(share, match):
    clip = block(torch.lerp(GREEN, YELLOW, share), 2)  # (1 - share) / 0.75 between 0 and 1
    assert scores(clip, block(RED, 2))["colour_match"] == pytest.approx(match)


def test_a_pale_shape_belongs_to_the_mask_in_part():
    pale = torch.tensor([0.2, 0.7, 0.2])  # chroma 0.5, half of the way from 0.2 to 0.8
    found = scores(block(pale, 2), block(RED, 2))
    assert found["colour_match"] == pytest.approx(1)
    assert found["motion_iou"] == pytest.approx(0.5)


def test_background_and_distance_are_root_mean_squares():
    clip = block(GREEN, 2, ground=0.3)  # 0.1 from the ground of the source in 60 of 64 px
    found = scores(clip, block(RED, 2))
    assert found["background_error"] == pytest.approx(0.1)
    assert found["edit_distance"] == pytest.approx((0.01 * 60 / 64) ** 0.5)
    assert found["edit_reward"] == pytest.approx(1)  # which does not see it


# ---- true clips and what else a model might show


@pytest.fixture(scope="module")
def task() -> dict[str, Tensor | list[str]]:
    """A clip of every scene: source, true edit, and edits that are wrong; (B, F, 3, H, W)."""
    drawn = draw([scene.shape for scene in SCENES], torch.Generator().manual_seed(0))
    wanted = [scene.colour for scene in SCENES]
    source = (paint(drawn.cover, drawn.ground, [scene.was for scene in SCENES]) * 255).round() / 255
    true = paint(drawn.cover, drawn.ground, wanted)
    still = drawn.ground.unsqueeze(2).expand_as(true)
    return {
        "wanted": wanted,
        "source": source,
        "true": true,
        "frozen": true[:, :1].expand_as(true),
        "frozen in the middle": true[:, 2:3].expand_as(true),
        "backwards": true.flip(1),
        "empty": still,
        "black": torch.zeros_like(true),
        "filled": palette(wanted)[:, None, :, None, None].expand_as(true),
        "noise": torch.rand(true.shape, generator=torch.Generator().manual_seed(1)),
    }


def test_true_edits_of_every_scene_score_near_one(task):
    found = edit_reward(samples(task["true"], task["source"], task["wanted"]))
    assert found.min() > 0.98
    assert background_error(samples(task["true"], task["source"], task["wanted"])).max() < 0.005
    torch.testing.assert_close(recoloured(task["source"], task["wanted"]), task["true"], rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("source", 0.0), ("empty", 0.0), ("black", 0.0), ("filled", 0.15), ("noise", 0.05), ("backwards", 0.2),
        ("frozen", 0.35), ("frozen in the middle", 0.45),
    ],
)  # fmt: skip
def test_what_is_no_edit_scores_low(task, kind, most):
    assert edit_reward(samples(task[kind], task["source"], task["wanted"])).max() <= most


def test_shapes_move_and_stay_inside(task):
    drawn = draw([scene.shape for scene in SCENES], torch.Generator().manual_seed(2))
    areas = drawn.cover.sum((2, 3))
    torch.testing.assert_close(
        areas, areas[:, :1].expand_as(areas), rtol=0.1, atol=0
    )  # nothing is cut off, 8x8 points a pixel
    assert (drawn.cover[:, 1:] - drawn.cover[:, :-1]).abs().sum((2, 3)).min() > 8  # px that change from frame to frame
    assert drawn.ground.min() >= GREYS[0] and drawn.ground.max() <= GREYS[1]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
def test_a_score_depends_on_its_own_row_alone(task, reward: Callable[[Samples], Tensor]):
    mixed = samples(task["noise"].lerp(task["true"], 0.7), task["source"], task["wanted"])
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(3))
    found = reward(mixed)
    assert len(found.unique()) > 80
    torch.testing.assert_close(reward(mixed.take(order)), found[order])


def test_a_clip_that_is_not_finite_has_no_score():
    clip = block(GREEN, 2)
    clip[0, 0, 0, 0, 0] = torch.nan
    assert edit_reward(samples(clip, block(RED, 2), ["green"])).isnan().all()


def test_samples_without_a_source_or_a_colour_are_refused_by_name():
    with pytest.raises(ValueError, match="the samples carry no source_video"):
        edit_reward(samples(block(GREEN, 2), None, ["green"]))
    with pytest.raises(ValueError, match="prompt 0 'make it brown' has colour 'brown'; expected one of"):
        edit_reward(samples(block(GREEN, 2), block(RED, 2), ["brown"]))
    with pytest.raises(ValueError, match=r"source_video has shape \(1, 3, 3, 8, 8\); expected \(1, 2, 3, 8, 8\)"):
        motion_iou(samples(block(GREEN, 2), block(RED, 2, frames=3), ["green"]))
