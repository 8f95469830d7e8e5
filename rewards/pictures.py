"""Pixels as image rewards see them, and the walk over a batch that every image reward shares.

Axes: B samples, H, W height and width.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.types import Prompt, Samples, require_shape

Scorer = Callable[[list[Image.Image], list[Prompt]], Tensor]  # b pictures and their prompts -> (b,), higher is better
PictureReward = Callable[[Samples], Tensor]  # a Reward of one component, (B,)
TOLERANCE = 1e-3  # how far rounding may carry a pixel out of [0, 1]; further means another range, such as [-1, 1]


def images(samples: Samples) -> Tensor:
    """The images of the samples, (B, 3, H, W) in [0, 1] or not finite; raises ValueError for anything else."""
    if samples.image is None:
        raise ValueError("the samples carry no image; expected image of shape (B, 3, H, W)")
    require_shape("image", samples.image, len(samples), 3, None, None)
    finite = samples.image[samples.image.isfinite()]
    if len(finite) and (finite.min() < -TOLERANCE or finite.max() > 1 + TOLERANCE):
        raise ValueError(f"image has values from {finite.min():.4g} to {finite.max():.4g}; expected [0, 1]")
    return samples.image


def to_uint8(image: Tensor) -> Tensor:
    """round(255 x), halves to the even number as in the published scorers; (B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8."""
    require_shape("image", image, None, 3, None, None)
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def pictures(image: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> B RGB pictures of 8 bits a channel."""
    return [Image.fromarray(pixels.numpy()) for pixels in to_uint8(image)]


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
