"""Text-to-image pipelines on flow matching: the rows of the parity table and more."""

from functools import partial

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models import AutoencoderKLFlux2, AutoencoderKLQwenImage

from .parts import (
    WIDTH,
    clip_text,
    clip_text_projected,
    clip_tokenizer,
    fresh,
    gemma2,
    gemma_tokenizer,
    image_vae,
    qwen3,
    qwen3_causal,
    qwen_tokenizer,
    qwen_vision_language,
    t5,
    t5_tokenizer,
)
from .record import Guidance, TinyPipeline

SQUARE = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "pt"}
"""A quick call: 4 steps, 16 x 16 pixels."""


LAST_TEXT_QUERY = ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.norm_added_q")
"""The last block's text stream is dropped, so its queries move nothing."""

LAST_TEXT_STREAM = (*LAST_TEXT_QUERY, "transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.txt_mlp")


def sd3_parts(channels: int = 4) -> dict[str, object]:
    transformer = fresh(
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=channels,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_vae(channels, shift_factor=0.06, scaling_factor=1.5),
        "text_encoder": clip_text_projected(1),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text_projected(2),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }


def flux_transformer(in_channels: int = 16, out_channels: int | None = None) -> FluxTransformer2DModel:
    return fresh(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def flux_parts(transformer: FluxTransformer2DModel | None = None) -> dict[str, object]:
    return {
        "transformer": transformer or flux_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": image_vae(shift_factor=0.1, scaling_factor=0.4),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
    }


def flux2_klein() -> Flux2KleinPipeline:
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
        guidance_embeds=False,
    )
    vae = fresh(
        AutoencoderKLFlux2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3_causal(),
        tokenizer=qwen_tokenizer(),
    )


def qwen_image_parts() -> dict[str, object]:
    transformer = fresh(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = fresh(
        AutoencoderKLQwenImage,
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 0.9, 1.1, 1.2],
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        "vae": vae,
        "text_encoder": qwen_vision_language(),
        "tokenizer": qwen_tokenizer(),
    }


def z_image() -> ZImagePipeline:
    transformer = fresh(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 32, 32],
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
    )


def sana_parts() -> dict[str, object]:
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
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = fresh(
        AutoencoderDC,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    return {
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": vae,
        "text_encoder": gemma2(),
        "tokenizer": gemma_tokenizer(),
    }


def scale(on: float, off: float = 1.0, name: str = "guidance_scale") -> Guidance:
    return Guidance({name: on}, {name: off})


row = partial(TinyPipeline, denoisers=("transformer",), required=True)

REQUIRED = (
    row(
        "StableDiffusion3",
        lambda: StableDiffusion3Pipeline(**sd3_parts()),
        SQUARE,
        guidance=scale(4.0),
        unused=LAST_TEXT_QUERY,
    ),
    row(
        "Flux",
        lambda: FluxPipeline(**flux_parts()),
        {**SQUARE, "max_sequence_length": 48},
        guidance=Guidance({"true_cfg_scale": 3.0, "negative_prompt": ""}, {"true_cfg_scale": 1.0}),
    ),
    row(
        "Flux2Klein",
        flux2_klein,
        {**SQUARE, "max_sequence_length": 96, "text_encoder_out_layers": (1, 2)},
        guidance=scale(4.0),
    ),
    row(
        "QwenImage",
        lambda: QwenImagePipeline(**qwen_image_parts()),
        {**SQUARE, "max_sequence_length": 300},
        guidance=Guidance({"true_cfg_scale": 4.0, "negative_prompt": " "}, {"true_cfg_scale": 1.0}),
        unused=LAST_TEXT_STREAM,
    ),
    row("ZImage", z_image, {**SQUARE, "max_sequence_length": 96}, guidance=scale(4.0, 0.0)),
    row(
        "Sana",
        lambda: SanaPipeline(**sana_parts()),
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "max_sequence_length": 48,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
        guidance=scale(4.0),
    ),
)
