"""Pictures that a person can judge: enlarged grids of small images with captions, before beside after, and curves.

Axes: B images, C = 3 channels, H, W px. Nothing here touches a display or matplotlib's global state.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmgrpo.types import require_shape

PAPER, INK, GOOD, BAD, PLAIN = "#ffffff", "#202020", "#1a9850", "#d73027", "#b0b0b0"
BORDER, GAP, TEXT, TITLE = 5, 14, 15, 22  # px
COLOURS = ("#4575b4", "#d95f02", "#1b9e77", "#7570b3", "#666666")

Points = tuple[Sequence[float], Sequence[float]]  # x and y of a line
Line = tuple[str, bool | None]  # a text and whether it is right; None: neither


def enlarge(image: Tensor, scale: int) -> Image.Image:
    """One (3, H, W) image in [0, 1] with every pixel a square of `scale` px."""
    require_shape("image", image, 3, None, None)
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, its end replaced by dots where it would be wider than `width` px."""
    if font.getlength(text) <= width:
        return text
    return next(
        (text[:end] + "..." for end in range(len(text), 0, -1) if font.getlength(text[:end] + "...") <= width), ""
    )


def tile(image: Tensor, caption: str, mark: bool | None, scale: int) -> Image.Image:
    """An enlarged image in a frame (green good, red bad, grey unknown) with its caption below."""
    inner, font = enlarge(image, scale), ImageFont.load_default(TEXT)
    width, height = inner.width + 2 * BORDER, inner.height + 2 * BORDER
    picture = Image.new("RGB", (width, height + TEXT + 8), PAPER)
    picture.paste({None: PLAIN, True: GOOD, False: BAD}[mark], (0, 0, width, height))
    picture.paste(inner, (BORDER, BORDER))
    ImageDraw.Draw(picture).text((width / 2, height + 3), fit(caption, font, width), INK, font, anchor="ma")
    return picture


