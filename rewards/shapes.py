"""A verifiable drawing task, "three blue squares" on 16x16 pixels, and rewards that check number, colour and shape.

The canvas is black and holds a 2x2 grid of cells of 8x8 px; each of the wished shapes sits alone in one cell.
Axes: B images, N connected components, K templates, H = W = 16 px, C cell side (8 px).
`shape_accuracy` is the reward; `rendering_distance` is a quality measure it does not see, to be watched with weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mmgrpo.types import Prompt, Samples, require_shape

SIZE, CELL, FINE = 16, 8, 8  # px, px, sub-samples per px side
NUMBERS = ("one", "two", "three", "four")
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}
RADII = {"circle": (2.5, 3.2), "square": (2.0, 3.0), "triangle": (2.7, 3.3)}  # px, half the side of the bounding square
SHAPES = tuple(RADII)
REACH = 3.4  # px, largest radius + offset; beyond it neighbours could touch
OFFSET = 0.6  # px, largest offset of a centre from the middle of its cell
COLOUR_SHARE, SHAPE_OVERLAP, AREA_SLACK = 0.6, 0.7, 0.2  # what a component needs to be good, see `good_components`


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for."""

    count: int  # 1..4
    colour: str  # a key of COLOURS
    shape: str  # a key of RADII

    @property
    def text(self) -> str:
        """The prompt, e.g. "one red circle", "three blue squares"."""
        return f"{NUMBERS[self.count - 1]} {self.colour} {self.shape}{'s' * (self.count > 1)}"


WISHES = tuple(Wish(n, colour, shape) for n in (1, 2, 3, 4) for colour in COLOURS for shape in SHAPES)  # all 48


def read_wish(prompt: Prompt) -> Wish:
    """The columns count, colour and shape of a prompt; raises ValueError if one is missing or not of this task."""
    columns = prompt.columns
    if missing := [name for name in ("count", "colour", "shape") if name not in columns]:
        raise ValueError(f"prompt {prompt.id} {prompt.text!r} lacks the column {missing[0]!r}; has {sorted(columns)}")
    if str(columns["count"]) not in ("1", "2", "3", "4"):
        raise ValueError(f"prompt {prompt.id} has count {columns['count']!r}; expected 1..4")
    wish = Wish(int(str(columns["count"])), str(columns["colour"]), str(columns["shape"]))
    if wish not in WISHES:
        raise ValueError(
            f"prompt {prompt.id} asks for {wish.colour!r} {wish.shape!r}; expected one of {[*COLOURS]} and of {[*SHAPES]}"
        )
    return wish


# ---- true renderings


def coverage(shape: str, radius: Tensor, centre: Tensor, side: int = CELL) -> Tensor:
    """Share of each pixel of a square that the shape covers, from 8x8 points a pixel; (K,), (K, 2) px -> (K, side, side)."""
    require_shape("centre", centre, len(radius), 2)
    points = (torch.arange(side * FINE) + 0.5) / FINE  # px
    x, y = ((points - centre[:, axis, None]) / radius[:, None] for axis in (0, 1))  # (K, side * FINE), shape in [-1, 1]
    u, v = x[:, None, :], y[:, :, None]  # v points down
    inside = {
        "circle": lambda: u.square() + v.square() <= 1,
        "square": lambda: (u.abs() <= 1) & (v.abs() <= 1),
        "triangle": lambda: (v.abs() <= 1) & (2 * u.abs() <= v + 1),
    }[shape]()
    return inside.view(-1, side, FINE, side, FINE).float().mean((2, 4))


