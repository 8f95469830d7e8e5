"""Clips as a person reads them on paper, their frames from left to right: under each other in columns, or in scenes with a line a frame.

Axes: B clips, F frames, C = 3 channels, H, W px.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmgrpo.types import require_shape
from pipelines.pictures import GAP, INK, PAPER, TEXT, TITLE, Line, enlarge, fit, tile

BETWEEN = 4  # px between the frames of a clip


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


class Strip(NamedTuple):
    """One clip, what stands left of it, and what stands below each frame; a frame is green, red or grey by its line."""

    label: str
    clip: Tensor  # (F, 3, H, W) in [0, 1]
    lines: Sequence[Line] = ()  # F of them, or none


class Scene(NamedTuple):
    """Clips of one prompt, one below the other under a title."""

    title: str
    strips: Sequence[Strip]


def film(scenes: Sequence[Scene], columns: int = 2, scale: int = 6) -> Image.Image:
    """Scenes in rows of `columns`, every pixel of a clip a square of `scale` px; raises ValueError without any, or of other sizes."""
    if not scenes or not all(scene.strips for scene in scenes):
        raise ValueError(f"{len(scenes)} scenes, of which one may be empty: there is nothing to draw")
    font = ImageFont.load_default(TEXT)
    margin = GAP + round(max(font.getlength(strip.label) for scene in scenes for strip in scene.strips))
    drawn = [drawn_scene(scene, margin, scale) for scene in scenes]
    width, height = (max(size) for size in zip(*(scene.size for scene in drawn), strict=True))
    across = min(columns, len(drawn))
    page = Image.new("RGB", (across * (width + 2 * GAP), GAP + -(-len(drawn) // across) * (height + 2 * GAP)), PAPER)
    for place, scene in enumerate(drawn):
        page.paste(scene, (GAP + place % across * (width + 2 * GAP), GAP + place // across * (height + 2 * GAP)))
    return page


def drawn_scene(scene: Scene, margin: int, scale: int) -> Image.Image:
    """A title and the clips below it, their frames to the right of `margin` px, in which the labels stand."""
    strips = [drawn_strip(strip, scale) for strip in scene.strips]
    width, head = margin + max(strip.width for strip in strips), TITLE + BETWEEN
    page = Image.new("RGB", (width, head + sum(strip.height + BETWEEN for strip in strips)), PAPER)
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(TEXT), head
    draw.text((margin, 0), fit(scene.title, font, width - margin), INK, font)
    for strip, picture in zip(scene.strips, strips, strict=True):
        draw.text((margin - GAP // 2, top + picture.height / 2), strip.label, INK, font, anchor="rm")
        page.paste(picture, (margin, top))
        top += picture.height + BETWEEN
    return page


def drawn_strip(strip: Strip, scale: int) -> Image.Image:
    """The frames of a clip side by side, with their lines below if there are any."""
    require_shape(f"the clip {strip.label!r}", strip.clip, None, 3, None, None)
    lines = strip.lines or [("", None)] * len(strip.clip)
    if len(lines) != len(strip.clip):
        raise ValueError(f"{len(lines)} lines for the {len(strip.clip)} frames of the clip {strip.label!r}")
    tiles = [tile(frame, text, mark, scale) for frame, (text, mark) in zip(strip.clip, lines, strict=True)]
    height = tiles[0].height if strip.lines else tiles[0].height - TEXT - 8  # tile leaves that much for a caption
    page = Image.new("RGB", (len(tiles) * (tiles[0].width + BETWEEN) - BETWEEN, height), PAPER)
    for place, picture in enumerate(tiles):
        page.paste(picture, (place * (picture.width + BETWEEN), 0))
    return page
