"""Qwen's vision-language models: a number of image tokens that follows the picture's size, three-part positions."""

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from .parts import CHATML, DECODER, WIDTH, byte_letters, chat, fresh, ids, qwen_tokenizer, vocabulary, with_markers
from .record import Built, TinyVLM

PATCH = 4
"""Pixels of a patch's side; 2 x 2 patches become one token."""

SIZE = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
"""Fewest and most pixels of a picture: 4 to 16 tokens."""

PARTS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 4,
    "out_hidden_size": WIDTH,
    "patch_size": PATCH,
}


def text_config(**rope: object) -> dict[str, object]:
    positions = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, **rope}
    return {**DECODER, **vocabulary(qwen_tokenizer(*PARTS)), "rope_parameters": positions}


def vision_ids() -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return ids(qwen_tokenizer(*PARTS), **dict(zip(names, PARTS, strict=True)))


def pictures() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(patch_size=PATCH, merge_size=2, size=SIZE)


def frames(shortest: int = 1) -> dict[str, object]:
    """Arguments of a video processor; some count the pixels of a frame, some those of all 8 frames."""
    sizes = {name: shortest * pixels for name, pixels in SIZE.items()}
    return {"patch_size": PATCH, "merge_size": 2, "size": sizes, "cap_pixels_per_frame": False}


def qwen2_vl() -> Built:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2, "num_heads": 4, "patch_size": PATCH}
    config = Qwen2VLConfig(text_config=text_config(), vision_config=vision, **vision_ids())
    parts = (pictures(), qwen_tokenizer(*PARTS), Qwen2VLVideoProcessor(**frames()))
    processor = Qwen2VLProcessor(*parts, chat_template=chat(*CHATML, IMAGE, VIDEO))
    return Built(fresh(Qwen2VLForConditionalGeneration, config), processor)


def qwen2_5_vl() -> Built:
    """Times of a video's frames are positions; one layer of the encoder sees windows of 2 x 2 tokens."""
    vision = {**VISION, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=text_config(), vision_config=vision, **vision_ids())
    parts = (pictures(), qwen_tokenizer(*PARTS), Qwen2VLVideoProcessor(**frames()))
    processor = Qwen2_5_VLProcessor(*parts, chat_template=chat(*CHATML, IMAGE, VIDEO))
    return Built(fresh(Qwen2_5_VLForConditionalGeneration, config), processor)


def qwen3_vl() -> Built:
    """Times of a video's frames are words; the encoder's first layer is added to the decoder's first."""
    vision = {**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {**text_config(mrope_interleaved=True), "head_dim": 16}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **vision_ids())
    parts = (pictures(), qwen_tokenizer(*PARTS), Qwen3VLVideoProcessor(**frames(8)))
    processor = Qwen3VLProcessor(*parts, chat_template=chat(*CHATML, IMAGE, "<|video_pad|>"))
    return Built(fresh(Qwen3VLForConditionalGeneration, config), processor)


def qwen3_5() -> Built:
    """One layer keeps a state of fixed size in the place of keys and values."""
    vision = {**VISION, "num_position_embeddings": 64}
    rope = {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, **linear}
    text = {**text_config(**rope), **sizes, "layer_types": ["linear_attention", "full_attention"]}
    config = Qwen3_5Config(text_config=text, vision_config=vision, **vision_ids())
    tokenizer = Qwen3_5Tokenizer(vocab=byte_letters("<|endoftext|>"), merges=[], eos_token="<|im_end|>")
    tokenizer = with_markers(tokenizer, ("<|im_start|>", *PARTS))
    parts = (pictures(), tokenizer, Qwen3VLVideoProcessor(**frames(8)))
    processor = Qwen3VLProcessor(*parts, chat_template=chat(*CHATML, IMAGE, "<|video_pad|>"))
    return Built(fresh(Qwen3_5ForConditionalGeneration, config), processor)


REQUIRED = (
    TinyVLM("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, videos=True, required=True),
    TinyVLM("Qwen3VLForConditionalGeneration", qwen3_vl, videos=True, required=True),
)

ADDITIONAL = (
    TinyVLM("Qwen2VLForConditionalGeneration", qwen2_vl, videos=True),
    TinyVLM("Qwen3_5ForConditionalGeneration", qwen3_5, videos=True, repeats=False),
)
