"""Clips as MP4 files: what is written is what a reader of videos sees."""

import numpy as np
import pytest
import torch

from pipelines import frames, movies


def ramp(count: int, height: int, width: int) -> torch.Tensor:
    """Frames whose red grows with time and whose blue grows to the right."""
    clip = torch.zeros(count, 3, height, width)
    clip[:, 0] = torch.linspace(0, 1, count)[:, None, None]
    clip[:, 2] = torch.linspace(0, 1, width)
    return clip


def test_a_written_clip_is_read_back_with_its_rate_and_every_frame(tmp_path):
    clip = ramp(9, 16, 16)
    movies.write(tmp_path / "clip.mp4", clip, 12, scale=8)
    found, known = frames.read(tmp_path / "clip.mp4", None, 12.0)
    assert known.fps == 12 and found.shape == (9, 128, 128, 3)
    expected = (clip.permute(0, 2, 3, 1).repeat_interleave(8, 1).repeat_interleave(8, 2) * 255).numpy()
    assert np.abs(found - expected).mean() < 3  # halved colour planes and compression
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_odd_sides_get_one_more_row(tmp_path):
    movies.write(tmp_path / "odd.mp4", ramp(3, 65, 67), 8)
    assert frames.read(tmp_path / "odd.mp4", None, 8.0)[0].shape == (3, 66, 68, 3)


@pytest.mark.parametrize(("clip", "rate"), [(torch.zeros(0, 3, 8, 8), 8), (torch.zeros(2, 3, 8, 8), 0)])
def test_a_clip_without_frames_or_rate_is_refused(tmp_path, clip, rate):
    with pytest.raises(ValueError, match=rf"{len(clip)} frames, {rate} a second"):
        movies.write(tmp_path / "none.mp4", clip, rate)
    with pytest.raises(ValueError, match=r"clip has shape \(3, 8, 8\)"):
        movies.write(tmp_path / "none.mp4", torch.zeros(3, 8, 8), 8)
    assert not list(tmp_path.iterdir())


def test_every_clip_of_a_batch_is_a_file_named_by_its_row(tmp_path):
    clips = torch.stack([ramp(3, 64, 64), ramp(3, 64, 64).flip(0)])
    movies.write_all(tmp_path / "clips", {"before": clips, "after": clips[:1]}, 4, loops=2, scale=1)
    assert {path.name for path in (tmp_path / "clips").iterdir()} == {"00_before.mp4", "01_before.mp4", "00_after.mp4"}
    found, known = frames.read(tmp_path / "clips" / "01_before.mp4", None, 4.0)
    assert len(found) == 6 and known.fps == 4
    assert found[0, ..., 0].mean() > found[2, ..., 0].mean()  # the second clip runs backwards
