"""Shared parts of the tiny vision-language models: weights, tokenizers from bytes, chat templates, pictures and videos.

Nothing is read from outside; every tokenizer has one token per byte and gives back any text it is given.
"""

import json
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Generator
from transformers import (
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

WIDTH = 64
"""Features of every decoder: 4 heads of 16, which share 2 heads of keys and values."""

DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
"""Sizes of every decoder with attention."""

ENCODER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Sizes of the picture encoders with the usual names."""

Model = TypeVar("Model", bound=PreTrainedModel)


@torch.no_grad()
def fresh(model: Callable[..., Model], config: object, seed: int = 0) -> Model:
    """A float32 model in eval mode whose outputs depend visibly on every input, the same for every call.

    Matrices have the scale that keeps the size of activations, also those that their class starts at zero; vectors are
    small, except scales of norms, which stay 1. The global random state is neither read nor moved.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = model(config)
    generator = Generator().manual_seed(seed)
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(draw * (parameter.shape[0] / parameter.numel()) ** 0.5)
        elif not bool((parameter == 1).all()):
            parameter.copy_(draw * 0.1)
    return module.eval()


def picture(row: int, height: int = 16, width: int = 16) -> Image.Image:
    """A picture of coloured noise, another one for every row."""
    generator = Generator().manual_seed(1000 + row)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")


def video(row: int, frames: int = 8, size: int = 16) -> np.ndarray:
    """Frames of coloured noise, (F, H, W, 3) uint8, others for every row."""
    generator = Generator().manual_seed(2000 + row)
    return torch.randint(0, 256, (frames, size, size, 3), generator=generator, dtype=torch.uint8).numpy()


def byte_letters(*special: str) -> dict[str, int]:
    """The special tokens from 0 on, then the letters that stand for the 256 bytes."""
    return {piece: i for i, piece in enumerate([*special, *sorted(ByteLevel.alphabet())])}


def byte_pieces(*special: str) -> dict[str, int]:
    """The special tokens from 0 on, then the mark of a space, then the 256 bytes that all other letters become."""
    return {piece: i for i, piece in enumerate([*special, "▁", *(f"<0x{code:02X}>" for code in range(256))])}


def qwen_tokenizer(*special: str, **named: str) -> Qwen2Tokenizer:
    """0 pads, the end of a turn ends; the named special tokens are attributes of the tokenizer."""
    options = {"eos_token": "<|im_end|>", "extra_special_tokens": named}
    tokenizer = Qwen2Tokenizer(vocab=byte_letters("<|endoftext|>"), merges=[], **options)
    return with_markers(tokenizer, ("<|im_start|>", *special))


def gpt2_tokenizer(end: str, *special: str) -> GPT2Tokenizer:
    """0 pads and begins, the given token ends."""
    options = {"pad_token": "<|endoftext|>", "eos_token": end}
    return with_markers(GPT2Tokenizer(vocab=byte_letters("<|endoftext|>"), merges=[], **options), special)


def llama_tokenizer(*special: str, **named: str) -> LlamaTokenizer:
    """0 is unknown, 1 begins every text unless told otherwise, 2 ends, 3 pads; no space is put before a text."""
    pieces = byte_pieces("<unk>", "<s>", "</s>", "<pad>")
    options = {"pad_token": "<pad>", "add_prefix_space": False, "add_bos_token": True, "extra_special_tokens": named}
    return with_markers(LlamaTokenizer(vocab=pieces, merges=[], **options), special)


def gemma_tokenizer(*special: str, **named: str) -> GemmaTokenizer:
    """0 pads, 1 ends, 2 begins every text unless told otherwise, 3 is unknown."""
    pieces = byte_pieces("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    options = {"add_bos_token": True, "extra_special_tokens": named}
    return with_markers(GemmaTokenizer(vocab=pieces, merges=[], **options), special)


def with_markers(tokenizer: PreTrainedTokenizerFast, markers: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """The tokenizer with further special tokens, padding on the left as generation wants it."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(markers)}, replace_extra_special_tokens=False)
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 4096
    return tokenizer


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """Arguments of a language model's config: how many tokens there are, and which begin, end and pad."""
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"vocab_size": len(tokenizer), **marks, "pad_token_id": tokenizer.pad_token_id}


def ids(tokenizer: PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    """Arguments of a config: the number of each token."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def chat(turn: str, end: str, reply: str, image: str = "", video: str = "", begin: bool = False) -> str:
    """A chat template; `turn` and `reply` open a message, in `turn` the word ROLE stands for whose it is.

    A message's content is a text, or a list of blocks of the types text, image and video.
    """
    opened = "{{ message['role'] }}".join(literal(part) for part in turn.split("ROLE"))
    block = (
        "{% if block['type'] == 'text' %}{{ block['text'] }}"
        f"{{% elif block['type'] == 'image' %}}{literal(image)}"
        f"{{% elif block['type'] == 'video' %}}{literal(video)}{{% endif %}}"
    )
    content = (
        "{% if message['content'] is string %}{{ message['content'] }}"
        f"{{% else %}}{{% for block in message['content'] %}}{block}{{% endfor %}}{{% endif %}}"
    )
    start = "{{ bos_token }}" if begin else ""
    messages = f"{{% for message in messages %}}{opened}{content}{literal(end)}{{% endfor %}}"
    return f"{start}{messages}{{% if add_generation_prompt %}}{literal(reply)}{{% endif %}}"


def literal(text: str) -> str:
    """The text as a template writes it out; bare, a line break after a tag would be lost."""
    return f"{{{{ {json.dumps(text)} }}}}"


CHATML = ("<|im_start|>ROLE\n", "<|im_end|>\n", "<|im_start|>assistant\n")
"""Opening of a turn, its end, and the opening of a reply, as Qwen and others write them."""
