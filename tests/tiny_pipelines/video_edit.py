"""Videos from videos, instructions, pictures and masks; motion modules; per-token timesteps."""

from functools import partial

import torch
from diffusers import (
    AnimateDiffPipeline,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    LTXConditionPipeline,
    LucyEditPipeline,
    MotionAdapter,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)

from .image_flow import scale
from .parts import WIDTH, fresh, image_vae, picture, t5, t5_tokenizer
from .record import TinyPipeline
from .unet import sd_parts
from .video import CLIP, cogvideox, ltx_parts, wan_parts, wan_transformer


def a_video(row: int) -> dict[str, object]:
    return {"video": [picture(10 * row + frame, 16) for frame in range(5)]}


def an_image(row: int) -> dict[str, object]:
    return {"image": picture(row, 16)}


def flow_wan() -> dict[str, object]:
    return wan_parts(FlowMatchEulerDiscreteScheduler(shift=3.0))


def wan_vace() -> WanVACEPipeline:
    """Its control blocks are part of the transformer."""
    transformer = fresh(
        WanVACETransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=2 * 4 + 4 * 4,
    )
    return WanVACEPipeline(**{**flow_wan(), "transformer": transformer})


def lucy_edit() -> LucyEditPipeline:
    """The prompt is an instruction; the source video's latents are further channels beside the noisy ones."""
    transformer = wan_transformer(in_channels=4 + 4)
    return LucyEditPipeline(**{**flow_wan(), "transformer": transformer})


def cogvideox_image_to_video() -> CogVideoXImageToVideoPipeline:
    transformer = fresh(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
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
    scheduler = CogVideoXDPMScheduler.from_config(cogvideox().scheduler.config)
    return CogVideoXImageToVideoPipeline(
        **{**cogvideox().components, "transformer": transformer, "scheduler": scheduler}
    )


def animate_diff() -> AnimateDiffPipeline:
    """Motion modules between the layers of an image model; the VAE decodes frames one by one."""
    adapter = fresh(
        MotionAdapter,
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        use_motion_mid_block=False,
        seed=4,
    )
    parts = {name: part for name, part in sd_parts().items() if "safety" not in name}
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    with torch.random.fork_rng(devices=[]):  # the pipeline builds a model of its own, whose weights it then replaces
        pipeline = AnimateDiffPipeline(**{**parts, "scheduler": scheduler}, motion_adapter=adapter)
    pipeline.unet.eval()
    return pipeline


def latte() -> LattePipeline:
    """Half of its output channels are a variance that the pipeline drops."""
    transformer = fresh(
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=WIDTH,
        video_length=4,
    )
    return LattePipeline(
        transformer=transformer,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
        vae=image_vae(scaling_factor=0.5),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


row = partial(TinyPipeline, denoisers=("transformer",), kind="video", guidance=scale(4.0))
FRAMELESS = {name: value for name, value in CLIP.items() if name != "num_frames"}

REQUIRED = (
    row(
        "WanVideoToVideo",
        lambda: WanVideoToVideoPipeline(**flow_wan()),
        {**FRAMELESS, "num_inference_steps": 6, "strength": 0.7},
        media=a_video,
        required=True,
    ),
    row(
        "WanVACE",
        wan_vace,
        {**CLIP, "conditioning_scale": 0.7},
        media=a_video,
        batched=False,
        required=True,
    ),
    row("LucyEdit", lucy_edit, CLIP, media=a_video, precise=("vae",), required=True),
)

ADDITIONAL = (
    row(
        "WanTokenTimesteps",
        lambda: WanPipeline(**wan_parts(), expand_timesteps=True),
        CLIP,
    ),
    row(
        "WanTokenTimestepsImage",
        lambda: WanImageToVideoPipeline(**wan_parts(), image_encoder=None, image_processor=None, expand_timesteps=True),
        CLIP,
        media=an_image,
        batched=False,
    ),
    row(
        "LTXCondition",
        lambda: LTXConditionPipeline(**{**ltx_parts(), "scheduler": FlowMatchEulerDiscreteScheduler()}),
        CLIP | {"height": 32, "width": 32},
        media=lambda i: {"image": picture(i, 32)},
        batched=False,
    ),
    row("CogVideoXImageToVideo", cogvideox_image_to_video, CLIP | {"num_frames": 9}, media=an_image, batched=False),
    row(
        "AnimateDiff",
        animate_diff,
        {"num_inference_steps": 4, "height": 16, "width": 16, "num_frames": 4, "output_type": "pt"},
        denoisers=("unet",),
    ),
    row(
        "Latte",
        latte,
        {
            "num_inference_steps": 4,
            "height": 16,
            "width": 16,
            "video_length": 4,
            "output_type": "pt",
            "clean_caption": False,
        },
        batched=False,  # a prompt alone is not padded
    ),
)
