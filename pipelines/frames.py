"""Frames of a video file for a model that looks at videos. Axes: F frames, H, W height and width."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from decord import DECORDError, VideoReader
from rich.progress import track
from transformers.video_utils import VideoMetadata


class Clip(NamedTuple):
    """Frames chosen from a video, and when they were."""

    frames: np.ndarray  # (F, H, W, 3) uint8
    metadata: VideoMetadata


def opened(path: Path) -> VideoReader:
    """The video's reader; raises ValueError that says what is wrong with the file."""
    require_whole(path)
    try:
        reader = VideoReader(str(path), num_threads=1)
    except (DECORDError, RuntimeError) as error:
        raise ValueError(f"is no readable video: {str(error).splitlines()[-1]}") from error
    if len(reader) == 0:
        raise ValueError("holds no frames")
    return reader


def require_whole(path: Path) -> None:
    """Raise ValueError if the file holds no moving pictures, or fewer frames than its index says."""
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                kinds = " and ".join(sorted({stream.type for stream in file.streams})) or "nothing"
                raise ValueError(f"holds {kinds}; expected moving pictures")
            said = file.streams.video[0].frames  # 0 where the format does not say
            there = sum(packet.size > 0 for packet in file.demux(video=0)) if said else 0
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"is no readable video: {error.strerror or error}") from error
    if there < said:
        raise ValueError(f"is cut off: its index names {said} frames, {there} are there")


def first_frame(path: Path) -> av.VideoFrame:
    """With the turn at which it is to be shown."""
    with av.open(str(path)) as file:
        return next(file.decode(video=0))


def chosen(total: int, source_rate: float, count: int | None, rate: float | None) -> list[int]:
    """Evenly spaced indices: `count` of them (all, if the video has fewer), or `rate` of them a second."""
    if count is None:
        assert rate is not None  # one of the two is set
        count = max(1, round(total / source_rate * rate))
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def read(path: Path, count: int | None, rate: float | None) -> Clip:
    """Frames of a video by number or by frames a second; raises ValueError naming the file."""
    try:
        reader = opened(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    total, source_rate = len(reader), float(reader.get_avg_fps())
    indices = chosen(total, source_rate, count, rate)
    try:
        frames = reader.get_batch(indices).asnumpy()
    except DECORDError as error:
        raise ValueError(f"{path} cannot be decoded: {str(error).splitlines()[-1]}") from error
    height, width = frames.shape[1:3]
    known = VideoMetadata(total, source_rate, width, height, total / source_rate, "decord", indices)
    return Clip(frames, known)


def require_readable(paths: Iterable[Path], count: int | None, rate: float | None) -> None:
    """Decode the chosen frames of every file once, before training; raises one ValueError that lists the bad ones."""
    problems = []
    for path in track(sorted(set(paths)), "look at videos", transient=True):
        try:
            read(path, count, rate)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} videos cannot be used: " + "; ".join(problems[:20]))
