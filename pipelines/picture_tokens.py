"""Images as tokens of a language model: how one stands in a text, and the way from files to tokens and to pixels.

A new family of models is one more function like `emu3`, which says how its images are laid out and where its tokenizer of
images is. Axes: n images, R rows and C columns of codes, L tokens of an image with all that surrounds it, H, W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import Emu3ForConditionalGeneration, PreTrainedModel

from pipelines.conversation import Processor, opened

CHOSEN = -1  # in a pattern: a code, chosen by the model
DECODED = 8  # images that become pixels at once


@dataclass(frozen=True)
class Layout:
    """The tokens of an image of one size: `begin`, `before`, rows of codes each closed by `row_end`, `after`."""

    begin: int  # announces an image; chosen like a word
    before: tuple[int, ...]  # what states the size
    rows: int
    columns: int
    row_end: int | None
    after: tuple[int, ...]
    codes: Tensor  # (V',) int64, ascending: the ids of the image's codes

    @property
    def pattern(self) -> Tensor:
        """The token at each place of an image, CHOSEN where it is a code; (L,) int64."""
        row = [CHOSEN] * self.columns + ([] if self.row_end is None else [self.row_end])
        return torch.tensor([self.begin, *self.before, *row * self.rows, *self.after])

    @property
    def last(self) -> int:
        """The place of the last code."""
        return int((self.pattern == CHOSEN).nonzero()[-1])

    def filled(self, codes: Tensor) -> Tensor:
        """Codes (n, R C) with all that surrounds them; (n, L) int64."""
        whole = self.pattern.repeat(len(codes), 1)
        whole[:, self.pattern == CHOSEN] = codes
        return whole

    def bare(self, tokens: Tensor) -> Tensor:
        """The codes of images; (n, L) -> (n, R C) int64."""
        return tokens[:, self.pattern.to(tokens.device) == CHOSEN]


@dataclass(frozen=True)
class Pictures:
    """A model's images: their layout, their codes from a file, their pixels."""

    layout: Layout
    read: Callable[[Path], Tensor]  # a file -> (R C,) int64 ids
    draw: Callable[[Tensor], Tensor]  # (n, R C) int64 ids -> (n, 3, H, W) float32 in [0, 1]


def pictures_of(model: PreTrainedModel, processor: Processor, height: int, width: int) -> Pictures:
    """Images of the given size in pixels; raises ValueError for a model whose images are no tokens that we know."""
    if not isinstance(model, Emu3ForConditionalGeneration):
        raise ValueError(
            f"policy.model is a {type(model).__name__}; expected a model that writes images as tokens: Emu3"
        )
    return emu3(model, processor, height, width)


def emu3(model: Emu3ForConditionalGeneration, processor: Processor, height: int, width: int) -> Pictures:
    """Emu3 (arXiv 2409.18869): <image start> rows*columns <image token>, rows of codes with an end each, <frame end>, <image end>."""
    tokenizer, known = processor.tokenizer, model.vocabulary_mapping
    factor = model.model.vqmodel.vision_spatial_factor
    if height % factor or width % factor or height < factor or width < factor:
        raise ValueError(f"policy.height and policy.width are {height} and {width}; expected multiples of {factor}")
    rows, columns = height // factor, width // factor
    size = tokenizer(f"{rows}*{columns}", add_special_tokens=False)["input_ids"]
    layout = Layout(
        begin=tokenizer.boi_token_id,
        before=(*size, tokenizer.image_wrapper_token_id),
        rows=rows,
        columns=columns,
        row_end=known.eol_token_id,
        after=(tokenizer.eof_token_id, tokenizer.eoi_token_id),
        codes=torch.tensor(known.image_tokens),
    )

    @torch.no_grad()
    def read(path: Path) -> Tensor:
        fitted = ImageOps.fit(opened(path), (width, height), Image.Resampling.BICUBIC)
        found = processor.image_processor(fitted, do_resize=False, return_tensors="pt")
        pixels = found["pixel_values"].to(model.device)
        tokens = model.model.get_image_tokens(pixels, found["image_sizes"]).view(1, rows, columns + 1)
        return tokens[0, :, :-1].flatten().long().cpu()

    @torch.no_grad()
    def draw(codes: Tensor) -> Tensor:
        drawn = [_emu3_pixels(model, processor.image_processor, part, rows, columns) for part in codes.split(DECODED)]
        return torch.cat(drawn)

    return Pictures(layout, read, draw)


def _emu3_pixels(model: Emu3ForConditionalGeneration, processor: Any, codes: Tensor, rows: int, columns: int) -> Tensor:
    """(n, R C) ids -> (n, 3, H, W) float32 in [0, 1]."""
    found = model.vocabulary_mapping.bpe2img_mapping_tensor[codes.cpu()].long().view(-1, rows, columns)
    normal = model.model.vqmodel.decode(found.to(model.device)).float().cpu()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    return (normal * std + mean).clamp(0, 1)
