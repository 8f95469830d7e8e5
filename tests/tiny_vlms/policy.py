"""A tiny model as a policy, and prompts for it as rows of a data set, with pictures as files."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgrpo.data import requests
from mmgrpo.types import Batch, Prompt
from pipelines.answers import Answers, Options
from pipelines.conversation import Reader, Reading
from pipelines.sampling import Sampling
from pipelines.vlm import LanguagePolicy

from . import NAMED, TinyVLM

WORDS = ("How many red circles?", "What is this? Say it in a few words.", "Tell me.", "Which of the two?")


def picture(path: Path, height: int, width: int, seed: int) -> Path:
    """A file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def prompts_of(row: TinyVLM, folder: Path) -> list[Prompt]:
    """Prompts of different length: with one picture, with another one, with none and with two, as far as the row takes them."""
    if not row.pictures:
        return [Prompt(number, text) for number, text in enumerate(WORDS)]
    one, other = picture(folder / "one.png", 16, 16, 0), picture(folder / "other.png", 24, 32, 1)
    media: list[tuple[Path, ...]] = [(one,), (other,), (), (one, other)]
    prompts = [
        Prompt(number, text, {"image": paths} if paths else {})
        for number, (text, paths) in enumerate(zip(WORDS, media, strict=True))
    ]
    return [prompt for prompt in prompts if prompt.media or row.bare]


def policy_of(
    name: str,
    *,
    sampling: Sampling | None = None,
    reading: Reading | None = None,
    options: Options | None = None,
    **further: Any,
) -> LanguagePolicy:
    """The row as a policy that is not prepared yet, every weight trained."""
    model, processor = NAMED[name].build()
    reader = Reader(processor, model, reading or Reading())
    answers = Answers(model, reader, sampling or Sampling(8), options or Options())
    return LanguagePolicy(answers, processor, **{"vision": True} | further)


def batch_of(prompts: list[Prompt], group_size: int = 3, seed: int = 0) -> Batch:
    """`group_size` answers to each prompt."""
    return requests(prompts, range(len(prompts)), group_size=group_size, seed=seed, iteration=0)
