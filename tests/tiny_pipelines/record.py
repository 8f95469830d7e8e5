"""One tiny random pipeline: how to build it, how to call it quickly, and what is known about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

PROMPTS = ("three blue squares", "a red circle on sand", "rain over a green hill")
"""Of different lengths, so that padding and masks are exercised."""


OUTPUT = {"image": "images", "video": "frames", "audio": "audios"}
"""Where a pipeline's output holds its media."""


class Guidance(NamedTuple):
    """Call arguments that switch classifier-free guidance (or the distilled guidance input) on and off."""

    on: Mapping[str, object]
    off: Mapping[str, object]


def no_media(row: int) -> dict[str, object]:
    """What a pipeline without conditioning media takes for a row."""
    return {}


@dataclass(frozen=True, eq=False)
class TinyPipeline:
    """One row of the table."""

    name: str
    build: Callable[[], DiffusionPipeline]  # deterministic, float32, every module in eval mode
    call: Mapping[str, object]  # arguments of every call: 4 steps, a small size, output_type="pt"
    denoisers: tuple[str, ...]  # components that a 4-step call runs inside its loop
    kind: Literal["image", "video", "audio"] = "image"
    guidance: Guidance | None = None  # None: the pipeline has none
    prompts: tuple[object, ...] = PROMPTS
    prompt_key: str | None = "prompt"  # the name of the prompt argument; None: unconditional
    media: Callable[[int], dict[str, object]] = no_media  # conditioning inputs of row i
    counted: bool = False  # the number of rows is the argument batch_size
    batched: bool = True  # a list of prompts with one generator per row works
    required: bool = False  # named in the parity table
    unused: tuple[str, ...] = ()  # parts of names of denoiser parameters that no output of the denoiser depends on
    precise: tuple[str, ...] = ()  # components that the pipeline hands float32, whatever the others compute in
    differentiable: bool = True  # False: the denoiser computes a part of its output without gradient in eval mode

    def rows(self, rows: Sequence[int], seeds: Sequence[int], guided: bool = False) -> dict[str, object]:
        """Arguments of one call that makes the given rows, each with the generator of its seed."""
        count = len(rows)
        media = [self.media(row) for row in rows]
        collated = {key: _collate([row[key] for row in media]) for key in media[0]}
        texts = {key: [text] * count if isinstance(text, str) else text for key, text in self.switch(guided).items()}
        prompts = {} if self.prompt_key is None else {self.prompt_key: [self.prompts[row] for row in rows]}
        size = {"batch_size": count} if self.counted else {}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {**self.call, **texts, **prompts, **size, **collated, "generator": generators}

    def row(self, row: int, seed: int, guided: bool = False) -> dict[str, object]:
        """Arguments of one call that makes one row, the way a user types it: no lists."""
        text = self.prompts[row]
        prompt = {} if self.prompt_key is None else {self.prompt_key: text if isinstance(text, str) else [text]}
        generator = torch.Generator().manual_seed(seed)
        return {**self.call, **self.switch(guided), **prompt, **self.media(row), "generator": generator}

    def switch(self, guided: bool) -> Mapping[str, object]:
        """The arguments that switch guidance on or off; empty for a pipeline that has none."""
        if self.guidance is None:
            return {}
        return self.guidance.on if guided else self.guidance.off

    def run(self, pipeline: DiffusionPipeline, arguments: Mapping[str, object]) -> Tensor:
        """The first output of one call (images, frames or audio), leading with the batch."""
        with torch.no_grad():
            return torch.as_tensor(pipeline(**arguments)[OUTPUT[self.kind]])


def _collate(values: list[object]) -> object:
    """Tensors are joined along the batch axis, everything else becomes a list."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.cat(tensors) if len(tensors) == len(values) else values
