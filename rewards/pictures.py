"""Pixels as rewards for images and videos see them, and the walks over a batch that they share.

Axes: B samples, F frames, H, W height and width, D features.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.types import Prompt, Samples, require_shape, same_shape

Scorer = Callable[[list[Image.Image], list[Prompt]], Tensor]  # b pictures and their prompts -> (b,), higher is better
PictureReward = Callable[[Samples], Tensor]  # a Reward of one component, (B,)
Embed = Callable[[list[Image.Image]], Tensor]  # b pictures -> (b, ..., D) features
Frames = int | tuple[int, ...] | None  # of a clip: how many, evenly spaced; or which; or all
TOLERANCE = 1e-3  # how far rounding may carry a pixel out of [0, 1]; further means another range, such as [-1, 1]


def images(samples: Samples) -> Tensor:
    """The images of the samples, (B, 3, H, W) in [0, 1] or not finite; raises ValueError for anything else."""
    if samples.image is None:
        raise ValueError("the samples carry no image; expected image of shape (B, 3, H, W)")
    require_shape("image", samples.image, len(samples), 3, None, None)
    require_range("image", samples.image)
    return samples.image


def videos(samples: Samples) -> Tensor:
    """The clips of the samples, (B, F, 3, H, W) in [0, 1] or not finite; raises ValueError for anything else."""
    if samples.video is None:
        raise ValueError("the samples carry no video; expected video of shape (B, F, 3, H, W)")
    require_shape("video", samples.video, len(samples), None, 3, None, None)
    require_range("video", samples.video)
    return samples.video


def edits(samples: Samples) -> tuple[Tensor, Tensor]:
    """The clips of the samples and what was to be edited, of one shape, frame by frame; raises ValueError otherwise."""
    video = videos(samples)
    if samples.source_video is None:
        raise ValueError("the samples carry no source_video; expected that of an editing policy, (B, F, 3, H, W)")
    same_shape(video=video, source_video=samples.source_video)
    require_range("source_video", samples.source_video)
    return video, samples.source_video


def require_range(name: str, media: Tensor) -> None:
    """Raises ValueError if a finite value is not in [0, 1]; read one sample at a time, as clips are large."""
    if media.numel() == 0:
        return
    ends = torch.tensor([row.masked_fill(~row.isfinite(), 0.5).aminmax() for row in media])  # (B, 2)
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}; expected [0, 1]")


def whole(media: Tensor) -> Tensor:
    """Whether every pixel of a sample is finite; (B, ...) -> (B,) bool on the CPU."""
    return torch.stack([row.isfinite().all() for row in media]).cpu()


def to_uint8(image: Tensor) -> Tensor:
    """round(255 x), halves to the even number as in the published scorers; (B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8."""
    require_shape("image", image, None, 3, None, None)
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def pictures(image: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> B RGB pictures of 8 bits a channel."""
    return [Image.fromarray(pixels.numpy()) for pixels in to_uint8(image)]


def require_frames(total: int, least: int) -> None:
    if total < least:
        raise ValueError(f"the clips have {total} frame(s); expected at least {least}")


def choose(total: int, frames: Frames) -> list[int]:
    """Indices into `total` frames: all, `frames` of them from the first to the last (one: the first), or those listed.

    The choice depends on the length alone, so all samples of a group are judged at the same frames. A clip shorter than
    the count gives all it has; -1 is the last frame. Raises ValueError for an index outside the clip.
    """
    if frames is None:
        return list(range(total))
    if isinstance(frames, int):
        if frames < 1:
            raise ValueError(f"frames is {frames}; expected at least 1")
        return torch.linspace(0, total - 1, min(frames, total), dtype=torch.float64).round().int().tolist()
    if not frames or any(not -total <= index < total for index in frames):
        raise ValueError(f"frames is {list(frames)}; expected indices into clips of {total} frames, at least one")
    return [index % total for index in frames]


@torch.no_grad()
def score_pictures(samples: Samples, score: Scorer, *, batch: int) -> Tensor:
    """Scores of the samples, `batch` pictures at a time; -> (B,) float32 on the CPU.

    NaN where a pixel or the score is not finite; raises ValueError for a batch below 1 and for
    samples without images in [0, 1].
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    image = images(samples)
    scores = torch.full((len(samples),), torch.nan)
    rows = image.flatten(1).isfinite().all(1).nonzero()[:, 0].cpu()
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        values = score(pictures(image[part.to(image.device)]), prompts_of(samples, part.tolist())).float().cpu()
        require_shape("scores", values, len(part))
        scores[part] = values
    return torch.where(scores.isfinite(), scores, torch.nan)


def prompts_of(samples: Samples, rows: Sequence[int]) -> list[Prompt]:
    return [samples.prompts[row] for row in rows]


@torch.no_grad()
def frame_features(video: Tensor, embed: Embed, *, batch: int, chosen: Sequence[int] | None = None) -> Tensor:
    """Features of the chosen frames, or all, `batch` at a time; (B, F, 3, H, W) -> (B, n, ..., D) float32 on the CPU.

    NaN throughout a sample with a pixel that is not finite, chosen or not; raises ValueError for a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    times = range(video.shape[1]) if chosen is None else chosen
    frames = [(row, time) for row in range(len(video)) for time in times]
    parts = [frames[start : start + batch] for start in range(0, len(frames), batch)]
    found = [embed(pictures(torch.stack([video[at] for at in part]))).float().cpu() for part in parts]
    features = torch.cat(found).unflatten(0, (len(video), len(times)))
    features[~whole(video)] = torch.nan
    return features
