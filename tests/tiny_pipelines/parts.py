"""Shared parts of the tiny pipelines: tokenizers from vocabularies made in code, text encoders, VAEs, pictures.

Every text encoder has 32 features, every vocabulary the 256 bytes and a few special tokens; nothing is read from outside.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 32
"""Features of every text encoder."""

Module = TypeVar("Module", bound=nn.Module)

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@torch.no_grad()
def randomised(module: Module, seed: int = 0) -> Module:
    """The module in eval mode with every weight drawn anew, so that layers which start at zero let gradients through.

    Matrices have the scale that keeps the size of activations; vectors are small, except scales of norms, which stay 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(draw * (parameter.shape[0] / parameter.numel()) ** 0.5)
        elif not bool((parameter == 1).all()):
            parameter.copy_(draw * 0.1)
    return module.eval()


def fresh(model: Callable[..., Module], *arguments: object, seed: int = 0, **config: object) -> Module:
    """A randomised module whose construction neither reads nor moves the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomised(model(*arguments, **config), seed)


def picture(row: int, size: int = 32) -> Image.Image:
    """A picture of coloured noise, another one for every row."""
    generator = torch.Generator().manual_seed(1000 + row)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")


def _letters() -> list[str]:
    return [chr(code) for code in range(33, 127)]


def _bytes_vocabulary(*special: str, suffix: str = "") -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    return {
        piece: i for i, piece in enumerate([*special, *letters, *([x + suffix for x in letters] if suffix else [])])
    }


def clip_tokenizer() -> CLIPTokenizer:
    """One token per letter; 0 pads, 1 begins, 2 ends."""
    vocabulary = _bytes_vocabulary("<pad>", "<|startoftext|>", "<|endoftext|>", suffix="</w>")
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", model_max_length=77)


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=515,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def clip_text(seed: int = 0) -> CLIPTextModel:
    return fresh(CLIPTextModel, _clip_config(), seed=seed)


def clip_text_projected(seed: int = 0) -> CLIPTextModelWithProjection:
    return fresh(CLIPTextModelWithProjection, _clip_config(), seed=seed)


def clip_vision(seed: int = 0, size: int = 32) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    return fresh(CLIPVisionModelWithProjection, config, seed=seed)


def clip_pictures() -> CLIPImageProcessor:
    return CLIPImageProcessor(size=32, crop_size=32)


def t5_tokenizer() -> T5TokenizerFast:
    """One token per letter; 0 pads, 1 ends, 2 is unknown."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *_letters()]
    return T5TokenizerFast(vocab=[(piece, -float(i > 2)) for i, piece in enumerate(pieces)], extra_ids=0)


def _t5_sizes() -> dict[str, int]:
    return {"vocab_size": 128, "d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2, "num_heads": 4}


def t5(seed: int = 0) -> T5EncoderModel:
    return fresh(T5EncoderModel, T5Config(**_t5_sizes()), seed=seed)


def umt5(seed: int = 0) -> UMT5EncoderModel:
    return fresh(UMT5EncoderModel, UMT5Config(**_t5_sizes()), seed=seed)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per byte; 0 pads and ends."""
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = Qwen2Tokenizer(vocab=_bytes_vocabulary("<|endoftext|>"), merges=[], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = CHAT
    return tokenizer


def _decoder_sizes() -> dict[str, int]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "head_dim": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def qwen3(seed: int = 0) -> Qwen3Model:
    return fresh(Qwen3Model, Qwen3Config(**_decoder_sizes()), seed=seed)


def qwen3_causal(seed: int = 0) -> Qwen3ForCausalLM:
    return fresh(Qwen3ForCausalLM, Qwen3Config(**_decoder_sizes()), seed=seed)


def qwen_vision_language(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    ids = {token: qwen_tokenizer().convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|video_pad|>")}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**_decoder_sizes(), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=qwen_tokenizer().convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=qwen_tokenizer().convert_tokens_to_ids("<|vision_end|>"),
    )
    return fresh(Qwen2_5_VLForConditionalGeneration, config, seed=seed)


def qwen_processor() -> Qwen2VLProcessor:
    pictures = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return Qwen2VLProcessor(pictures, qwen_tokenizer(), Qwen2VLVideoProcessor(), chat_template=CHAT)


def gemma_tokenizer() -> GemmaTokenizer:
    """One token per letter; unknown ones become bytes."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    pieces = [*special, "▁", *_letters(), *(f"<0x{code:02X}>" for code in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocabulary, merges=[], padding_side="right", model_max_length=300)


def gemma2(seed: int = 0) -> Gemma2Model:
    return fresh(Gemma2Model, Gemma2Config(**_decoder_sizes()), seed=seed)


def image_vae(channels: int = 4, seed: int = 0, **options: object) -> AutoencoderKL:
    """Halves the picture once; latents have the given number of channels."""
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 32, "latent_channels": channels}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return fresh(AutoencoderKL, **sizes, **blocks, **options, seed=seed)


def llama_tokenizer() -> LlamaTokenizer:
    """One token per letter; 0 is unknown, 1 begins, 2 ends."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "<pad>", "▁", *_letters()])}
    return LlamaTokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", model_max_length=512)


def llama(seed: int = 0) -> LlamaModel:
    return fresh(LlamaModel, LlamaConfig(**_decoder_sizes()), seed=seed)


def llama_causal(seed: int = 0) -> LlamaForCausalLM:
    return fresh(LlamaForCausalLM, LlamaConfig(**_decoder_sizes(), attn_implementation="eager"), seed=seed)


def glm(seed: int = 0) -> GlmModel:
    return fresh(GlmModel, GlmConfig(**_decoder_sizes(), pad_token_id=0), seed=seed)


def bert_tokenizer() -> BertTokenizer:
    """One token per letter; 0 pads."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_letters(), *(f"##{letter}" for letter in _letters())]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=77)


def bert(seed: int = 0) -> BertModel:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return fresh(BertModel, BertConfig(vocab_size=256, **sizes), seed=seed)
