"""Videos that a pipeline is given: which frames, how large, and which files are refused before training."""

import re
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from films import film, greys, index_first, noise
from PIL import Image
from tiny_pipelines.policy import NAMED, batch_of, policy_of

from mmgrpo.types import Prompt
from pipelines import movies
from pipelines.arguments import load_media
from pipelines.source_videos import Cut, given, require_usable

LEVELS = range(10, 250, 10)  # of 24 frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "clip.mp4", greys(LEVELS), rate=8.0)


def prompt(path: Path, number: int = 0) -> Prompt:
    return Prompt(number, "make it green", {"video": (path,)})


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (Cut(), list(range(24))),
        (Cut(frames=4), [0, 1, 2, 3]),
        (Cut(frames=5, start=3, stride=5), [3, 8, 13, 18, 23]),
        (Cut(start=20), [20, 21, 22, 23]),
        (Cut(start=1, stride=10), [1, 11, 21]),
    ],
)
def test_start_stride_and_number_choose_the_frames(clip, cut, expected):
    frames = load_media(clip, cut)
    found = [np.asarray(frame).mean() for frame in frames]
    assert np.abs(np.array(found) - [LEVELS[index] for index in expected]).max() < 4
    assert {frame.size for frame in frames} == {(64, 32)}


def test_frames_are_scaled_to_cover_the_size_and_the_middle_is_cut_out(tmp_path):
    frame = Image.new("RGB", (40, 20), (255, 0, 0))
    frame.paste((0, 0, 255), (10, 0, 30, 20))  # the middle half is blue
    frame.save(tmp_path / "clip.png", save_all=True, append_images=[frame.copy()])
    (first, second) = load_media(tmp_path / "clip.png", Cut(height=10, width=10))
    assert first.size == (10, 10) and first.getpixel((5, 5)) == (0, 0, 255) == first.getpixel((1, 1))
    assert first.tobytes() == second.tobytes()


def test_too_few_frames_are_refused_with_both_numbers(clip):
    expected = r"clip.mp4 has 24 frames; expected at least 33: 5 from frame 0, one in 8"
    with pytest.raises(ValueError, match=expected):
        load_media(clip, Cut(frames=5, stride=8))
    with pytest.raises(ValueError, match="has 24 frames; expected at least 31: all from frame 30"):
        load_media(clip, Cut(start=30))


@pytest.mark.parametrize("options", [{"frames": 0}, {"stride": 0}, {"start": -1}, {"height": 16}, {"width": 8}])
def test_a_cut_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match=r"policy\.video"):
        Cut(**options)


# ---- files that cannot be used


def turned(path: Path) -> Path:
    """A video whose header says that it is to be shown turned by 90 degrees, as telephones write it."""
    movies.write(path, torch.rand(8, 3, 64, 64), 8)
    content = path.read_bytes()
    upright = b"".join(number.to_bytes(4) for number in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    quarter = b"".join(number.to_bytes(4) for number in (0, 65536, 0, (1 << 32) - 65536, 0, 0, 0, 0, 1 << 30))
    at = content.index(upright, content.index(b"tkhd"))  # the matrix of the track
    path.write_bytes(content[:at] + quarter + content[at + len(quarter) :])
    return path


def uneven(path: Path) -> Path:
    """Frames that are 1/8 s apart at first and 1/2 s later."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", Fraction(8))
        stream.height = stream.width = 64
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 8)
        for place in (0, 1, 2, 3, 7, 11, 15):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * place, np.uint8), "rgb24")
            frame.pts, frame.time_base = place, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    return path


def cut_off(path: Path) -> Path:
    """Its index comes first, so that what is there can be read."""
    whole = index_first(film(path, noise(24, seed=0)).read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    return path


FLAWS = {
    turned: "is to be shown turned by -90 degrees",
    uneven: r"has frames that are 0\.125 to 0\.500 s apart; expected a constant rate",
    sound: "holds audio; expected moving pictures",
    cut_off: r"is cut off: its index names 24 frames, \d+ are there",
}


@pytest.mark.parametrize("make", FLAWS, ids=lambda make: make.__name__)
def test_a_file_that_cannot_be_used_is_named_with_its_flaw(tmp_path, make):
    path = make(tmp_path / "odd.mp4")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} {FLAWS[make]}"):
        load_media(path, Cut())


def test_every_bad_file_is_listed_before_training(tmp_path, clip):
    bad = [turned(tmp_path / "a.mp4"), sound(tmp_path / "b.mp4")]
    with pytest.raises(ValueError, match=r"^2 videos cannot be used: .*a\.mp4 is to .*; .*b\.mp4 holds audio"):
        require_usable([prompt(path) for path in (clip, *bad)], Cut())


# ---- what rewards see of them


def test_samples_carry_the_clip_that_the_policy_was_given(tmp_path):
    tiny = NAMED["WanVideoToVideo"]
    policy, prompts = policy_of(tiny, tmp_path)
    _, samples = policy.rollout(batch_of(prompts))
    assert samples.source_video is not None and samples.video is not None
    for row, one in enumerate(samples.prompts):
        wanted = torch.stack([torch.from_numpy(np.array(frame)) for frame in load_media(*one.media["video"], Cut())])
        assert torch.equal((samples.source_video[row] * 255).round().byte(), wanted.permute(0, 3, 1, 2))
    part = samples.take(torch.tensor([4, 1]))
    assert torch.equal(part.source_video, samples.source_video[[4, 1]])


def test_there_is_no_source_without_a_video_and_unequal_ones_are_refused(tmp_path, clip):
    assert given([Prompt(0, "a cat")], Cut()) is None
    other = film(tmp_path / "short.mp4", greys(range(0, 80, 10)))
    with pytest.raises(ValueError, match=r"videos have the shapes .*set frames, height and width of policy\.video"):
        given([prompt(clip), prompt(other, 1)], Cut())
    assert given([prompt(clip), prompt(other, 1)], Cut(frames=8)).shape == (2, 8, 3, 32, 64)
