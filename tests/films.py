"""Small video files for tests, written as they are asked for."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np


def film(path: Path, frames: Sequence[np.ndarray], rate: float = 8.0, codec: str = "mp4v") -> Path:
    """The file, which now holds the frames, each (H, W, 3) uint8 RGB, at `rate` of them a second.

    With the codec MJPG, in an AVI file, no frame depends on another. Rows of fewer than 64 pixels may be padded by the
    decoder, which decord then refuses; 32 and 64 are not.
    """
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (width, height))
    assert writer.isOpened(), path
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))  # OpenCV's order is BGR
    writer.release()
    return path


def greys(levels: Sequence[int], height: int = 32, width: int = 64) -> list[np.ndarray]:
    """Frames of one grey each, by which they can be told apart after compression."""
    return [np.full((height, width, 3), level, dtype=np.uint8) for level in levels]


def noise(count: int, seed: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Frames of coarse coloured noise, which survives compression."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return [frame.repeat(8, 0).repeat(8, 1) for frame in blocks]


def index_first(content: bytes) -> bytes:
    """An MP4 whose index stands before its frames, as files for the web have it."""
    boxes, at = {}, 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        boxes[content[at + 4 : at + 8]] = content[at : at + size]
        at += size
    index, place = bytearray(boxes.pop(b"moov")), boxes.pop(b"ftyp")
    table = index.index(b"stco") + 8  # after the name and the version: a count, then where each chunk begins
    for entry in range(int.from_bytes(index[table : table + 4])):
        begin = table + 4 + 4 * entry
        index[begin : begin + 4] = (int.from_bytes(index[begin : begin + 4]) + len(index)).to_bytes(4)
    return place + bytes(index) + b"".join(boxes.values())
