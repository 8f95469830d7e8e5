"""Clips as MP4 files that any player shows. Axes: B clips, F frames, H, W px."""

import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor
from torch.nn.functional import pad

from mmgrpo.types import require_shape

QUALITY = "12"  # x264's constant rate factor: 0 is lossless, 23 its default


def write(path: Path, clip: Tensor, rate: float, scale: int = 1) -> None:
    """Write a clip (F, 3, H, W) in [0, 1] as H.264, `rate` frames a second, every pixel a square of `scale` px.

    An odd side gets one more row, as the format needs even ones. The file appears when it is complete.
    """
    require_shape("clip", clip, None, 3, None, None)
    if not (len(clip) and rate > 0 and scale > 0):
        raise ValueError(f"{len(clip)} frames, {rate} a second, scale {scale}; expected at least one of each")
    pixels = (clip.detach().float().cpu().clamp(0, 1) * 255).round()
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = pad(pixels, (0, pixels.shape[3] % 2, 0, pixels.shape[2] % 2), mode="replicate")
    frames = pixels.byte().permute(0, 2, 3, 1).contiguous().numpy()  # (F, H, W, 3)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        with av.open(str(partial), "w") as file:
            stream = file.add_stream("libx264", Fraction(rate).limit_denominator(1001), options={"crf": QUALITY})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            file.mux(stream.encode())
        partial.rename(path)


def write_all(folder: Path, clips: Mapping[str, Tensor], rate: float, loops: int, scale: int) -> None:
    """A file ROW_NAME.mp4 of each clip of (B, F, 3, H, W) in [0, 1], played `loops` times; the folder is made."""
    folder.mkdir(exist_ok=True)
    for name, several in clips.items():
        for row, clip in enumerate(several):
            write(folder / f"{row:02d}_{name}.mp4", clip.repeat(loops, 1, 1, 1), rate, scale)