def place(shape: str, size: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Radius (K,) and centre (K, 2), px, of sizes (K,) in [0, 1] and shifts (K, 2) in [-1, 1] within what fits a cell.

    The edges of squares lie between pixels: with half-covered corners they could not be told from circles.
    """
    low, high = RADII[shape]
    radius = low + (high - low) * size
    if shape == "square":
        radius = (radius * 2).round() / 2
    centre = CELL / 2 + shift * (REACH - radius).clamp(max=OFFSET)[:, None]
    if shape == "square":
        centre = (centre - radius[:, None]).round() + radius[:, None]
    return radius, centre


def render(wishes: Sequence[Wish], generator: torch.Generator) -> Tensor:
    """Anti-aliased images with random cells, radii and sub-pixel centres; -> (B, 3, H, W) in [0, 1]."""
    order = torch.rand(len(wishes), 4, generator=generator).argsort(1)
    size, shift = torch.rand(len(wishes), 4, generator=generator), torch.rand(len(wishes), 4, 2, generator=generator)
    cells = torch.zeros(len(wishes), 4, CELL, CELL)
    for shape in SHAPES:
        rows = torch.tensor([row for row, wish in enumerate(wishes) if wish.shape == shape], dtype=torch.int64)
        radius, centre = place(shape, size[rows].flatten(), shift[rows].flatten(0, 1) * 2 - 1)
        cells[rows] = coverage(shape, radius, centre).view(-1, 4, CELL, CELL)
    counts = torch.tensor([wish.count for wish in wishes])
    colours = torch.tensor([COLOURS[wish.colour] for wish in wishes])  # (B, 3)
    cells = cells * (order < counts[:, None])[:, :, None, None]
    canvas = cells.view(-1, 2, 2, CELL, CELL).transpose(2, 3).reshape(-1, 1, SIZE, SIZE)
    return canvas * colours[:, :, None, None]


@cache
def templates(shape: str, sizes: int, shifts: int) -> Tensor:
    """Coverages on a regular grid of radii and sub-pixel centres; -> (sizes * shifts^2, C, C)."""
    size, right, down = torch.meshgrid(
        torch.linspace(0, 1, sizes), torch.linspace(-1, 1, shifts), torch.linspace(-1, 1, shifts), indexing="ij"
    )
    return coverage(shape, *place(shape, size.flatten(), torch.stack([right, down], -1).view(-1, 2)))


@cache
def masks(shape: str) -> NDArray[np.float32]:
    """The different 0/1 masks of all true renderings of a shape, each moved to the cell's top left; -> (K, C, C).

    Without the full squares that a few small circles become (1 in 500): what cannot be told apart counts as a square.
    """
    filled = (templates(shape, 15, 17) > 0.5).numpy()
    which, y, x = np.nonzero(filled)
    bank = _aligned(which, y, x, len(filled))
    bank = np.unique(bank, axis=0)
    full = bank.sum((1, 2)) == bank.any(1).sum(1) * bank.any(2).sum(1)  # fills its bounding box
    return bank if shape == "square" else bank[~full]


def _aligned(which: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64], total: int) -> NDArray[np.float32]:
    """0/1 masks of `total` sets of pixels, moved to the top left and cut off outside a cell; 3 x (n,) -> (N, C, C)."""
    top, left = np.full(total, SIZE), np.full(total, SIZE)
    np.minimum.at(top, which, y)
    np.minimum.at(left, which, x)
    y, x = y - top[which], x - left[which]
    fits = (y < CELL) & (x < CELL)
    mask = np.zeros((total, CELL, CELL), np.float32)
    mask[which[fits], y[fits], x[fits]] = 1
    return mask


# ---- the reward


def canvas(samples: Samples) -> Tensor:
    """The images at 16x16 px, larger ones averaged in square blocks; -> (B, 3, H, W); raises ValueError on other sizes."""
    if samples.image is None:
        raise ValueError("the shapes rewards look at images; these samples have none")
    require_shape("image", samples.image, len(samples), 3, None, None)
    height, width = samples.image.shape[2:]
    if height != width or height % SIZE or not height:
        raise ValueError(f"image is {width}x{height} px; expected a square whose side is a multiple of {SIZE}")
    return avg_pool2d(samples.image.detach().float().cpu(), height // SIZE)


class Components(NamedTuple):
    """The connected components of B images."""

    owner: NDArray[np.int64]  # (N,) which image
    area: NDArray[np.int64]  # (N,) px
    colours: NDArray[np.int64]  # (N, 5) px of black and of each of COLOURS
    overlap: NDArray[np.float32]  # (N, 3) best IoU with a true mask of each of SHAPES, in [0, 1]


def components(image: Tensor) -> Components:
    """4-connected regions of the pixels that are nearest to a colour other than black; (B, 3, H, W) in [0, 1]."""
    palette = torch.tensor([(0.0, 0.0, 0.0), *COLOURS.values()])  # (5, 3)
    pixels = image.permute(0, 2, 3, 1).flatten(0, 2)
    distances = torch.cdist(pixels, palette, compute_mode="donot_use_mm_for_euclid_dist")  # exact: ties go to black
    labels = distances.argmin(1).view(-1, SIZE, SIZE).numpy()
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = ndimage.generate_binary_structure(2, 1)  # images of the batch do not touch each other
    regions, total = ndimage.label(labels > 0, plane)
    image_of, y, x = np.nonzero(regions)
    which = regions[image_of, y, x].astype(np.int64) - 1
    area = np.bincount(which, minlength=total)
    colours = np.bincount(which * len(palette) + labels[image_of, y, x], minlength=total * len(palette))
    owner = np.zeros(total, np.int64)
    owner[which] = image_of
    overlap = _overlap(_aligned(which, y, x, total), area)
    return Components(owner, area, colours.reshape(total, len(palette)), overlap)


def _overlap(mask: NDArray[np.float32], area: NDArray[np.int64]) -> NDArray[np.float32]:
    """Intersection over union with the nearest true mask of each shape, both at the top left; (N, C, C) -> (N, 3).

    What a mask lost outside its cell still counts in its area (N,) px, and so against it.
    """
    best = np.zeros((len(mask), len(SHAPES)), np.float32)
    for column, shape in enumerate(SHAPES):
        bank = masks(shape).reshape(-1, CELL * CELL)
        shared = mask.reshape(-1, CELL * CELL) @ bank.T  # (N, K) px
        best[:, column] = (shared / (area[:, None] + bank.sum(1) - shared)).max(1)
    return best


def good_components(found: Components, wishes: Sequence[Wish]) -> NDArray[np.bool_]:
    """Which components are what their image was asked for, in colour, area and shape; -> (N,)."""
    colour = np.array([1 + list(COLOURS).index(wish.colour) for wish in wishes])[found.owner]
    shape = np.array([SHAPES.index(wish.shape) for wish in wishes])[found.owner]
    areas = np.array([(sizes.min(), sizes.max()) for sizes in (masks(name).sum((1, 2)) for name in SHAPES)])[shape]
    rows = np.arange(len(found.owner))
    overlap = found.overlap[rows, shape]
    right_colour = found.colours[rows, colour] > COLOUR_SHARE * found.area
    right_area = (found.area >= areas[:, 0] * (1 - AREA_SLACK)) & (found.area <= areas[:, 1] * (1 + AREA_SLACK))
    right_shape = (overlap >= found.overlap.max(1, initial=0)) & (overlap >= SHAPE_OVERLAP)
    return right_colour & right_area & right_shape


def shape_accuracy(samples: Samples) -> dict[str, Tensor]:
    """Does the image show the wished number of shapes of the wished colour and kind?  Two components, (B,) in [0, 1].

    `exact` is 1 where every connected component is good (more than 60 % of its pixels have the colour, its area is that of
    a true rendering +-20 %, and among all shapes the wished one overlaps best, IoU >= 0.7) and their number n is right.
    `soft` is 0.5 exact + 0.5 max(0, 1 - |good - n| / n) good / components: the one to train on.
    Prompts need the columns count, colour and shape. Images: square, side a multiple of 16 px.
    """
    image, wishes = canvas(samples), [read_wish(prompt) for prompt in samples.prompts]
    found = components(image)
    total = np.bincount(found.owner, minlength=len(wishes))
    good = np.bincount(found.owner[good_components(found, wishes)], minlength=len(wishes))
    wanted = np.array([wish.count for wish in wishes])
    exact = (good == wanted) & (total == wanted)
    partial = np.clip(1 - np.abs(good - wanted) / wanted, 0, None) * good / np.maximum(total, 1)
    scores = {"soft": 0.5 * exact + 0.5 * partial, "exact": exact}
    return {name: torch.from_numpy(values).float() for name, values in scores.items()}


# ---- the quality that the reward does not see


def shape_reward(samples: Samples) -> Tensor:
    """The `soft` component of `shape_accuracy`, (B,) in [0, 1]: the one to train on."""
    return shape_accuracy(samples)["soft"]


def exact_match(samples: Samples) -> Tensor:
    """The `exact` component of `shape_accuracy`, (B,) 0 or 1: the one to report."""
    return shape_accuracy(samples)["exact"]


def rendering_distance(samples: Samples) -> Tensor:
    """RMS distance per channel value to the nearest true rendering of the prompt; lower is better; -> (B,) in [0, 1].

    The n cells that fit best must hold the wished shape (nearest over 7 radii x 9x9 centres), the others must be black.
    True renderings score about 0.01, because their radii and centres lie between those of the grid.
    Watch it with weight 0; to train on it, negate it.
    """
    image, wishes = canvas(samples), [read_wish(prompt) for prompt in samples.prompts]
    cells = (
        image.view(-1, 3, 2, CELL, 2, CELL).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 3, CELL * CELL)
    )  # (B, 4, 3, px)
    empty = cells.square().sum((2, 3))  # (B, 4) squared distance to black
    filled = torch.zeros_like(empty)
    for shape in SHAPES:
        rows = torch.tensor([row for row, wish in enumerate(wishes) if wish.shape == shape], dtype=torch.int64)
        colours = torch.tensor([COLOURS[wishes[row].colour] for row in rows.tolist()]).view(-1, 3)
        bank = templates(shape, 7, 9).flatten(1)  # (K, px)
        along = torch.einsum("bqcp,bc->bqp", cells[rows], colours) @ bank.T  # (b, 4, K) <image, template>
        norms = colours.square().sum(1)[:, None, None] * bank.square().sum(1)
        filled[rows] = empty[rows] + (norms - 2 * along).amin(2)
    gain = (filled - empty).sort(1).values  # the best cells first
    chosen = torch.arange(4) < torch.tensor([wish.count for wish in wishes])[:, None]
    squares = empty.sum(1) + (gain * chosen).sum(1)
    return (squares.clamp(min=0) / (3 * SIZE * SIZE)).sqrt()
