"""Cascades: a prior draws an image embedding, a decoder draws the image; the decoder alone and both in one pipeline."""

from functools import partial

import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeCombinedPipeline,
    StableCascadeDecoderPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from .image_flow import SQUARE, scale
from .parts import WIDTH, clip_text_projected, clip_tokenizer, fresh
from .record import Guidance, TinyPipeline


def cascade_prior() -> dict[str, object]:
    prior = fresh(
        StableCascadeUNet,
        in_channels=4,
        out_channels=4,
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        switch_level=(False,),
        clip_image_in_channels=WIDTH,
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
        dropout=(0.1, 0.1),
    )
    return {
        "prior": prior,
        "text_encoder": clip_text_projected(),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def cascade_decoder() -> dict[str, object]:
    plain, attentive = ("SDCascadeResBlock", "SDCascadeTimestepBlock"), ("SDCascadeAttnBlock",)
    decoder = fresh(
        StableCascadeUNet,
        in_channels=4,
        out_channels=4,
        conditioning_dim=32,
        block_out_channels=[16, 32],
        num_attention_heads=[-1, 2],
        down_num_layers_per_block=[1, 1],
        up_num_layers_per_block=[1, 1],
        down_blocks_repeat_mappers=[1, 1],
        up_blocks_repeat_mappers=[1, 1],
        block_types_per_layer=[plain, plain + attentive],
        switch_level=None,
        clip_text_pooled_in_channels=WIDTH,
        effnet_in_channels=4,
        dropout=[0.1, 0.1],
    )
    return {
        "decoder": decoder,
        "text_encoder": clip_text_projected(),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": fresh(PaellaVQModel, bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16),
        "latent_dim_scale": 4.0,
    }


def cascade_combined() -> StableCascadeCombinedPipeline:
    decoder = {name: part for name, part in cascade_decoder().items() if name != "latent_dim_scale"}
    prior = {f"prior_{name}": part for name, part in cascade_prior().items()}
    return StableCascadeCombinedPipeline(**decoder, **prior, prior_feature_extractor=None, prior_image_encoder=None)


row = partial(TinyPipeline, guidance=scale(4.0))
NO_SIZE = {"num_inference_steps": 4, "output_type": "pt"}

ADDITIONAL = (
    row(
        "StableCascadeDecoder",
        lambda: StableCascadeDecoderPipeline(**cascade_decoder()),
        NO_SIZE,
        denoisers=("decoder",),
        media=lambda i: {"image_embeddings": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(i))},
    ),
    row(
        "StableCascadeCombined",
        cascade_combined,
        SQUARE | {"height": 128, "width": 128, "prior_num_inference_steps": 4},
        denoisers=("prior_prior", "decoder"),
        unused=("clip_img_mapper",),  # no pictures beside the text
        guidance=Guidance(
            {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 2.0},
            {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0},
        ),
    ),
)
