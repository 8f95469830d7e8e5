"""Flow, warping, motion and its guard against numbers worked out by hand; RAFT with random weights for the plumbing."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models.optical_flow import raft_small

from mmgrpo.components import build
from mmgrpo.types import Samples
from rewards.motion import (
    blend,
    dynamic_degree,
    fastest,
    moving,
    raft,
    smoothness,
    targets,
    visible,
    warp,
    warping,
    warping_errors,
)
from rewards.pictures import PictureReward
from rewards.video import adjacent_consistency
from tests.clips import clip_samples, clips, seeded, tiny_raft


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_raft(tmp_path_factory.mktemp("raft") / "raft.safetensors")


def uniform(x: float, y: float, like: Tensor) -> Tensor:
    """The same flow everywhere; (b, 2, H, W) px for frames (b, 3, H, W)."""
    return torch.tensor([float(x), float(y)]).view(1, 2, 1, 1).expand(len(like), 2, *like.shape[-2:])


def panning(seed: int = 0, frames: int = 5, height: int = 16, width: int = 24) -> Tensor:
    """A random picture that moves to the right by 2 px a frame; (F, 3, H, W)."""
    wide = torch.rand(3, height, width + 2 * frames, generator=seeded(seed))
    starts = [2 * (frames - 1 - frame) for frame in range(frames)]
    return torch.stack([wide[:, :, start : start + width] for start in starts])


def true_flow(first: Tensor, second: Tensor) -> Tensor:
    """That of panning clips, forward or back, and of frozen ones."""
    forward = (first[..., :-2] == second[..., 2:]).flatten(1).all(1)
    still = (first == second).flatten(1).all(1)
    speed = torch.where(still, 0.0, torch.where(forward, 2.0, -2.0))
    return uniform(1, 0, first) * speed[:, None, None, None]


# ---- warping


def test_a_pixel_is_read_where_its_flow_points_bilinearly_and_0_outside():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    assert warp(image, uniform(1, 0, image))[0, 0].tolist() == [[1, 2, 3, 0], [5, 6, 7, 0], [9, 10, 11, 0]]
    assert warp(image, uniform(0, -1, image))[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [4, 5, 6, 7]]
    torch.testing.assert_close(warp(image, uniform(0.25, 0.5, image))[0, 0, 1, 1], torch.tensor(5 + 0.25 + 2.0))
    assert targets(uniform(1, 2, image))[0, 1, 3].tolist() == [4, 3]  # x, y


def test_the_warping_error_of_the_worked_example():
    frame = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    after = torch.tensor([[[[0.1, 1.0], [0.8, 1.0]]]])
    seen = torch.tensor([[[True, True], [True, False]]])
    error = warping_errors(frame, warp(after, uniform(0, 0, frame)), seen)
    assert float(error) == pytest.approx(0.016667, abs=1e-6)
    assert math.exp(-float(error) / 0.01) == pytest.approx(0.188876, abs=1e-6)


def test_the_reward_of_the_worked_example():
    """The last pixel is hidden by a flow that the way back contradicts: |f + g|^2 = 1 >= 0.01 + 0.5."""
    frame = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    after = torch.tensor([[0.1, 1.0], [0.8, 1.0]])
    grey = torch.stack([frame, after])[None, :, None].expand(-1, -1, 3, -1, -1) / math.sqrt(3)  # three equal channels

    def flow(first: Tensor, second: Tensor) -> Tensor:
        found = torch.zeros(len(first), 2, 2, 2)
        found[:, 0, 1, 1] = float(first[0, 0, 0, 0] == 0)  # forward alone
        return found

    assert float(warping(flow=flow)(clip_samples(grey))) == pytest.approx(0.188876, abs=1e-5)


def test_a_pixel_is_visible_while_the_two_flows_agree():
    forward, like = torch.zeros(1, 2, 1, 6), torch.zeros(1, 3, 1, 6)
    backward = torch.zeros_like(forward)
    backward[0, 0, 0] = torch.tensor([0.0, 0.7, 0.72, -0.7, 3.0, 0.71])
    # g^2 >= 0.01 g^2 + 0.5 from |g| = 0.7106... on
    assert visible(forward, backward)[0, 0].tolist() == [True, True, False, True, False, True]
    agreed = visible(uniform(2, 0, like), uniform(-2, 0, like))[0, 0]
    assert agreed.tolist() == [True] * 4 + [False] * 2  # the last two leave the frame


def test_the_way_back_is_read_where_the_way_forward_leads():
    """The first pixel goes to the third and comes back; the third stays, but what is there came from elsewhere."""
    forward, backward = torch.zeros(2, 1, 2, 1, 4)
    forward[0, 0, 0, 0], backward[0, 0, 0, 2] = 2.0, -2.0
    assert visible(forward, backward)[0, 0].tolist() == [True, True, False, True]


def test_a_leaving_pixel_is_hidden_however_small_the_step():
    like = torch.zeros(1, 3, 1, 3)
    assert visible(uniform(0.5, 0, like), uniform(-0.5, 0, like))[0, 0].tolist() == [True, True, False]


def test_the_true_flow_of_a_moving_picture_has_no_error_and_none_has_one():
    samples = clip_samples(torch.stack([panning(), panning(seed=1)]))
    torch.testing.assert_close(warping(flow=true_flow)(samples), torch.ones(2))
    assert (warping(flow=lambda first, second: uniform(0, 0, first))(samples) < 0.01).all()


def test_pairs_without_a_visible_pixel_are_passed_over_and_all_of_them_are_nan():
    """Between the second and third frame everything leaves; the other pairs stand still and differ by 0.1 in one channel."""
    video = torch.zeros(1, 4, 3, 4, 4)
    video[0, 1:, 0] = 0.1

    def flow(first: Tensor, second: Tensor) -> Tensor:
        same = (first == second).flatten(1).all(1).float()[:, None, None, None]
        return uniform(100, 0, first) * same

    torch.testing.assert_close(warping(flow=flow)(clip_samples(video)), torch.tensor([math.exp(-0.01 / 0.01)]))
    gone = warping(flow=lambda first, second: uniform(100, 0, first))(clip_samples(clips()))
    assert gone.isnan().all()


# ---- how much moves


def test_the_fastest_twentieth_of_the_pixels_counts():
    flow = torch.zeros(1, 2, 4, 10)  # 40 pixels: two of them
    flow[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    flow[0, 0, 2, 3] = -1.0
    assert float(fastest(flow)) == 3.0
    assert float(fastest(flow[:, :, :2, :2])) == 5.0  # at least one pixel


def test_the_dynamic_degree_is_the_speed_over_the_full_one_at_most_1():
    samples = clip_samples(torch.zeros(1, 3, 3, 20, 30))
    speeds = {0.0: 0.0, 0.5: 0.5, 1.0: 1.0, 7.0: 1.0}
    for speed, degree in speeds.items():
        flow = partial(lambda speed, first, second: uniform(0, -speed, first), speed)
        assert float(dynamic_degree(flow=flow, full=1 / 20)(samples)) == pytest.approx(degree)


def test_speeds_are_averaged_over_the_pairs():
    video = torch.linspace(0, 1, 3)[None, :, None, None, None].expand(1, 3, 3, 8, 8).clone()
    video[0, 2] = 0.5  # the second pair stands still
    flow = lambda first, second: uniform(1, 0, first) * (first != second)[:, :1]  # noqa: E731
    assert float(dynamic_degree(flow=flow, full=1 / 8)(clip_samples(video))) == pytest.approx(0.5)


# ---- RAFT


@torch.no_grad()
def test_at_a_size_raft_takes_the_flow_is_torchvisions(checkpoint: str):
    network = raft_small(weights=None)
    network.load_state_dict(load_file(checkpoint))
    first, second = torch.rand(2, 2, 3, 128, 136, generator=seeded(0))
    expected = network.eval()(first * 2 - 1, second * 2 - 1, num_flow_updates=2)[-1]
    found = raft(checkpoint=checkpoint, size="small", updates=2)(first, second)
    assert found.shape == (2, 2, 128, 136) and float(found.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_at_another_size_the_flow_is_in_pixels_of_the_frames_as_they_came(checkpoint: str):
    """Frames of 64 x 32 px are looked at as 128 x 128 px, so a flow of (4, 2) px there is (1, 1) px here."""
    flow = raft(checkpoint=checkpoint, size="small", updates=1)
    first, second = torch.rand(2, 1, 3, 64, 32, generator=seeded(0))
    large = [torch.nn.functional.interpolate(frame, (128, 128), mode="bilinear") for frame in (first, second)]
    inner = torch.nn.functional.interpolate(flow(*large), (64, 32), mode="bilinear")
    torch.testing.assert_close(flow(first, second), inner * torch.tensor([1 / 4, 1 / 2]).view(1, 2, 1, 1))


def test_rewards_of_a_recipe_run_through_raft(checkpoint: str):
    flow = {"build": "rewards.motion:raft", "checkpoint": checkpoint, "size": "small", "updates": 1}
    degree = {"build": "rewards.motion:dynamic_degree", "flow": flow, "batch": 2}
    quality = {"build": "rewards.motion:warping", "flow": flow, "tau": 1.0}
    table = {"build": "rewards.motion:moving", "quality": quality, "degree": degree}
    samples = clip_samples(clips(count=2, frames=3))
    scores = build(table, "rewards.it")(samples)
    assert scores.shape == (2,) and ((scores > 0) & (scores < 1)).all()
    expected = build(quality, "q")(samples) * build(degree, "d")(samples)
    torch.testing.assert_close(scores, expected)


def test_weights_of_another_network_are_refused(checkpoint: str):
    with pytest.raises(ValueError, match="is no raft_large: .* weights too many or missing, such as 'context_encoder"):
        raft(checkpoint=checkpoint, size="large")
    with pytest.raises(ValueError, match="size is 'tiny'; expected one of small, large"):
        raft(checkpoint=checkpoint, size="tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="updates is 0"):
        raft(checkpoint=checkpoint, size="small", updates=0)


# ---- smoothness


def test_the_smoothness_of_the_worked_example():
    """The middle frame is 2.55 of 255 off the mean of its neighbours."""
    video = torch.tensor([0.2, 0.31, 0.4])[None, :, None, None, None].expand(1, 3, 3, 4, 4)
    assert float(smoothness(clip_samples(video))) == pytest.approx(0.99, abs=1e-6)


def test_each_second_frame_is_rebuilt_from_both_neighbours_by_what_is_passed():
    video = torch.tensor([0.0, 0.5, 0.2, 0.2, 0.8, 0.9])[None, :, None, None, None].expand(1, 6, 3, 2, 2)
    # mean of 0 and 0.2 against 0.5, of 0.2 and 0.8 against 0.2; the last frame has none after it
    assert float(smoothness(clip_samples(video))) == pytest.approx(1 - (0.4 + 0.3) / 2)
    earlier = partial(smoothness, between=lambda before, after: before)
    assert float(earlier(clip_samples(video))) == pytest.approx(1 - (0.5 + 0.0) / 2)
    torch.testing.assert_close(blend(torch.zeros(1), torch.ones(1)), torch.tensor([0.5]))


def test_too_short_clips_are_refused():
    for reward, least in ((smoothness, 3), (warping(flow=true_flow), 2), (dynamic_degree(flow=true_flow), 2)):
        with pytest.raises(ValueError, match=rf"the clips have {least - 1} frame\(s\); expected at least {least}"):
            reward(clip_samples(clips(frames=least - 1)))


# ---- against frozen videos


def pixel_consistency(samples: Samples) -> Tensor:
    """Of the frames' own pixels as features."""
    assert samples.video is not None
    return adjacent_consistency(samples.video.flatten(2))


