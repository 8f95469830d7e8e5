"""Frames of real, small video files: how many, which ones, when, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from films import film, greys, index_first, noise

from pipelines.frames import chosen, read, require_readable

LEVELS = range(10, 250, 10)  # of 24 frames, 3 seconds


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "clip.mp4", greys(LEVELS), rate=8.0)


def levels(frames: np.ndarray) -> np.ndarray:
    """Mean grey of each frame; compression moves it by a few steps."""
    return frames.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (24, 4, [0, 8, 15, 23]),  # 0, 7.67, 15.33, 23
        (24, 2, [0, 23]),
        (24, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 8, [0, 1, 2]),
        (1, 4, [0]),
    ],
)
def test_a_number_of_frames_is_spread_evenly_from_the_first_to_the_last(total, count, expected):
    assert chosen(total, 8.0, count, None) == expected


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(1.0, [0, 12, 23]), (2.0, [0, 5, 9, 14, 18, 23]), (8.0, list(range(24))), (100.0, list(range(24))), (0.1, [0])],
)
def test_a_rate_gives_the_seconds_times_the_rate_but_one_frame_at_least(rate, expected):
    assert chosen(24, 8.0, None, rate) == expected  # 3 seconds; 11.5 rounds to the even 12


def test_the_chosen_frames_are_those_of_the_file_with_their_times(clip):
    frames, metadata = read(clip, 4, None)
    assert frames.shape == (4, 32, 64, 3) and frames.dtype == np.uint8
    assert np.abs(levels(frames) - [LEVELS[index] for index in (0, 8, 15, 23)]).max() < 4
    assert metadata.frames_indices == [0, 8, 15, 23]
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (24, 8.0, 3.0)
    assert (metadata.height, metadata.width) == (32, 64)


def test_frames_by_rate_are_those_of_the_file(clip):
    frames, metadata = read(clip, None, 2.0)
    assert metadata.frames_indices == [0, 5, 9, 14, 18, 23]
    assert np.abs(levels(frames) - [LEVELS[index] for index in metadata.frames_indices]).max() < 4


def test_a_video_with_fewer_frames_than_asked_for_gives_all_it_has(tmp_path):
    frames, metadata = read(film(tmp_path / "short.mp4", greys((40, 200))), 16, None)
    assert len(frames) == 2 and metadata.frames_indices == [0, 1]
    assert np.abs(levels(frames) - [40, 200]).max() < 4


def test_colours_are_read_in_the_order_red_green_blue(tmp_path):
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = 200
    frames, _ = read(film(tmp_path / "red.mp4", [red] * 4), 1, None)
    assert np.abs(frames.mean((0, 1, 2)) - [200, 0, 0]).max() < 12


def spoiled(folder: Path, clip: Path) -> dict[str, Path]:
    """Files that are no videos."""
    whole = clip.read_bytes()
    made = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"This is no video.\n", "picture": whole[:64]}
    for name, content in made.items():
        (folder / f"{name}.mp4").write_bytes(content)
    return {name: folder / f"{name}.mp4" for name in made}


@pytest.mark.parametrize("name", ["truncated", "empty", "text", "picture", "missing"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(name, clip, tmp_path):
    path = spoiled(tmp_path, clip).get(name, tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is no readable video: .") as raised:
        read(path, 4, None)
    assert "\n" not in str(raised.value)


def test_a_download_that_broke_off_is_named_though_its_index_is_whole(tmp_path):
    path = film(tmp_path / "web.mp4", noise(24, seed=0))
    whole = index_first(path.read_bytes())
    path.write_bytes(whole)
    assert len(read(path, 4, None).frames) == 4
    path.write_bytes(whole[: int(0.8 * len(whole))])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is cut off: its index names 24 frames, 18 are there"):
        read(path, 4, None)


def test_damaged_frames_inside_a_file_are_told_with_its_name(tmp_path):
    path = film(tmp_path / "damaged.mp4", greys(LEVELS))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    end = content.index(b"moov", start) - 4
    content[start:end] = b"\xff" * (end - start)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read(path, 4, None)


def test_every_bad_file_of_the_data_is_listed_before_training(clip, tmp_path):
    bad = spoiled(tmp_path, clip)
    require_readable([clip, clip], 4, None)
    with pytest.raises(ValueError, match="^2 videos cannot be used: ") as raised:
        require_readable([clip, bad["text"], bad["truncated"], bad["text"]], 4, None)
    assert str(bad["text"]) in str(raised.value) and str(bad["truncated"]) in str(raised.value)
    assert str(clip) not in str(raised.value)
