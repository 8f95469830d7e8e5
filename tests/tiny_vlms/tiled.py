"""Models that cut a picture into tiles of one size and add the whole picture once more: SmolVLM, Idefics3, InternVL."""

from transformers import (
    GotOcr2ImageProcessor,
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from .parts import CHATML, DECODER, ENCODER, chat, fresh, gpt2_tokenizer, ids, qwen_tokenizer, vocabulary
from .record import Built, TinyVLM

TILE = 16
"""Pixels of a tile's side."""

SMOL = ("<fake_token_around_image>", "<image>", "<global-img>", "<video>", "<|im_start|>")
SMOL_CHAT = ("<|im_start|>ROLE: ", "<end_of_utterance>\n", "assistant:")
SMOL_TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))

INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


SIZES = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}


def idefics_parts(tokenizer: GPT2Tokenizer) -> dict[str, object]:
    """A config: a tile is 2 x 2 patches that become one token; a square picture is four tiles and the whole."""
    return {
        "text_config": {"model_type": "llama", **DECODER, **vocabulary(tokenizer)},
        "vision_config": {**ENCODER, "image_size": TILE, "patch_size": TILE // 2},
        "scale_factor": 2,
        **ids(tokenizer, image_token_id="<image>"),
    }


def smolvlm() -> Built:
    tokenizer = gpt2_tokenizer("<end_of_utterance>", *SMOL, *SMOL_TILES)
    sampling = {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": TILE}}
    videos = SmolVLMVideoProcessor(max_image_size={"longest_edge": TILE}, video_sampling=sampling)
    parts = (SmolVLMImageProcessor(**SIZES), tokenizer, videos)
    processor = SmolVLMProcessor(*parts, image_seq_len=1, chat_template=chat(*SMOL_CHAT, "<image>", "<video>"))
    return Built(fresh(SmolVLMForConditionalGeneration, SmolVLMConfig(**idefics_parts(tokenizer))), processor)


def idefics3() -> Built:
    tokenizer = gpt2_tokenizer("<end_of_utterance>", *SMOL, *SMOL_TILES)
    parts = (Idefics3ImageProcessor(**SIZES), tokenizer)
    processor = Idefics3Processor(*parts, image_seq_len=1, chat_template=chat(*SMOL_CHAT, "<image>"))
    return Built(fresh(Idefics3ForConditionalGeneration, Idefics3Config(**idefics_parts(tokenizer))), processor)


def internvl() -> Built:
    """A tile is 4 x 4 patches that become 4 tokens; a square picture is one tile, a wide one two and the whole."""
    tokenizer = qwen_tokenizer(**INTERN)
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **DECODER, **vocabulary(tokenizer)},
        vision_config={**ENCODER, "image_size": [TILE, TILE], "patch_size": [TILE // 4, TILE // 4]},
        image_seq_length=4,
        **ids(tokenizer, image_token_id=INTERN["context_image_token"]),
    )
    size = {"height": TILE, "width": TILE}
    pictures = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=2)
    videos = InternVLVideoProcessor(size=size)
    template = chat(*CHATML, INTERN["context_image_token"] + "\n", INTERN["video_token"] + "\n")
    processor = InternVLProcessor(pictures, tokenizer, videos, image_seq_length=4, chat_template=template)
    return Built(fresh(InternVLForConditionalGeneration, config), processor)


REQUIRED = (
    TinyVLM("SmolVLMForConditionalGeneration", smolvlm, videos=True, required=True),
    TinyVLM("InternVLForConditionalGeneration", internvl, videos=True, required=True),
)

ADDITIONAL = (TinyVLM("Idefics3ForConditionalGeneration", idefics3),)
