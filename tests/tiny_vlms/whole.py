"""Models that scale every picture to one size: LLaVA, Gemma 3."""

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from .parts import DECODER, ENCODER, chat, fresh, gemma_tokenizer, ids, llama_tokenizer, vocabulary
from .record import Built, TinyVLM

GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
GEMMA_CHAT = ("<start_of_turn>ROLE\n", "<end_of_turn>\n", "<start_of_turn>model\n")


def llava() -> Built:
    """CLIP's features before the last layer without the class token: 3 x 3 tokens a picture."""
    tokenizer = llama_tokenizer(image_token="<image>")
    config = LlavaConfig(
        text_config={"model_type": "llama", **DECODER, **vocabulary(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **ENCODER, "image_size": 24, "patch_size": 8},
        image_seq_length=9,
        **ids(tokenizer, image_token_index="<image>"),
    )
    pictures = LlavaImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    sizes = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = chat("ROLE: ", "\n", "assistant:", image="<image>\n", begin=True)
    processor = LlavaProcessor(pictures, tokenizer, **sizes, chat_template=template)
    return Built(fresh(LlavaForConditionalGeneration, config), processor)


def gemma3() -> Built:
    """One layer looks back 8 tokens, the other at everything; image tokens of a picture see each other."""
    tokenizer = gemma_tokenizer("<start_of_turn>", "<end_of_turn>", **GEMMA)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    text = {**DECODER, **layers, "head_dim": 16, "query_pre_attn_scalar": 16, **vocabulary(tokenizer)}
    config = Gemma3Config(
        text_config={"model_type": "gemma3_text", **text},
        vision_config={"model_type": "siglip_vision_model", **ENCODER, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        **ids(tokenizer, **{name.replace("token", "token_index"): token for name, token in GEMMA.items()}),
    )
    pictures = Gemma3ImageProcessor(size={"height": 16, "width": 16})
    template = chat(*GEMMA_CHAT, image=GEMMA["boi_token"], begin=True)
    processor = Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=4)
    return Built(fresh(Gemma3ForConditionalGeneration, config), processor)


REQUIRED = (
    TinyVLM("LlavaForConditionalGeneration", llava, required=True),
    TinyVLM("Gemma3ForConditionalGeneration", gemma3, required=True),
)