def test_a_frozen_clip_wins_every_quality_and_is_last_once_it_is_multiplied_by_the_motion():
    frozen = panning()[:1].expand(5, -1, -1, -1)
    samples = clip_samples(torch.stack([frozen, panning(seed=1), panning(seed=2) / 2]))
    degree = dynamic_degree(flow=true_flow, full=0.25)  # of 16 px: 4 px a frame are full motion
    qualities: dict[str, PictureReward] = {
        "consistency": pixel_consistency,
        "smoothness": smoothness,
        "warping": warping(flow=true_flow, tau=1.0),
    }
    for name, quality in qualities.items():
        alone, guarded = quality(samples), moving(quality=quality, degree=degree)(samples)
        assert float(alone[0]) == pytest.approx(1.0) and alone[0] >= alone.max() - 1e-6, name
        assert isinstance(guarded, Tensor) and guarded[0] == 0 and (guarded[1:] > 0.1).all(), name
        torch.testing.assert_close(guarded, alone * torch.tensor([0.0, 0.5, 0.5]))


def test_the_guard_multiplies_every_component_and_never_pays_for_standing_still():
    values = torch.tensor([-0.5, 0.8, torch.nan, 0.7])
    degree = lambda samples: torch.tensor([0.5, 0.5, 1.0, torch.nan])  # noqa: E731
    parts = moving(quality=lambda samples: {"a": values, "b": 2 * values}, degree=degree)(clip_samples(clips(count=4)))
    assert isinstance(parts, dict)
    expected = torch.tensor([0.0, 0.4, torch.nan, torch.nan])
    torch.testing.assert_close(parts["a"], expected, equal_nan=True)
    torch.testing.assert_close(parts["b"], 2 * expected, equal_nan=True)


def test_a_degree_of_several_components_and_impossible_options_are_refused():
    samples = clip_samples(clips(count=1))
    with pytest.raises(ValueError, match=r"degree has the components \['degree/a', 'degree/b'\]; expected one"):
        moving(quality=smoothness, degree=lambda samples: {"a": torch.ones(1), "b": torch.ones(1)})(samples)
    with pytest.raises(ValueError, match="tau is 0.0; expected more than 0"):
        warping(flow=true_flow, tau=0.0)
    with pytest.raises(ValueError, match="full is inf; expected more than 0"):
        dynamic_degree(flow=true_flow, full=float("inf"))


def test_an_interpolation_network_is_named_by_a_table(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def network(*, late: float):\n    return lambda a, b: (1 - late) * a + late * b\n"
    )
    between = {"build": f"{tmp_path / 'mine.py'}:network", "late": 0.5}
    samples = clip_samples(clips())
    found = build({"build": "rewards.motion:smoothness", "between": between}, "rewards.it")(samples)
    torch.testing.assert_close(found, smoothness(samples))
