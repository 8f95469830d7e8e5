"""Models whose guidance is not a doubled batch: networks of their own, guider objects, one call for each half."""

from functools import partial

from diffusers import (
    AdaptiveProjectedMixGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from diffusers.models import AutoencoderKLHunyuanImage
from transformers import ByT5Tokenizer, Qwen3VLConfig, Qwen3VLModel

from .image_flow import SQUARE, flux2_klein, scale
from .parts import WIDTH, fresh, qwen_tokenizer, qwen_vision_language, t5
from .record import TinyPipeline


def qwen3_vision_language() -> Qwen3VLModel:
    """36 layers, of which 13 are read."""
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 36,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 8}
    return fresh(
        Qwen3VLModel, Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": []})
    )


def ideogram4() -> Ideogram4Pipeline:
    """One network for the text, another without; both are trained."""

    def transformer(seed: int) -> Ideogram4Transformer2DModel:
        return fresh(
            Ideogram4Transformer2DModel,
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * 8,
            mrope_section=(4, 2, 2),
            seed=seed,
        )

    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_klein().vae,
        text_encoder=qwen3_vision_language(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer(0),
        unconditional_transformer=transformer(1),
    )


def hunyuan_image() -> HunyuanImagePipeline:
    """Its guider keeps a momentum from step to step."""
    transformer = fresh(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8),
    )
    vae = fresh(
        AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.5,
    )
    pipeline = HunyuanImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae,
        text_encoder=qwen_vision_language(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=ByT5Tokenizer(),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_start_step=1),
    )
    pipeline.tokenizer_max_length = 300
    pipeline.tokenizer_2_max_length = 8
    return pipeline


row = partial(TinyPipeline, denoisers=("transformer",), guidance=scale(4.0))

ADDITIONAL = (
    row(
        "Ideogram4",
        ideogram4,
        {**SQUARE, "max_sequence_length": 80, "guidance_schedule": None},
        denoisers=("transformer", "unconditional_transformer"),
        guidance=scale(4.0, 0.5),
        unused=("llm_cond",),  # of the network without text
    ),
    row("HunyuanImage", hunyuan_image, SQUARE, guidance=None, unused=("context_embedder_2",)),
)
