"""A verifiable editing task, "make it green" on clips of 16x16 px, and rewards that check colour, shape and motion.

A clip shows one shape of a pure colour moving over a still grey ground. Pure means that the largest channel is 1 and the
smallest 0, grey that all are equal. So a pixel that the shape covers by the share a has the chroma (largest - smallest channel) a,
whatever colour and grey it mixes: the mask of a clip and its true edit follow from its pixels alone.
Axes: B clips, F frames, H = W = 16 px.
`edit_reward` = `colour_match` * `motion_iou` is the reward; `background_error` and `edit_distance` are to be watched with weight 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.types import Prompt, Samples
from rewards.pictures import edits
from rewards.shapes import SHAPES, coverage

SIZE, FRAMES = 16, 4  # px, frames of a clip
COLOURS = {
    "red": (1.0, 0.0, 0.0), "yellow": (1.0, 1.0, 0.0), "green": (0.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0), "blue": (0.0, 0.0, 1.0), "magenta": (1.0, 0.0, 1.0),
}  # fmt: skip
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")  # 45 degrees apart
GROUNDS = ("plain", "brighter to the right", "brighter downwards", "upright stripes", "level stripes")
RADII, SPEEDS, GREYS = (2.2, 3.0), (2.2, 3.0), (0.1, 0.5)  # px, px a frame, levels in [0, 1]
EMPTY, FULL = 0.2, 0.8  # chroma up to which a pixel shows ground alone, and from which it shows the shape alone
SAME, OTHER = 0.25, 1.0  # distance of hues up to which they are the same colour, and from which they are others


@dataclass(frozen=True)
class Scene:
    """What a clip shows and what it is to become."""

    shape: str  # of SHAPES
    was: str  # a key of COLOURS
    colour: str  # the wanted one, another key

    @property
    def text(self) -> str:
        """The prompt, e.g. "make it green"."""
        return f"make it {self.colour}"


SCENES = tuple(
    Scene(shape, was, colour) for shape in SHAPES for was in COLOURS for colour in COLOURS if was != colour
)  # all 90


# ---- true clips


class Drawn(NamedTuple):
    """Clips without their colour."""

    cover: Tensor  # (B, F, H, W) share of each pixel that the shape covers
    ground: Tensor  # (B, 1, H, W) grey level
    direction: Tensor  # (B,) int64 index of DIRECTIONS
    kind: Tensor  # (B,) int64 index of GROUNDS


def draw(shapes: Sequence[str], generator: torch.Generator) -> Drawn:
    """Shapes of random size, way and speed over random grounds, never leaving the clip."""
    count = len(shapes)
    size, pace, *places = torch.rand(4, count, generator=generator)
    radius = RADII[0] + (RADII[1] - RADII[0]) * size
    direction = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    angle = direction * (2 * math.pi / len(DIRECTIONS))
    velocity = (SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * pace)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    room = SIZE / 2 - radius[:, None] - (FRAMES - 1) / 2 * velocity.abs()  # (B, 2) px
    middle = SIZE / 2 + room * (torch.stack(places, 1) * 2 - 1)
    times = torch.arange(FRAMES) - (FRAMES - 1) / 2
    centre = middle[:, None] + times[:, None] * velocity[:, None]  # (B, F, 2) px, right and down
    cover = torch.zeros(count, FRAMES, SIZE, SIZE)
    for shape in SHAPES:
        rows = torch.tensor([row for row, name in enumerate(shapes) if name == shape], dtype=torch.int64)
        found = coverage(shape, radius[rows].repeat_interleave(FRAMES), centre[rows].flatten(0, 1), SIZE)
        cover[rows] = found.view(-1, FRAMES, SIZE, SIZE)
    ground, kind = grounds(count, generator)
    return Drawn(cover, ground, direction, kind)


def grounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grey levels (B, 1, H, W) of still grounds, and which of GROUNDS each is, (B,) int64."""
    levels = GREYS[0] + (GREYS[1] - GREYS[0]) * torch.rand(2, count, 1, 1, 1, generator=generator)
    kind = torch.randint(len(GROUNDS), (count,), generator=generator)
    along = torch.linspace(0, 1, SIZE)
    stripes = (torch.arange(SIZE) // 2 % 2).float()
    weights = [torch.zeros(SIZE, SIZE)]
    for line in (along, stripes):
        right = line.expand(SIZE, SIZE)
        weights += [right, right.T]
    return torch.lerp(levels.amin(0), levels.amax(0), torch.stack(weights)[kind, None]), kind


def paint(cover: Tensor, ground: Tensor, colours: Sequence[str]) -> Tensor:
    """Clips in which the covered share of each pixel has the colour; (B, F, H, W), (B, 1, H, W) -> (B, F, 3, H, W) in [0, 1]."""
    return torch.lerp(ground.unsqueeze(2), palette(colours)[:, None, :, None, None], cover.unsqueeze(2))


def palette(colours: Sequence[str]) -> Tensor:
    """(B, 3) in [0, 1]."""
    return torch.tensor([COLOURS[name] for name in colours])


def recoloured(clip: Tensor, colours: Sequence[str]) -> Tensor:
    """The true edit of true clips: the same shares of shape and ground, the shape in another colour; (B, F, 3, H, W)."""
    chroma, ground = chroma_of(clip).unsqueeze(2), clip.amin(2, keepdim=True)  # pure colours leave the smallest channel
    return ground + chroma * palette(colours)[:, None, :, None, None].to(clip)


# ---- the reward


def chroma_of(clip: Tensor) -> Tensor:
    """Largest minus smallest channel, in [0, 1]; (B, F, 3, H, W) -> (B, F, H, W)."""
    return clip.amax(2) - clip.amin(2)


def mask_of(clip: Tensor) -> Tensor:
    """How much of each pixel belongs to the shape, in [0, 1]: 0 up to a chroma of 0.2, 1 from 0.8; -> (B, F, H, W)."""
    return ((chroma_of(clip) - EMPTY) / (FULL - EMPTY)).clamp(0, 1)


def clips(samples: Samples) -> tuple[Tensor, Tensor]:
    """The edited clips and their sources, (B, F, 3, H, W) in [0, 1]; raises ValueError if one is missing."""
    edited, source = edits(samples)
    return edited.detach().float().cpu(), source.detach().float().cpu()


def wished(prompt: Prompt) -> str:
    """The column colour of a prompt; raises ValueError if it is missing or not of this task."""
    colour = prompt.columns.get("colour")
    if colour not in COLOURS:
        raise ValueError(f"prompt {prompt.id} {prompt.text!r} has colour {colour!r}; expected one of {[*COLOURS]}")
    return str(colour)


def colour_match(samples: Samples) -> Tensor:
    """How near the hue of what the clip shows as shape is to the wished one; (B,) in [0, 1].

    A pixel's hue is its colour with the smallest channel at 0 and the largest at 1. Its distance is the sum of its channels'
    distances to those of the wished colour: a pixel scores 1 up to 0.25 and 0 from 1, which is that of neighbours among COLOURS.
    Mean over the clip's mask; a clip that shows less than one pixel in all its frames has no more than that share.
    """
    clip, _ = clips(samples)
    wanted = palette([wished(prompt) for prompt in samples.prompts])[:, None, :, None, None]
    lifted = clip - clip.amin(2, keepdim=True)
    hue = lifted / lifted.amax(2, keepdim=True).clamp(min=EMPTY)  # below, the mask is 0
    match = ((OTHER - (hue - wanted).abs().sum(2)) / (OTHER - SAME)).clamp(0, 1)  # (B, F, H, W)
    mask = mask_of(clip)
    return (mask * match).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def motion_iou(samples: Samples) -> Tensor:
    """Intersection over union of the clip's mask with that of its source, over all pixels and frames; (B,) in [0, 1].

    Masks are soft: the intersection takes the smaller, the union the larger of the two at each pixel.
    """
    mask, true = (mask_of(clip).flatten(1) for clip in clips(samples))
    return torch.minimum(mask, true).sum(1) / torch.maximum(mask, true).sum(1).clamp(min=1)


def edit_reward(samples: Samples) -> Tensor:
    """`colour_match` * `motion_iou`, (B,) in [0, 1]: the one to train on."""
    return colour_match(samples) * motion_iou(samples)


# ---- the qualities that the reward does not see


def background_error(samples: Samples) -> Tensor:
    """RMS distance per channel value to the source where that is exactly grey, so ground alone; lower is better; -> (B,) in [0, 1]."""
    clip, source = clips(samples)
    still = (chroma_of(source) == 0).float()  # (B, F, H, W)
    squares = (clip - source).square().mean(2) * still
    return (squares.flatten(1).sum(1) / still.flatten(1).sum(1).clamp(min=1)).sqrt()


def edit_distance(samples: Samples) -> Tensor:
    """RMS distance per channel value to the true edit of the source; lower is better; -> (B,) in [0, 1].

    Watch it with weight 0; to train on it, negate it.
    """
    clip, source = clips(samples)
    true = recoloured(source, [wished(prompt) for prompt in samples.prompts])
    return (clip - true).square().flatten(1).mean(1).sqrt()
