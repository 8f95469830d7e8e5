"""Language models that watch videos: frames of files, through every family's own processor, as a part of the prompt."""

from pathlib import Path

import pytest
import torch
from films import film, noise
from test_vlm import by_the_library, log_probs
from tiny_vlms import NAMED, TINY_VLMS
from tiny_vlms.policy import batch_of, picture, policy_of

from mmgrpo.types import Prompt
from pipelines.conversation import Reading
from pipelines.sampling import Sampling
from pipelines.vlm import LanguagePolicy

watching = pytest.mark.parametrize("name", [row.name for row in TINY_VLMS if row.videos])
pytestmark = pytest.mark.filterwarnings("ignore:.*is falling back to its reference PyTorch")
FOUR = Reading(video_frames=4)
EITHER = "SmolVLMForConditionalGeneration"  # whose processor gives pictures and frames one name, so the latter overwrite the former


def mixed(folder: Path) -> list[Prompt]:
    """Prompts with a video, with another of other size and length, with a picture, with none of them."""
    one, other = film(folder / "one.mp4", noise(8, 0)), film(folder / "other.mp4", noise(13, 1, 32, 64))
    media: list[dict[str, tuple[Path, ...]]] = [
        {"video": (one,)},
        {"video": (other,)},
        {"image": (picture(folder / "one.png", 16, 16, 0),)},
        {},
    ]
    return [Prompt(number, f"What is in {number + 3}?", found) for number, found in enumerate(media)]


def ready(name: str, prompts: list[Prompt], **further: object) -> LanguagePolicy:
    policy = policy_of(name, reading=FOUR, **further)
    policy.prepare(prompts)
    return policy


@watching
def test_prompts_with_a_video_a_picture_or_none_are_answered_side_by_side(name, tmp_path):
    prompts = mixed(tmp_path)
    policy = ready(name, prompts)
    assert policy.answers.shared is NAMED[name].repeats, policy.notes
    trajectory, samples = policy.rollout(batch_of(prompts))
    assert len(samples.text) == 12 and (samples.length > 0).all()
    failed = [finding for finding in policy.self_test(prompts) if not finding.ok]
    assert failed == []
    ours, mask = log_probs(policy, trajectory), trajectory.mask
    torch.testing.assert_close(ours[mask], trajectory.record["log_prob"][mask], rtol=1e-4, atol=1e-4)


@watching
def test_log_probs_of_answers_to_a_video_equal_those_of_the_model_on_whole_sequences(name, tmp_path):
    one, other, pictured, _ = mixed(tmp_path)
    two = Prompt(4, "Which?", {"video": (*other.media["video"], *one.media["video"])})
    both = Prompt(5, "Is it there?", {**one.media, **pictured.media})
    prompts = [one, other, two] if name == EITHER else [one, other, two, both]
    policy = ready(name, prompts, sampling=Sampling(8, temperature=0.7))
    trajectory, _ = policy.rollout(batch_of(prompts, 2))
    ours = log_probs(policy, trajectory)
    for row, prompt in enumerate(trajectory.batch.prompts):
        length = int(trajectory.record["length"][row])
        expected = by_the_library(policy, prompt, trajectory.record["token"][row, :length])
        torch.testing.assert_close(ours[row, :length], expected.detach(), rtol=1e-5, atol=2e-5)


@watching
def test_answers_to_a_video_depend_on_each_of_the_chosen_frames_and_on_no_other(name, tmp_path):
    frames, (other,) = noise(10, 0), noise(1, 7)
    versions = [frames] + [[*frames[:at], other, *frames[at + 1 :]] for at in (0, 3, 6, 9, 4)]
    files = [film(tmp_path / f"{number}.avi", version, codec="MJPG") for number, version in enumerate(versions)]
    prompts = [Prompt(number, "What?", {"video": (file,)}) for number, file in enumerate(files)]
    policy = ready(name, prompts)
    token = policy.rollout(batch_of(prompts[:1], 1))[0].record["token"][0]
    whole, *seen, unseen = (by_the_library(policy, prompt, token).detach() for prompt in prompts)
    assert [number for number, log_prob in enumerate(seen) if (log_prob - whole).abs().max() < 1e-3] == []
    assert torch.equal(unseen, whole)


def test_a_rate_of_frames_reads_more_of_a_longer_video(tmp_path):
    one, other, *_ = mixed(tmp_path)  # 8 and 13 frames, 8 a second
    policy = policy_of("Qwen2_5_VLForConditionalGeneration", reading=Reading(video_rate=4.0))
    policy.prepare([one, other])
    grids = [policy.answers.reader.read(prompt).inputs["video_grid_thw"][0, 0] for prompt in (one, other)]
    assert grids == [2, 3]  # 4 and round(6.5) = 6 frames, two of which are one step of the grid


@pytest.mark.parametrize("reading", [Reading(), Reading(video_frames=4, video_rate=1.0)], ids=["neither", "both"])
def test_videos_need_one_of_the_two_ways_to_choose_frames(reading, tmp_path):
    policy = policy_of("Qwen2_5_VLForConditionalGeneration", reading=reading)
    with pytest.raises(ValueError, match="policy.video_frames and policy.video_rate are both set, or neither"):
        policy.prepare(mixed(tmp_path))
