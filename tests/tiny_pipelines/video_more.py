"""Video pipelines whose loops hold more than one scheduler or another process than flow matching."""

from functools import partial

from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from .parts import WIDTH, clip_pictures, clip_vision, fresh, gemma2, gemma_tokenizer, picture, t5_tokenizer, umt5
from .record import Guidance, TinyPipeline
from .video import CLIP, scale, wan_vae

LAYERS = 3
"""Hidden states of the tiny text encoder: the embeddings and two layers."""

OTHER_GUIDANCE_OFF = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}


def ltx2_transformer() -> LTX2VideoTransformer3DModel:
    video = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
    }
    audio = {
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
    }
    options = {"num_layers": 2, "caption_channels": WIDTH, "rope_double_precision": False, "rope_type": "split"}
    return fresh(LTX2VideoTransformer3DModel, **video, **audio, **options)


def ltx2_connectors() -> LTX2TextConnectors:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_learnable_registers": None}
    sides = {f"{side}_connector_{name}": size for side in ("video", "audio") for name, size in sizes.items()}
    options = {"rope_double_precision": False, "causal_temporal_positioning": False, "rope_type": "split"}
    return fresh(
        LTX2TextConnectors,
        caption_channels=WIDTH,
        text_proj_in_factor=LAYERS,
        connector_rope_base_seq_len=32,
        **sides,
        **options,
    )


def ltx2() -> LTX2Pipeline:
    """Video and audio are denoised together, the audio by a copy of the scheduler."""
    vae = fresh(
        AutoencoderKLLTX2Video,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
    )
    audio_vae = fresh(
        AutoencoderKLLTX2Audio,
        base_channels=8,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=32,
        latent_channels=4,
        causality_axis="height",
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = fresh(
        LTX2Vocoder,
        in_channels=2 * 8,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=16000,
    )
    return LTX2Pipeline(
        transformer=ltx2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, max_shift=2.05),
        vae=vae,
        audio_vae=audio_vae,
        vocoder=vocoder,
        connectors=ltx2_connectors(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def skyreels_diffusion_forcing() -> SkyReelsV2DiffusionForcingPipeline:
    """Every frame has a noise level of its own, and a copy of the scheduler."""
    transformer = fresh(
        SkyReelsV2Transformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return SkyReelsV2DiffusionForcingPipeline(
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        vae=wan_vae(),
        text_encoder=umt5(),
        tokenizer=t5_tokenizer(),
    )


def stable_video_diffusion() -> StableVideoDiffusionPipeline:
    """Image to video; guidance grows from frame to frame; v-prediction on a continuous, variance-exploding process."""
    unet = fresh(
        UNetSpatioTemporalConditionModel,
        sample_size=8,
        in_channels=8,
        block_out_channels=(32, 64),  # norms of 32 groups are built in
        layers_per_block=1,
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = fresh(
        AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 32),  # norms of 32 groups are built in
        down_block_types=("DownEncoderBlock2D",) * 2,
        force_upcast=False,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    return StableVideoDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=vae,
        image_encoder=clip_vision(size=224),  # the size that the pipeline resizes to
        feature_extractor=clip_pictures(),
    )


row = partial(TinyPipeline, kind="video", guidance=scale(4.0))

ADDITIONAL = (
    row(
        "LTX2",
        ltx2,
        {**CLIP, **OTHER_GUIDANCE_OFF, "height": 32, "width": 32},
        denoisers=("transformer",),
    ),
    row(
        "SkyReelsDiffusionForcing",
        skyreels_diffusion_forcing,
        {**CLIP, "num_frames": 9, "base_num_frames": 9, "ar_step": 1, "causal_block_size": 1},
        denoisers=("transformer",),
    ),
    row(
        "StableVideoDiffusion",
        stable_video_diffusion,
        {
            "num_inference_steps": 4,
            "height": 16,
            "width": 16,
            "num_frames": 3,
            "output_type": "pt",
            "decode_chunk_size": 3,
        },
        denoisers=("unet",),
        guidance=Guidance({"max_guidance_scale": 3.0}, {"max_guidance_scale": 1.0}),
        prompt_key=None,
        media=lambda i: {"image": picture(i, 16)},
    ),
)
