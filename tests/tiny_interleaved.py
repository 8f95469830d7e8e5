"""A tiny random model that writes texts and images as tokens, as a prepared policy."""

from pathlib import Path

import torch
from tiny_vlms import NAMED
from tiny_vlms.policy import policy_of, prompts_of

from mmgrpo.types import Prompt
from pipelines.interleaved import InterleavedPolicy, Teaching, interleaved
from pipelines.picture_tokens import pictures_of
from pipelines.sampling import Sampling

EMU = "Emu3ForConditionalGeneration"
ROWS, COLUMNS = 2, 3  # codes of an image
LENGTH = 1 + 3 + 1 + ROWS * (COLUMNS + 1) + 2  # begin, "2*3", mark, rows with an end each, two ends
STEPS = 2 * LENGTH + 4


def tiny(
    folder: Path,
    *,
    text: Sampling | None = None,
    code: Sampling | None = None,
    images: int = 2,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **further: object,
) -> tuple[InterleavedPolicy, list[Prompt]]:
    """A prepared policy that often begins images, and prompts with one picture, another one, none and two."""
    words = policy_of(EMU, sampling=Sampling(STEPS), vision=False, **further)
    model = words.model.to(dtype)
    bias = torch.zeros(len(model.lm_head.weight), dtype=dtype)
    tokenizer = words.processor.tokenizer
    bias[tokenizer.boi_token_id], bias[tokenizer.eos_token_id] = 5, 4  # both come after a few words
    model.lm_head.bias = torch.nn.Parameter(bias)
    pictures = pictures_of(model, words.processor, 8 * ROWS, 8 * COLUMNS)
    policy = interleaved(
        words,
        pictures,
        text or Sampling(STEPS, temperature=1.3),
        code or Sampling(STEPS),
        images,
        scale,
        "low quality",
        Teaching(folder),
    )
    prompts = prompts_of(NAMED[EMU], folder)
    policy.prepare(prompts)
    return policy, prompts
