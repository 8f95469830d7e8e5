"""A world of one dot that obeys words, and what can be read off its pixels: where it went, and whether it still is one dot.

The dot goes one of 4 x 4 cells up, down, left or right, or stays, on a floor that is lit from the side: more red to the right,
more blue to the bottom, so that a place shows where it is. Colours of dot and floor differ from clip to clip.
Coordinates are px from the top left corner, (x, y). Axes: B clips, n actions, F = n + 1 frames, H = W = 16 px.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgrpo.types import Samples, require_shape
from rewards.inverse_dynamics import Recover

LIGHT = 0.25  # how much brighter the floor is at the far end
SIZE, STEP, RADIUS = 16, 4, 2  # px; a step is the side of a cell, in whose middle the dot stands
MOVES = {"stay": (0, 0), "up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
FAINT = 0.25  # distance in colour below which nothing stands out of a frame
WHOLE = 0.5  # likeness from which on a frame shows one whole dot


@dataclass(frozen=True)
class Walks:
    """What B clips show."""

    start: Tensor  # (B, 2) px, the middle of the dot
    actions: Tensor  # (B, n) int64, rows of MOVES
    dot: Tensor  # (B, 3) colour in [0, 1]
    background: Tensor  # (B, 3) colour in [0, 1] of the floor where it is darkest

    def clips(self) -> Tensor:
        """Anti-aliased frames; -> (B, F, 3, H, W) in [0, 1]."""
        return draw(paths(self.start, self.actions), self.dot, self.background)


def walks(actions: Tensor, generator: torch.Generator) -> Walks:
    """Random colours of 8 bits, and starts from which these actions, (B, n), keep the dot inside.

    Raises ValueError for actions that leave the world from everywhere.
    """
    count, offsets = len(actions), paths(torch.zeros(len(actions), 2), actions) / STEP
    low, high = -offsets.amin(1), SIZE // STEP - 1 - offsets.amax(1)  # (B, 2) cells
    if (low > high).any():
        raise ValueError(f"no start keeps the dot inside for the actions {actions[(low > high).any(1)][0].tolist()}")
    start = STEP * (low + ((high - low + 1) * torch.rand(count, 2, generator=generator)).floor() + 0.5)
    dot = 0.7 + 0.3 * torch.rand(count, 3, generator=generator)  # pale, as what differs little is learned late
    background = 0.15 * torch.rand(count, 3, generator=generator)
    return Walks(start, actions, (dot * 255).round() / 255, (background * 255).round() / 255)


def paths(start: Tensor, actions: Tensor) -> Tensor:
    """Where the dot is in every frame; (B, 2), (B, n) int64 -> (B, F, 2)."""
    steps = STEP * torch.tensor(list(MOVES.values()), dtype=torch.float32)[actions]
    return torch.cat([start[:, None], start[:, None] + steps.cumsum(1)], 1)


def draw(middle: Tensor, dot: Tensor, background: Tensor) -> Tensor:
    """A disc whose rim is one pixel soft; (B, F, 2), (B, 3), (B, 3) -> (B, F, 3, H, W)."""
    require_shape("dot", dot, len(middle), 3)
    require_shape("background", background, len(middle), 3)
    pixels = torch.arange(SIZE) + 0.5
    across = pixels - middle[..., 0, None]  # (B, F, W)
    down = pixels - middle[..., 1, None]
    distance = torch.hypot(across[..., None, :], down[..., None])  # (B, F, H, W)
    share = (RADIUS + 0.5 - distance).clamp(0, 1)[:, :, None]
    plain = floor(background)[:, None]
    return plain + share * (dot[:, None, :, None, None] - plain)


def floor(background: Tensor) -> Tensor:
    """An empty frame; (B, 3) -> (B, 3, H, W)."""
    ramp = torch.linspace(0, LIGHT, SIZE)
    light = torch.stack([ramp.expand(SIZE, SIZE), torch.zeros(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE)])
    return background[:, :, None, None] + light


# ---- what pixels show


def middles(video: Tensor) -> Tensor:
    """Centroid of what stands out of the floor; (B, F, 3, H, W) -> (B, F, 2) px, NaN where nothing does.

    The floor of a frame is the sum of what rows and columns have in common, by their medians.
    """
    require_shape("video", video, None, None, 3, SIZE, SIZE)
    rows = video.median(4, keepdim=True).values
    plain = rows + (video - rows).median(3, keepdim=True).values
    away = (video - plain).norm(dim=2)  # (B, F, H, W)
    most = away.amax((2, 3), keepdim=True)
    weight = (away > most / 2).float()  # the lit floor makes one side of a dot stand out more
    pixels, total = torch.arange(SIZE) + 0.5, weight.sum((2, 3))
    found = torch.stack([(weight.sum(2) * pixels).sum(2) / total, (weight.sum(3) * pixels).sum(2) / total], 2)
    return found.masked_fill((most < FAINT)[:, :, 0], torch.nan)


def tracker() -> Recover:
    """Inverse dynamics without learning: the move that the dot's displacement is nearest to, or none of them.

    -> logits (B, n, 6): minus the squared distance to each of MOVES, and to none of them that of half a step.
    """
    moves = STEP * torch.tensor(list(MOVES.values()), dtype=torch.float32)

    def recover(video: Tensor) -> Tensor:
        gone = middles(video).diff(dim=1)  # (B, n, 2)
        squares = (gone[:, :, None] - moves).square().sum(3).nan_to_num(nan=torch.inf)
        none = torch.full_like(squares[..., :1], (STEP / 2) ** 2)
        return -torch.cat([squares, none], 2)

    return recover


def drawing(samples: Samples) -> dict[str, Tensor]:
    """How much frames look like one dot of the prompt's colours, wherever it is; means over the frames of a clip, (B,) each.

    "likeness": 1 minus the squared distance to a dot drawn at the frame's centroid, over that of an empty frame to it, at
    least 0. "whole": share of frames of at least 0.5. Prompts have the columns dot and background, colours in [0, 1].
    NaN: a pixel that is not finite.
    """
    if samples.video is None:
        raise ValueError("the samples carry no video; expected video of shape (B, F, 3, H, W)")
    columns = [prompt.columns for prompt in samples.prompts]
    dot, background = (torch.tensor([_colour(own, name) for own in columns]) for name in ("dot", "background"))
    middle = middles(samples.video)
    true = draw(middle.nan_to_num(-SIZE), dot, background)  # outside: an empty frame
    missed, empty = ((true - other).square().sum((2, 3, 4)) for other in (samples.video, floor(background)[:, None]))
    likeness = (1 - missed / empty.clamp(min=1e-6)).clamp(min=0)  # (B, F); 0 of an empty frame, as it missed by nothing
    likeness = likeness.masked_fill(middle.isnan().any(2), 0)
    finite = samples.video.flatten(1).isfinite().all(1)
    each = {"likeness": likeness, "whole": (likeness >= WHOLE).float()}
    return {name: torch.where(finite, values.mean(1), torch.nan) for name, values in each.items()}


def _colour(columns: Mapping[str, object], name: str) -> Sequence[float]:
    """The colour in a prompt's column."""
    found = columns.get(name)
    if not (isinstance(found, list | tuple) and len(found) == 3 and all(isinstance(one, int | float) for one in found)):
        raise ValueError(f"a prompt has {name} {found!r}; expected a list of three numbers in [0, 1]")
    return found
