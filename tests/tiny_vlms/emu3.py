"""Emu3: pictures are tokens of the vocabulary, in prompts and in answers."""

from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    GPT2Tokenizer,
)

from .parts import CHATML, DECODER, byte_letters, chat, fresh, vocabulary, with_markers
from .record import Built, TinyVLM

NAMED_TOKENS = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
CODES = tuple(f"<|visual token {number:06d}|>" for number in range(12))
ENCODER = {
    "codebook_size": len(CODES),
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [3],
    "hidden_size": 32,
}
"""Sizes of the tokenizer of pictures: 8 pixels a code each way, as the processor expects."""


def tokenizer() -> GPT2Tokenizer:
    """0 pads; the codes of pictures are the last tokens, as in the published one."""
    options = {"pad_token": "<|endoftext|>", "eos_token": "<|extra_204|>", "bos_token": "<|extra_203|>"}
    letters = byte_letters("<|endoftext|>")
    made = GPT2Tokenizer(vocab=letters, merges=[], extra_special_tokens=NAMED_TOKENS, **options)
    return with_markers(made, ("<|extra_200|>", "<|im_start|>", "<|im_end|>", *CODES))


def emu3() -> Built:
    words = tokenizer()
    special = {token: number for token, number in words.get_vocab().items() if token.startswith("<") and token != "<"}
    text = {**DECODER, **vocabulary(words), "attention_dropout": 0.0}
    config = Emu3Config(vq_config=ENCODER, text_config=text, vocabulary_map=special)
    pictures = Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=32 * 32)
    template = chat(*CHATML, image="<image>")  # the processor begins every text
    return Built(fresh(Emu3ForConditionalGeneration, config), Emu3Processor(pictures, words, chat_template=template))


ADDITIONAL = (TinyVLM("Emu3ForConditionalGeneration", emu3),)
