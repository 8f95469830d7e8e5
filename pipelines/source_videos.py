"""Videos that a pipeline is given: which frames, how large, and what is wrong with a file, told before training.

Axes: F frames, H, W px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from decord import DECORDError
from PIL import Image, ImageOps, ImageSequence
from rich.progress import track
from torch import Tensor

from mmgrpo.types import Prompt
from pipelines.frames import first_frame, opened

UNEVEN = 0.5  # how far a frame may come from its place at a constant rate, in frames
KEPT = 4  # clips in memory: those of the prompts of a call
SHOWN = 20  # problems in a message


@dataclass(frozen=True)
class Cut:
    """Which frames of a video are used, and how large they are."""

    frames: int | None = None  # how many; None: all
    start: int = 0  # the first, from 0
    stride: int = 1  # every how manyth
    height: int | None = None  # px; with `width`: scaled to cover, the middle cut out
    width: int | None = None  # px; None: as in the file

    def __post_init__(self) -> None:
        sizes = [size for size in (self.frames, self.stride, self.height, self.width) if size is not None]
        if min(sizes) < 1 or self.start < 0:
            raise ValueError(f"policy.video is {self}; expected numbers from 1, and a start from 0")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"policy.video has height {self.height} and width {self.width}; expected both or neither")

    def chosen(self, total: int) -> list[int]:
        """The indices of the frames out of `total`; raises ValueError if there are too few."""
        count = -(-(total - self.start) // self.stride) if self.frames is None else self.frames
        last = self.start + (count - 1) * self.stride
        if count < 1 or last >= total:
            raise ValueError(
                f"has {total} frames; expected at least {max(last, self.start) + 1}: "
                f"{self.frames or 'all'} from frame {self.start}, one in {self.stride}"
            )
        return list(range(self.start, last + 1, self.stride))

    def sized(self, frame: Image.Image) -> Image.Image:
        """The frame at the wanted size."""
        if self.height is None or self.width is None:
            return frame
        return ImageOps.fit(frame, (self.width, self.height), Image.Resampling.LANCZOS)


def is_picture(path: Path) -> bool:
    """Whether the file is one that pictures come in; GIF, WebP and PNG may hold several."""
    return path.suffix.lower() in Image.registered_extensions() and path.suffix.lower() not in (".mpg", ".mpeg")


def is_animated(path: Path) -> bool:
    """Whether a picture file holds several frames."""
    with Image.open(path) as picture:
        try:
            picture.seek(1)
        except EOFError:
            return False
    return True


@lru_cache(KEPT)
def read(path: Path, cut: Cut) -> tuple[Image.Image, ...]:
    """The frames of a video file or of an animated picture, RGB; raises ValueError naming the file and what is wrong."""
    try:
        frames = animated(path, cut) if is_picture(path) else decoded(path, cut)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return tuple(cut.sized(frame) for frame in frames)


def animated(path: Path, cut: Cut) -> list[Image.Image]:
    """Chosen frames of an animated picture."""
    with Image.open(path) as picture:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    return [frames[index] for index in cut.chosen(len(frames))]


def decoded(path: Path, cut: Cut) -> list[Image.Image]:
    """Chosen frames of a video, by decord; raises ValueError for what a policy could not use as it is."""
    reader = opened(path)
    turned = first_frame(path).rotation
    if turned:
        raise ValueError(f"is to be shown turned by {turned} degrees; expected upright frames: encode it again")
    indices = cut.chosen(len(reader))
    require_even(reader.get_frame_timestamp(range(len(reader)))[:, 0])
    try:
        frames = reader.get_batch(indices).asnumpy()
    except DECORDError as error:
        raise ValueError(f"cannot be decoded: {str(error).splitlines()[-1]}") from error
    if len(frames) != len(indices):
        raise ValueError(f"gave {len(frames)} frames; expected {len(indices)}")
    return [Image.fromarray(frame) for frame in frames]


def require_even(times: np.ndarray) -> None:
    """Raise ValueError unless frames (F,), s, follow each other at a constant rate: else a stride means no time."""
    if len(times) < 3:
        return
    even = np.linspace(times[0], times[-1], len(times))
    period = (times[-1] - times[0]) / (len(times) - 1)
    if np.abs(times - even).max() > UNEVEN * period:
        gaps = np.diff(times)
        raise ValueError(
            f"has frames that are {gaps.min():.3f} to {gaps.max():.3f} s apart; expected a constant rate: encode it again"
        )


def given(prompts: Sequence[Prompt], cut: Cut) -> Tensor | None:
    """The clips that the prompts bring as "video", as the policy sees them; (B, F, 3, H, W) in [0, 1], or None."""
    if any(len(prompt.media.get("video", ())) != 1 for prompt in prompts):
        return None
    known: dict[Path, Tensor] = {}
    for (path,) in (prompt.media["video"] for prompt in prompts):
        if path not in known:
            known[path] = torch.stack([as_tensor(frame) for frame in read(path, cut)])
    shapes = {path.name: tuple(clip.shape) for path, clip in known.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"videos have the shapes {shapes}; expected equal ones: set frames, height and width of policy.video"
        )
    clips = [known[path] for (path,) in (prompt.media["video"] for prompt in prompts)]
    return clips[0].expand(len(clips), -1, -1, -1, -1) if len(known) == 1 else torch.stack(clips)


def as_tensor(frame: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1).float() / 255


def require_usable(prompts: Sequence[Prompt], cut: Cut) -> None:
    """Decode the chosen frames of every video once, before training; raises one ValueError that lists the bad ones."""
    found = {path for prompt in prompts for paths in prompt.media.values() for path in paths if not is_picture(path)}
    found |= {path for prompt in prompts for path in prompt.media.get("video", ())}
    problems = []
    for path in track(sorted(found), "look at videos", transient=True, disable=not found):
        try:
            read(path, cut)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} videos cannot be used: " + "; ".join(problems[:SHOWN]))
