"""Text-to-audio pipelines."""

from functools import partial

from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)

from .image_flow import scale
from .parts import WIDTH, fresh, t5, t5_tokenizer
from .record import TinyPipeline


def stable_audio(scheduler: object) -> StableAudioPipeline:
    """Two channels at 64 Hz, 8 latents a second."""
    transformer = fresh(
        StableAudioDiTModel,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    vae = fresh(
        AutoencoderOobleck,
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[1, 2],
        sampling_rate=64,
    )
    projection = fresh(
        StableAudioProjectionModel, text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
    )
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 32
    return StableAudioPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer,
        projection_model=projection,
    )


row = partial(TinyPipeline, denoisers=("transformer",), guidance=scale(4.0), kind="audio")

ADDITIONAL = (
    row(
        "StableAudio",
        lambda: stable_audio(EDMDPMSolverMultistepScheduler(sigma_data=1.0, prediction_type="v_prediction")),
        {"num_inference_steps": 4, "output_type": "pt", "audio_end_in_s": 1.0},
        unused=("time_proj.weight",),  # fixed frequencies
    ),
)
