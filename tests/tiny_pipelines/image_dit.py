"""More transformers that draw pictures, chosen for other schedulers, guidance and conditioning than the parity table's."""

from functools import partial

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from .image_flow import SQUARE, scale
from .parts import (
    WIDTH,
    bert,
    bert_tokenizer,
    clip_text_projected,
    clip_tokenizer,
    fresh,
    gemma2,
    gemma_tokenizer,
    glm,
    image_vae,
    llama_causal,
    llama_tokenizer,
    qwen_tokenizer,
    t5,
    t5_tokenizer,
    umt5,
)
from .record import Guidance, TinyPipeline


def pixart_sigma() -> PixArtSigmaPipeline:
    """Half of its output channels are a variance that the pipeline drops."""
    transformer = fresh(
        PixArtTransformer2DModel,
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    return PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
        vae=image_vae(scaling_factor=0.5),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def aura_flow() -> AuraFlowPipeline:
    transformer = fresh(
        AuraFlowTransformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=image_vae(scaling_factor=0.5),
        text_encoder=umt5(),
        tokenizer=t5_tokenizer(),
    )


def lumina2() -> Lumina2Pipeline:
    """Its time runs the other way: the velocity's sign is flipped before the step."""
    transformer = fresh(
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(512, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    transformer = fresh(
        HunyuanDiT2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        hidden_size=32,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
    )
    return HunyuanDiTPipeline(
        transformer=transformer,
        scheduler=DDPMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        vae=image_vae(scaling_factor=0.5),
        text_encoder=bert(),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def cogview4() -> CogView4Pipeline:
    transformer = fresh(
        CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
    )
    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "left"  # nothing masks the padding
    return CogView4Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75, base_image_seq_len=256
        ),
        vae=image_vae(scaling_factor=0.5),
        text_encoder=glm(),
        tokenizer=tokenizer,
    )


def chroma() -> ChromaPipeline:
    transformer = fresh(
        ChromaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        vae=image_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def hidream() -> HiDreamImagePipeline:
    """A mixture of experts with four text encoders; the velocity's sign is flipped before the step."""
    transformer = fresh(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )
    pipeline = HiDreamImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip_text_projected(1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_projected(2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama_causal(),
        tokenizer_4=llama_tokenizer(),
    )
    pipeline.default_sample_size = 8  # every picture is rescaled to this many latents squared
    return pipeline


row = partial(TinyPipeline, denoisers=("transformer",), guidance=scale(4.0))

ADDITIONAL = (
    row(
        "PixArtSigma",
        pixart_sigma,
        {**SQUARE, "max_sequence_length": 48, "clean_caption": False, "use_resolution_binning": False},
    ),
    row("AuraFlow", aura_flow, {**SQUARE, "max_sequence_length": 48}),
    row(
        "Lumina2",
        lumina2,
        {
            **SQUARE,
            "height": 64,  # its size is in units of eight pixels a latent, whatever the VAE
            "width": 64,
            "max_sequence_length": 96,
            "system_prompt": "draw",
            "cfg_trunc_ratio": 0.5,
        },
    ),
    row("HunyuanDiT", hunyuan_dit, {**SQUARE, "use_resolution_binning": False}),
    row(
        "CogView4",
        cogview4,
        {**SQUARE, "max_sequence_length": 48},
        guidance=Guidance({"guidance_scale": 4.0, "negative_prompt": "blurry"}, {"guidance_scale": 1.0}),
    ),
    row("Chroma", chroma, {**SQUARE, "max_sequence_length": 48}),
    row(
        "HiDream",
        hidream,
        {**SQUARE, "max_sequence_length": 48},
        unused=("ff_i.experts", "ff_i.gate"),  # in eval mode the experts run under no_grad
        differentiable=False,
    ),
)
