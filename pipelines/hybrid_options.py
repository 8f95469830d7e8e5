"""How a hybrid policy makes, reads and learns answers, and its marks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pipelines.hybrid_writing import Marks


@dataclass(frozen=True)
class Options:
    """How answers are made and read."""

    temperature: float = 1.0  # logits are divided by it
    rollout_rows: int = 64  # answers written at once
    replay_rows: int = 16  # answers whose graphs are held at once
    replay_steps: int | None = None  # denoising steps of each answer whose graphs are held at once; None: all
    chat: bool = False  # prompts go through the tokenizer's chat template
    text_weight: float = 1.0  # of a lesson's loss of tokens
    image_weight: float = 5.0  # of a lesson's loss of velocities; Transfusion's lambda (arXiv 2408.11039, section 4.1)
    noises: int = 1  # noisy versions of each image in a lesson
    media: Path = Path()  # where the images lie that a lesson names
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("rollout_rows", "replay_rows", "noises"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"policy.temperature is {self.temperature}; expected a positive number")


def marks_of(tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str]) -> Marks:
    """The marks' token ids; raises ValueError if one is not a single token."""
    ids = {}
    for key in ("start", "end", "stop"):
        found = tokenizer.convert_tokens_to_ids(names[key]) if key in names else None
        if found is None or found == tokenizer.unk_token_id:
            raise ValueError(f"marks.{key} is {names.get(key)!r}; expected a token of the vocabulary")
        ids[key] = found
    return Marks(ids["start"], ids["end"], (ids["stop"],))
