"""Further models: pictures of their own shape in rows of tokens, prompts that see themselves, audio beside pictures."""

from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    SiglipImageProcessor,
)

from .parts import DECODER, ENCODER, WIDTH, chat, fresh, gemma_tokenizer, ids, llama_tokenizer, vocabulary
from .record import Built, TinyVLM

GEMMA4 = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def mistral3() -> Built:
    """2 x 2 patches become a token; a picture keeps its shape, each row of its tokens ends with a break."""
    tokenizer = llama_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]")
    text = {"model_type": "mistral", **DECODER, "head_dim": 16, "sliding_window": None}
    config = Mistral3Config(
        text_config={**text, **vocabulary(tokenizer)},
        vision_config={"model_type": "pixtral", **ENCODER, "image_size": 32, "patch_size": 4},
        spatial_merge_size=2,
        tie_word_embeddings=False,
        **ids(tokenizer, image_token_index="[IMG]"),
    )
    pictures = PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4)
    template = chat("[INST]ROLE: ", "[/INST]", "", image="[IMG]", begin=True)
    processor = PixtralProcessor(pictures, tokenizer, patch_size=4, spatial_merge_size=2, chat_template=template)
    return Built(fresh(Mistral3ForConditionalGeneration, config), processor)


def paligemma() -> Built:
    """The whole prompt sees itself in both directions; it must begin with a picture; 2 x 2 tokens."""
    tokenizer = gemma_tokenizer(image_token="<image>")
    pictures = SiglipImageProcessor(size={"height": 16, "width": 16})
    pictures.image_seq_length = 4
    processor = PaliGemmaProcessor(pictures, tokenizer, chat_template=chat("", "", "", image="<image>"))
    vision = {"model_type": "siglip_vision_model", **ENCODER, "image_size": 16, "patch_size": 8}
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **DECODER, "head_dim": 16, **vocabulary(tokenizer)},
        vision_config={**vision, "vision_use_head": False},
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        **ids(tokenizer, image_token_index="<image>"),
    )
    return Built(fresh(PaliGemmaForConditionalGeneration, config), processor)


def gemma4() -> Built:
    """Logits are capped; per-layer embeddings; the last layer reads the keys of the one before; at most 70 tokens."""
    tokenizer = gemma_tokenizer("<|turn>", "<turn|>", "<|video|>", **GEMMA4)
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "sliding_window": 8}
    text = {**DECODER, **sizes, "layer_types": layers, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    numbers = {f"{name}_id": token for name, token in GEMMA4.items() if name != "eoa_token"}
    config = Gemma4Config(
        text_config={
            **text,
            **vocabulary(tokenizer),
            "vocab_size_per_layer_input": len(tokenizer),
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 2.0,
        },
        vision_config={
            **ENCODER,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 80,
        },
        audio_config=None,
        **ids(tokenizer, **numbers, video_token_id="<|video|>", eoa_token_index="<audio|>"),
    )
    frames = Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70)
    parts = (Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70), tokenizer, frames)
    template = chat("<|turn>ROLE\n", "<turn|>\n", "<|turn>model\n", "<|image|>", "<|video|>", begin=True)
    processor = Gemma4Processor(*parts, chat_template=template)
    return Built(fresh(Gemma4ForConditionalGeneration, config), processor)


ADDITIONAL = (
    TinyVLM("Mistral3ForConditionalGeneration", mistral3),
    TinyVLM("PaliGemmaForConditionalGeneration", paligemma, bare=False, reply_type=1),
    TinyVLM("Gemma4ForConditionalGeneration", gemma4, videos=True),
)
