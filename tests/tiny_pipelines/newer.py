"""Average velocities, a linear video model, a second schedule of CogView."""

from functools import partial

from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    FlowMapEulerDiscreteScheduler,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from .image_flow import SQUARE, sana_parts, scale
from .parts import (
    WIDTH,
    fresh,
    image_vae,
    t5,
    t5_tokenizer,
)
from .record import TinyPipeline
from .video import CLIP, wan_parts


def anyflow() -> AnyFlowPipeline:
    """The model predicts the average velocity to the next timestep."""
    transformer = fresh(
        AnyFlowTransformer3DModel,
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
    return AnyFlowPipeline(**{**wan_parts(FlowMapEulerDiscreteScheduler(shift=5.0)), "transformer": transformer})


def cogview3() -> CogView3PlusPipeline:
    transformer = fresh(
        CogView3PlusTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
    )
    return CogView3PlusPipeline(
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        vae=image_vae(scaling_factor=0.5),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def sana_video() -> SanaVideoPipeline:
    transformer = fresh(
        SanaVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return SanaVideoPipeline(**{**sana_parts(), "transformer": transformer, "vae": wan_parts()["vae"]})


row = partial(TinyPipeline, denoisers=("transformer",), guidance=scale(4.0))

ADDITIONAL = (
    row("AnyFlow", anyflow, CLIP, kind="video"),
    row("CogView3Plus", cogview3, {**SQUARE, "max_sequence_length": 48}),
    row(
        "SanaVideo",
        sana_video,
        {
            "num_inference_steps": 4,
            "height": 32,
            "width": 32,
            "frames": 5,
            "output_type": "pt",
            "max_sequence_length": 48,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
        kind="video",
    ),
)
