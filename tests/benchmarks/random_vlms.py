"""Qwen2.5-VL and Qwen3 models of random weights with their processors, and prompts of an exact number of tokens.

The end token lies outside of the models' vocabulary: no answer ends by itself, every one has all its tokens. Axes: L tokens
of a prompt.
"""

import itertools
import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mmgrpo.types import Prompt
from pipelines.answers import Answers, Options
from pipelines.conversation import Reader, Reading
from pipelines.sampling import Sampling
from pipelines.vlm import LanguagePolicy
from tests.tiny_vlms.parts import CHATML, byte_letters, chat, fresh, ids, picture, with_markers
from tests.tiny_vlms.qwen import IMAGE, PARTS, VIDEO
from tests.tiny_vlms.record import Built

MARKERS = ("<|im_start|>", "<|im_end|>", *PARTS)
END = "<|never|>"


@dataclass(frozen=True)
class Size:
    """The sizes of a model; both kinds share those of the language model."""

    vocabulary: int
    text: Mapping[str, int]
    vision: Mapping[str, Any]
    patch: int  # pixels of its side; 2 x 2 patches become one token


SMALLEST = Size(
    320, {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "fullatt_block_indexes": [1]}, patch=4,
)  # fmt: skip
FIVE_MILLION = Size(
    4096, {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "fullatt_block_indexes": [1]}, patch=14,
)  # fmt: skip
HUNDRED_MILLION = Size(
    8192, {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4},
    {"depth": 4, "hidden_size": 384, "intermediate_size": 1024, "num_heads": 6, "fullatt_block_indexes": [3]}, patch=14,
)  # fmt: skip
SIZES = {"smallest": SMALLEST, "5m": FIVE_MILLION, "100m": HUNDRED_MILLION}


def tokenizer(size: Size) -> Qwen2Tokenizer:
    """A token a byte, then three letters each, which only answers hold, and the special tokens; the last one is the end."""
    pieces, words = byte_letters("<|endoftext|>"), itertools.product(string.ascii_lowercase, repeat=3)
    count = size.vocabulary - len(pieces) - len(MARKERS)
    vocabulary = pieces | {"".join(word): len(pieces) + i for i, word in enumerate(itertools.islice(words, count))}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=None)
    made = with_markers(made, MARKERS)
    made.add_special_tokens({"eos_token": END})
    return made


def language(size: Size, tokens: Qwen2Tokenizer) -> dict[str, Any]:
    """Arguments of a language model's config."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": tokens.pad_token_id}
    return {**size.text, **ends, "vocab_size": len(tokens) - 1, "max_position_embeddings": 4096}


def seeing(size: Size) -> Built:
    """A Qwen2.5-VL model; one layer of its picture encoder sees whole pictures, the others windows of 4 x 4 tokens."""
    tokens, width = tokenizer(size), size.text["hidden_size"]
    eighth = width // size.text["num_attention_heads"] // 8
    rope = {"rope_type": "default", "mrope_section": [2 * eighth, eighth, eighth], "rope_theta": 1e4}
    vision = {**size.vision, "out_hidden_size": width, "patch_size": size.patch, "window_size": 8 * size.patch}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen2_5_VLConfig(
        text_config={**language(size, tokens), "rope_parameters": rope},
        vision_config=vision,
        **ids(tokens, **dict(zip(names, PARTS, strict=True))),
    )
    pixels = {"shortest_edge": 4 * size.patch**2, "longest_edge": 2**22}
    cut = {"patch_size": size.patch, "merge_size": 2, "size": pixels}
    parts = (Qwen2VLImageProcessor(**cut), tokens, Qwen2VLVideoProcessor(**cut))
    processor = Qwen2_5_VLProcessor(*parts, chat_template=chat(*CHATML, IMAGE, VIDEO))
    return Built(fresh(Qwen2_5_VLForConditionalGeneration, config), processor)


def reading(size: Size) -> Built:
    """A Qwen3 model, which reads text alone."""
    tokens = tokenizer(size)
    tokens.chat_template = chat(*CHATML)
    config = Qwen3Config(
        **language(size, tokens), head_dim=size.text["hidden_size"] // size.text["num_attention_heads"]
    )
    return Built(fresh(Qwen3ForCausalLM, config), tokens)


def policy(built: Built, new_tokens: int, replay_tokens: int) -> LanguagePolicy:
    """The model as a policy that trains all of it."""
    reader, options = Reader(built.processor, built.model, Reading()), Options(replay_tokens=replay_tokens)
    return LanguagePolicy(Answers(built.model, reader, Sampling(new_tokens), options), built.processor, vision=True)


def prompts(built: Built, size: Size, length: int, count: int, folder: Path) -> list[Prompt]:
    """Prompts of L tokens; for a model with eyes most are those of a picture, which is written to the folder."""
    reader, tall, wide = Reader(built.processor, built.model, Reading()), *tokens_of_picture(length)
    made = []
    for number in range(count):
        media = {}
        if built.processor is not built.tokenizer:
            path = folder / f"{length}_{number}.png"
            picture(number, 2 * size.patch * tall, 2 * size.patch * wide).save(path)
            media = {"image": (path,)}
        missing = length - reader.read(Prompt(number, "", media)).length
        letters = random.Random(number).choices(string.ascii_lowercase, k=missing)
        made.append(Prompt(number, "".join(letters), media))
    return made


def tokens_of_picture(length: int) -> tuple[int, int]:
    """Height and width of a picture in tokens, which leave at least 36 of a prompt's for the chat."""
    side = int((length - 36) ** 0.5)
    return side, (length - 36) // side
