"""ImageReward on the BLIP encoders of transformers, with the published weights under their published names.

The package image-reward needs transformers and diffusers of 2024; its network does not. Left out: the training code and
the ranking call. Axes: b samples at a time, D image features, D' text features.
"""

import math
import re
from collections.abc import Mapping
from functools import partial

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgrpo.types import Prompt
from rewards.image import DTYPES, Precision, linear_head, pick
from rewards.pictures import PictureReward, score_pictures

VISION_NAMES = {  # the published name of a weight -> its name in transformers, the first that fits
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.(\d+)\.norm([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
    r"^norm\.": "post_layernorm.",
}
HEAD_WIDTH = 64  # features of one attention head, in both encoders
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of the published model's raw scores


def beneath(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under a prefix, named from there on."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def renamed(name: str) -> str:
    for published, ours in VISION_NAMES.items():
        name, found = re.subn(published, ours, name)
        if found:
            break
    return name


def blip_vision(weights: Mapping[str, Tensor]) -> BlipVisionModel:
    """BLIP's image encoder with the sizes that its published weights have."""
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("attn.qkv.weight") for name in weights),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(weights["pos_embed"].shape[1] - 1) * patch,  # one position is the class token's
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict({renamed(name): value for name, value in weights.items()})
    return model


def blip_text(weights: Mapping[str, Tensor]) -> BlipTextModel:
    """BLIP's text encoder with cross-attention to the image, with the sizes that its published weights have."""
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("intermediate.dense.weight") for name in weights),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # what builds the cross-attention; the call itself attends in both directions
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    buffers = ("embeddings.position_ids",)  # in the published file, 0, 1, 2, ...: no weight
    model.load_state_dict({name: value for name, value in weights.items() if name not in buffers})
    return model


def image_reward(
    *,
    checkpoint: str,
    tokenizer: str = "google-bert/bert-base-uncased",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """ImageReward: (head(first text state, having attended to the image) - 0.167) / 1.033; typically -2.3 to 2.

    Source: Xu et al. 2023 (arXiv 2304.05977) as in its published code; text cut at 35 tokens. `checkpoint` is the published
    ImageReward.pt as safetensors (rewards/README.md tells how to convert it). Encoders in `dtype`, the head in float32.
    NaN: an image with a pixel that is not finite, or a score that is not.
    """
    pick("dtype", dtype, DTYPES)
    published = load_file(checkpoint)
    vision = blip_vision(beneath("blip.visual_encoder.", published)).eval().to(device, DTYPES[dtype])
    text = blip_text(beneath("blip.text_encoder.", published)).eval().to(device, DTYPES[dtype])
    head = linear_head(beneath("mlp.", published), checkpoint).to(device)
    size = vision.config.image_size
    process = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)  # CLIP's constants, as published
    tokenize = BertTokenizer.from_pretrained(tokenizer)

    def score(pictures: list[Image.Image], prompts: list[Prompt]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        tokens = tokenize(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt").to(device)
        pixels = process(images=pictures, return_tensors="pt")["pixel_values"].to(device, DTYPES[dtype])
        seen = vision(pixel_values=pixels).last_hidden_state  # (b, patches + 1, D)
        read = text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state  # (b, 35, D')
        raw: Tensor = head(read[:, 0].float())[:, 0]
        return (raw - REWARD_MEAN) / REWARD_STD

    return partial(score_pictures, score=score, batch=batch)
