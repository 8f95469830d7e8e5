"""Masks of the edited region, as files beside a prompt: white is edited. Axes: F frames, H, W height and width."""

import importlib
import mimetypes
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from mmgrpo.types import Prompt


def edited_region(prompt: Prompt, medium: str, shape: Sequence[int]) -> Tensor | None:
    """Where a prompt's mask says that its source is edited; (F, H, W) bool, None without a mask; `shape` is F, H, W.

    The medium holds one image for all frames, an image a frame, or a video of as many frames. A pixel is edited from
    mid-grey on. A mask of another size is stretched over the whole frame, as diffusers' video processor does with the
    source. Raises ValueError for a file that cannot be read or another number of frames.
    """
    paths = prompt.media.get(medium, ())
    if not paths:
        return None
    count, height, width = shape
    pictures = [picture for path in paths for picture in read_mask(path)]
    if len(pictures) not in (1, count):
        raise ValueError(f"prompt {prompt.id} has a {medium} of {len(pictures)} frames; expected 1 or {count}")
    sized = [picture.resize((width, height), Image.Resampling.NEAREST) for picture in pictures]
    return torch.stack([torch.from_numpy(numpy.array(picture)) >= 128 for picture in sized]).expand(count, -1, -1)


def read_mask(path: Path) -> list[Image.Image]:
    """The grey pictures in a file, of an image one; raises ValueError naming the file."""
    if (mimetypes.guess_type(path)[0] or "").startswith("video/"):
        return read_video(path)
    try:
        with Image.open(path) as picture:
            return [picture.convert("L")]
    except OSError as error:
        raise ValueError(f"the mask {path} is no readable image: {error}") from None


def read_video(path: Path) -> list[Image.Image]:
    try:
        decord = importlib.import_module(
            "decord"
        )  # not there on every platform, and only masks that are videos need it
    except ImportError:
        raise ValueError(f"the mask {path} is a video, which needs the package decord; expected images") from None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        frames = reader.get_batch(range(len(reader))).asnumpy()  # (F, H, W, 3) uint8
    except (decord.DECORDError, RuntimeError) as error:
        raise ValueError(f"the mask {path} is no readable video: {str(error).splitlines()[-1]}") from None
    return [Image.fromarray(frame).convert("L") for frame in frames]
