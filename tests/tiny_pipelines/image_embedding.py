"""Pictures from image embeddings and class labels; a pipeline that calls two others."""

from functools import partial

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)

from .image_flow import SQUARE, scale
from .parts import WIDTH, clip_pictures, clip_text_projected, clip_tokenizer, clip_vision, fresh, image_vae
from .record import Guidance, TinyPipeline


def kandinsky_parts() -> dict[str, object]:
    """Conditioned on image embeddings alone; learns a variance."""
    unet = fresh(
        UNet2DConditionModel,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    movq = fresh(
        VQModel,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    scheduler = DDPMScheduler(clip_sample=True, clip_sample_range=2.0, variance_type="learned_range", beta_end=0.012)
    return {"unet": unet, "scheduler": scheduler, "movq": movq}


def kandinsky_combined() -> KandinskyV22CombinedPipeline:
    """One pipeline that calls two: a prior draws an image embedding, a decoder draws the image."""
    prior = fresh(PriorTransformer, num_attention_heads=2, attention_head_dim=16, embedding_dim=WIDTH, num_layers=1)
    return KandinskyV22CombinedPipeline(
        **kandinsky_parts(),
        prior_prior=prior,
        prior_image_encoder=clip_vision(size=224),
        prior_text_encoder=clip_text_projected(),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        prior_image_processor=clip_pictures(),
    )


def image_embedding(row: int) -> dict[str, object]:
    draws = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(row))  # (2, 1, D)
    return {"image_embeds": draws[0], "negative_image_embeds": draws[1]}


def class_conditional() -> DiTPipeline:
    transformer = fresh(
        DiTTransformer2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    return DiTPipeline(
        transformer=transformer, scheduler=DDIMScheduler(clip_sample=False), vae=image_vae(scaling_factor=0.5)
    )


row = partial(TinyPipeline, denoisers=("transformer",), guidance=scale(4.0))

ADDITIONAL = (
    row(
        "KandinskyV22",
        lambda: KandinskyV22Pipeline(**kandinsky_parts()),
        SQUARE,
        denoisers=("unet",),
        prompt_key=None,
        media=image_embedding,
    ),
    row(
        "KandinskyV22Combined",
        kandinsky_combined,
        {**SQUARE, "prior_num_inference_steps": 4},
        denoisers=("prior_prior", "unet"),
        unused=("clip_mean", "clip_std"),  # they scale the embedding after the prior's loop
        guidance=Guidance(
            {"guidance_scale": 4.0, "prior_guidance_scale": 4.0}, {"guidance_scale": 1.0, "prior_guidance_scale": 1.0}
        ),
    ),
    row(
        "DiT",
        class_conditional,
        {"num_inference_steps": 4, "output_type": "np"},
        prompts=(0, 7, 400),
        prompt_key="class_labels",
    ),
)
