"""Further image models: a consistency sampler, a learned variance, embeddings instead of texts."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKL,
    BriaPipeline,
    BriaTransformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    IFPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    UNet2DConditionModel,
)

from .image_flow import SQUARE, flux2_klein, sana_parts, scale
from .parts import (
    WIDTH,
    fresh,
    gemma2,
    gemma_tokenizer,
    image_vae,
    llama_tokenizer,
    qwen3,
    qwen_tokenizer,
    t5,
    t5_tokenizer,
)
from .record import Guidance, TinyPipeline


def sana_sprint() -> SanaSprintPipeline:
    """Two consistency steps and more on an arc; the guidance scale is an input of the model."""
    transformer = fresh(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    return SanaSprintPipeline(**{**sana_parts(), "transformer": transformer, "scheduler": SCMScheduler()})


def lumina() -> LuminaPipeline:
    """Time runs from noise at 0 to data at 1, and half of its channels are a variance that the pipeline drops."""
    transformer = fresh(
        LuminaNextDiT2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    return LuminaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(scaling_factor=0.5),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def omnigen() -> OmniGenPipeline:
    """One transformer reads text, pictures and latents; it has no text encoder."""
    transformer = fresh(
        OmniGenTransformer2DModel,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        in_channels=4,
        time_step_dim=16,
        vocab_size=512,
        pad_token_id=3,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = fresh(AutoencoderKL, block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, **blocks)
    return OmniGenPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=vae,
        tokenizer=llama_tokenizer(),
    )


def bria() -> BriaPipeline:
    transformer = fresh(
        BriaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=[4, 6, 6],
    )
    return BriaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def ovis() -> OvisImagePipeline:
    transformer = fresh(
        OvisImageTransformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return OvisImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
    )


def flux2() -> Flux2Pipeline:
    """Guidance is an input of the model; texts come as embeddings, encoded elsewhere."""
    transformer = fresh(
        Flux2Transformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )
    parts = flux2_klein().components
    return Flux2Pipeline(
        transformer=transformer, scheduler=parts["scheduler"], vae=parts["vae"], text_encoder=None, tokenizer=None
    )


def text_embedding(row: int) -> dict[str, object]:
    return {"prompt_embeds": torch.randn(1, 12, 2 * WIDTH, generator=torch.Generator().manual_seed(row))}


def deep_floyd() -> IFPipeline:
    """Pixels, and a learned variance that classifier-free guidance takes from one half of the batch."""
    unet = fresh(
        UNet2DConditionModel,
        sample_size=16,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, clip_sample=False
    )
    return IFPipeline(
        unet=unet,
        scheduler=scheduler,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


row = partial(TinyPipeline, denoisers=("transformer",), guidance=scale(4.0))
NO_SIZE = {"num_inference_steps": 4, "output_type": "pt"}

ADDITIONAL = (
    row(
        "SanaSprint",
        sana_sprint,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "intermediate_timesteps": None,
            "max_sequence_length": 48,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
    ),
    row(
        "Lumina",
        lumina,
        {**SQUARE, "max_sequence_length": 48, "clean_caption": False, "proportional_attn": False},
        guidance=Guidance({"guidance_scale": 4.0, "negative_prompt": "blurry"}, {"guidance_scale": 1.0}),
        unused=("pad_token",),
    ),
    row(
        "OmniGen",
        omnigen,
        SQUARE | {"height": 32, "width": 32},
        guidance=scale(2.5, 1.0),
        batched=False,
        unused=("input_image_proj",),
    ),
    row("Bria", bria, {**SQUARE, "max_sequence_length": 48}),
    row("OvisImage", ovis, {**SQUARE, "max_sequence_length": 256}),
    row("Flux2", flux2, SQUARE, prompt_key=None, media=text_embedding),
    row("DeepFloyd", deep_floyd, {**NO_SIZE, "clean_caption": False}, denoisers=("unet",)),
)