def sheet(tiles: Sequence[tuple[Tensor, Sequence[Line]]], columns: int = 4, scale: int = 12) -> Image.Image:
    """Enlarged images in rows of `columns`, each with its lines of text below, right ones green and wrong ones red."""
    if not tiles:
        raise ValueError("no tiles: there is nothing to draw")
    font, most = ImageFont.load_default(TEXT), max(len(lines) for _, lines in tiles)
    shown = [enlarge(image, scale) for image, _ in tiles]
    width, height = (max(size) for size in zip(*(image.size for image in shown), strict=True))
    step = width + GAP, height + most * (TEXT + 4) + GAP
    across = min(columns, len(tiles))
    page = Image.new("RGB", (across * step[0] + GAP, -(-len(tiles) // across) * step[1] + GAP), PAPER)
    for place, (image, (_, lines)) in enumerate(zip(shown, tiles, strict=True)):
        left, top = GAP + place % across * step[0], GAP + place // across * step[1]
        page.paste(image, (left, top))
        for row, (text, right) in enumerate(lines):
            at = (left + width / 2, top + height + 2 + row * (TEXT + 4))
            ink = {None: INK, True: GOOD, False: BAD}[right]
            ImageDraw.Draw(page).text(at, fit(text, font, width), ink, font, anchor="ma")
    return page


def grid(
    images: Tensor,
    captions: Sequence[str],
    marks: Sequence[bool] | None = None,
    columns: int = 4,
    scale: int = 12,
    title: str = "",
) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1] in rows of `columns`, each with a caption and, with marks, a green or red frame."""
    require_shape("images", images, None, 3, None, None)
    for name, values in (("captions", captions), ("marks", captions if marks is None else marks)):
        if len(values) != len(images) or not len(images):
            raise ValueError(f"{len(values)} {name} for {len(images)} images; expected as many, and at least one")
    known = [None] * len(images) if marks is None else [bool(mark) for mark in marks]
    tiles = [tile(*parts, scale) for parts in zip(images, captions, known, strict=True)]
    across, head = min(columns, len(tiles)), TITLE + 2 * GAP if title else GAP
    step = tiles[0].width + GAP, tiles[0].height + GAP
    page = Image.new("RGB", (across * step[0] + GAP, head + -(-len(tiles) // across) * step[1]), PAPER)
    for place, picture in enumerate(tiles):
        page.paste(picture, (GAP + place % across * step[0], head + place // across * step[1]))
    font = ImageFont.load_default(TITLE)
    ImageDraw.Draw(page).text((page.width / 2, GAP), fit(title, font, page.width - 2 * GAP), INK, font, anchor="ma")
    return page


def before_after(
    before: Tensor,
    after: Tensor,
    captions: Sequence[str],
    marks_before: Sequence[bool] | None = None,
    marks_after: Sequence[bool] | None = None,
    columns: int = 4,
    scale: int = 12,
    titles: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """Two grids of the same prompts side by side; with marks, each title says how many of its images are right."""
    halves = []
    for images, marks, title in zip((before, after), (marks_before, marks_after), titles, strict=True):
        counted = "" if marks is None else f": {sum(map(bool, marks))} of {len(marks)} right"
        halves.append(grid(images, captions, marks, columns, scale, title + counted))
    left, right = halves
    page = Image.new("RGB", (left.width + 2 * GAP + right.width, max(left.height, right.height)), PAPER)
    page.paste(left, (0, 0))
    page.paste(right, (left.width + 2 * GAP, 0))
    middle = left.width + GAP
    ImageDraw.Draw(page).line((middle, GAP, middle, page.height - GAP), PLAIN, 2)
    return page


def film_strips(clips: Mapping[str, Tensor], lines: Mapping[str, Sequence[str]], scale: int = 5) -> Image.Image:
    """A column of clips (B, F, 3, H, W) in [0, 1] under each name, a clip's frames side by side, each with its line below."""
    for name, videos in clips.items():
        require_shape(f"clips {name!r}", videos, len(lines[name]), None, 3, None, None)
    font, strips = ImageFont.load_default(TEXT), {name: [strip(clip, scale) for clip in clips[name]] for name in clips}
    width, height = next(iter(strips.values()))[0].size
    step, head, rows = height + TEXT + 8 + GAP // 2, TITLE + 2 * GAP, max(map(len, strips.values()))
    page = Image.new("RGB", (len(strips) * (width + 2 * GAP), head + rows * step), PAPER)
    pen, heading = ImageDraw.Draw(page), ImageFont.load_default(TITLE)
    for column, (name, pieces) in enumerate(strips.items()):
        left = GAP + column * (width + 2 * GAP)
        pen.text((left + width / 2, GAP), name, INK, heading, anchor="ma")
        for row, (piece, line) in enumerate(zip(pieces, lines[name], strict=True)):
            page.paste(piece, (left, head + row * step))
            pen.text((left + width / 2, head + row * step + height + 3), fit(line, font, width), INK, font, anchor="ma")
    return page


def strip(clip: Tensor, scale: int) -> Image.Image:
    """The frames of a clip (F, 3, H, W) from left to right, enlarged, a gap of 3 px between them."""
    frames = [enlarge(frame, scale) for frame in clip]
    step = frames[0].width + 3
    page = Image.new("RGB", (len(frames) * step - 3, frames[0].height), PAPER)
    for place, frame in enumerate(frames):
        page.paste(frame, (place * step, 0))
    return page


def curve(panels: Mapping[str, Mapping[str, Points]], x_label: str = "iteration", title: str = "") -> Image.Image:
    """Line charts side by side: {label of the y axis: {name of the line: (x, y)}}."""
    if not panels:
        raise ValueError("no panels: there is nothing to draw")
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=130, layout="constrained")
    for axes, (label, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for colour, (name, (x, y)) in zip(COLOURS * len(lines), lines.items(), strict=False):
            axes.plot(x, y, color=colour, label=name, linewidth=2, marker="o", markersize=3)
        axes.set(xlabel=x_label, ylabel=label)
        axes.grid(color="#e0e0e0")
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
    figure.suptitle(title)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
