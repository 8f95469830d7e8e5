"""Text-to-video and image-to-video pipelines."""

from functools import partial

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)

from .parts import (
    WIDTH,
    clip_pictures,
    clip_text,
    clip_tokenizer,
    clip_vision,
    fresh,
    llama,
    llama_tokenizer,
    picture,
    t5,
    t5_tokenizer,
    umt5,
)
from .record import Guidance, TinyPipeline

CLIP = {
    "num_inference_steps": 4,
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "output_type": "pt",
    "max_sequence_length": 32,
}
"""A quick call: 4 steps, 5 frames of 16 x 16 pixels."""


def wan_transformer(seed: int = 0, **options: object) -> WanTransformer3DModel:
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_max_seq_len": 32}
    return fresh(WanTransformer3DModel, patch_size=(1, 2, 2), **{**sizes, **heads, **options}, seed=seed)


def wan_vae() -> AutoencoderKLWan:
    vae = fresh(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 0.9, 1.1, 1.2],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    return vae


def wan_parts(scheduler: object | None = None) -> dict[str, object]:
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return {
        "transformer": wan_transformer(),
        "scheduler": scheduler or flow,
        "vae": wan_vae(),
        "text_encoder": umt5(),
        "tokenizer": t5_tokenizer(),
    }


def wan_two_experts() -> WanPipeline:
    """The second expert takes over below 80 % noise."""
    parts = wan_parts(FlowMatchEulerDiscreteScheduler(shift=3.0))
    return WanPipeline(**parts, transformer_2=wan_transformer(7), boundary_ratio=0.8)


def wan_image_to_video() -> WanImageToVideoPipeline:
    transformer = wan_transformer(in_channels=4 + 4 + 4, image_dim=WIDTH)
    parts = {**wan_parts(FlowMatchEulerDiscreteScheduler(shift=3.0)), "transformer": transformer}
    return WanImageToVideoPipeline(**parts, image_encoder=clip_vision(), image_processor=clip_pictures())


def ltx_parts() -> dict[str, object]:
    transformer = fresh(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=WIDTH,
    )
    vae = fresh(
        AutoencoderKLLTXVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, max_shift=2.05),
        "vae": vae,
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
    }


def cogvideox() -> CogVideoXPipeline:
    transformer = fresh(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
    )
    vae = fresh(
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return CogVideoXPipeline(
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0,
        ),
        vae=vae,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    transformer = fresh(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    vae = fresh(
        AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return HunyuanVideoPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae,
        text_encoder=llama(),
        tokenizer=llama_tokenizer(),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
    )


def mochi() -> MochiPipeline:
    transformer = fresh(
        MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        max_sequence_length=32,
    )
    vae = fresh(
        AutoencoderKLMochi,
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        force_zeros_for_empty_prompt=True,
    )


def scale(on: float, off: float = 1.0) -> Guidance:
    return Guidance({"guidance_scale": on}, {"guidance_scale": off})


row = partial(TinyPipeline, denoisers=("transformer",), kind="video", guidance=scale(4.0))

REQUIRED = (
    row("Wan", lambda: WanPipeline(**wan_parts()), CLIP, required=True),
    row("LTX", lambda: LTXPipeline(**ltx_parts()), CLIP | {"height": 32, "width": 32}, required=True),
    row(
        "WanImageToVideo",
        wan_image_to_video,
        CLIP,
        media=lambda i: {"image": picture(i, 16)},
        batched=False,
        required=True,
    ),
    row(
        "LTXImageToVideo",
        lambda: LTXImageToVideoPipeline(**ltx_parts()),
        CLIP | {"height": 32, "width": 32},
        media=lambda i: {"image": picture(i, 32)},
        required=True,
    ),
    row("CogVideoX", cogvideox, CLIP | {"num_frames": 9}, required=True),
    row(
        "HunyuanVideo",
        hunyuan_video,
        {**CLIP, "prompt_template": {"template": "{}", "crop_start": 0}},
        guidance=Guidance({"true_cfg_scale": 4.0, "negative_prompt": "blurry"}, {"true_cfg_scale": 1.0}),
        required=True,
    ),
)

ADDITIONAL = (
    row("WanTwoExperts", wan_two_experts, CLIP, denoisers=("transformer", "transformer_2")),
    row(
        "Mochi",
        mochi,
        CLIP | {"num_frames": 7},
        unused=("transformer_blocks.1.attn1.norm_added_q", "transformer_blocks.1.attn1.add_q_proj"),
    ),
)
