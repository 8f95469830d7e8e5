"""Tiny random vision-language models with their real processors that need no download, one row each.

record    what is known about a row, and how a prompt becomes inputs
parts     weights, tokenizers, chat templates, pictures and videos that the rows share
qwen      tokens follow the picture's size, positions have three parts
tiled     a picture is cut into tiles
whole     a picture is scaled to one size
more      Mistral 3, PaliGemma, Gemma 4
emu3      Emu3, which writes pictures as well
text      language models without pictures
"""

from pathlib import Path

from . import emu3, more, qwen, text, tiled, whole
from .record import Built, Prompt, TinyVLM

REQUIRED = (*qwen.REQUIRED, *tiled.REQUIRED, *whole.REQUIRED, *text.REQUIRED)
"""The table that every policy must pass."""

ADDITIONAL = (*qwen.ADDITIONAL, *tiled.ADDITIONAL, *more.ADDITIONAL, *text.ADDITIONAL, *emu3.ADDITIONAL)
"""Other caches, other processors."""

TINY_VLMS = (*REQUIRED, *ADDITIONAL)

NAMED = {row.name: row for row in TINY_VLMS}


def saved(name: str, folder: Path) -> Path:
    """The folder, in which model and processor of the row now lie as their library writes them."""
    model, processor = NAMED[name].build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


__all__ = ["ADDITIONAL", "NAMED", "REQUIRED", "TINY_VLMS", "Built", "Prompt", "TinyVLM", "saved"]
