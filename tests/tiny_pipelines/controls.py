"""Control networks, adapters, inpainting and image conditioning on the models of the other files."""

from functools import partial

from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    ZImageImg2ImgPipeline,
)

from .edit import TRUE_GUIDANCE
from .image_flow import (
    LAST_TEXT_QUERY,
    LAST_TEXT_STREAM,
    SQUARE,
    flux_parts,
    flux_transformer,
    qwen_image_parts,
    sana_parts,
    scale,
    sd3_parts,
    z_image,
)
from .parts import WIDTH, fresh, picture
from .record import Guidance, TinyPipeline
from .unet import VP, ddim, mask, sd_parts, sdxl_parts, unet_sizes

PARTLY = {**SQUARE, "num_inference_steps": 6, "strength": 0.7}
"""The last four of six steps, from a picture with noise."""


def control_image(row: int) -> dict[str, object]:
    return {"control_image": picture(row, 16)}


def an_image(row: int) -> dict[str, object]:
    return {"image": picture(row, 16)}


def image_and_mask(row: int) -> dict[str, object]:
    return {"image": picture(row, 16), "mask_image": mask(row)}


def flux_controlnet() -> FluxControlNetPipeline:
    control = fresh(
        FluxControlNetModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        seed=3,
    )
    return FluxControlNetPipeline(**flux_parts(), controlnet=control)


def qwen_controlnet() -> QwenImageControlNetPipeline:
    control = fresh(
        QwenImageControlNetModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        seed=3,
    )
    return QwenImageControlNetPipeline(**qwen_image_parts(), controlnet=control)


def sana_controlnet() -> SanaControlNetPipeline:
    control = fresh(
        SanaControlNetModel,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
        seed=3,
    )
    return SanaControlNetPipeline(**sana_parts(), controlnet=control)


def z_image_to_image() -> ZImageImg2ImgPipeline:
    return ZImageImg2ImgPipeline(**z_image().components)


def sdxl_controlnet() -> StableDiffusionXLControlNetPipeline:
    control = fresh(
        ControlNetModel,
        **unet_sizes(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            use_linear_projection=True,
            conditioning_embedding_out_channels=(8, 16),
        ),
        seed=3,
    )
    parts = sdxl_parts(EulerDiscreteScheduler(**VP, timestep_spacing="leading"))
    return StableDiffusionXLControlNetPipeline(**parts, controlnet=control)


row = partial(TinyPipeline, denoisers=("transformer",))
controlled = partial(TinyPipeline, denoisers=("transformer", "controlnet"))

ADDITIONAL = (
    row(
        "FluxControl",
        lambda: FluxControlPipeline(**flux_parts(flux_transformer(32, 16))),
        {**SQUARE, "max_sequence_length": 48},
        guidance=Guidance({"guidance_scale": 30.0}, {"guidance_scale": 1.0}),
        media=control_image,
    ),
    controlled(
        "FluxControlNet",
        flux_controlnet,
        {**SQUARE, "max_sequence_length": 48},
        guidance=TRUE_GUIDANCE,
        media=control_image,
    ),
    row(
        "FluxInpaint",
        lambda: FluxInpaintPipeline(**flux_parts()),
        {**PARTLY, "max_sequence_length": 48},
        guidance=TRUE_GUIDANCE,
        media=image_and_mask,
    ),
    row(
        "StableDiffusion3Inpaint",
        lambda: StableDiffusion3InpaintPipeline(**sd3_parts(channels=16)),
        PARTLY,
        guidance=scale(4.0),
        unused=LAST_TEXT_QUERY,
        media=image_and_mask,
    ),
    row(
        "QwenImageImg2Img",
        lambda: QwenImageImg2ImgPipeline(**qwen_image_parts()),
        {**PARTLY, "max_sequence_length": 300},
        guidance=TRUE_GUIDANCE,
        unused=LAST_TEXT_STREAM,
        media=an_image,
    ),
    row(
        "QwenImageInpaint",
        lambda: QwenImageInpaintPipeline(**qwen_image_parts()),
        {**PARTLY, "max_sequence_length": 300},
        guidance=TRUE_GUIDANCE,
        unused=LAST_TEXT_STREAM,
        media=image_and_mask,
    ),
    controlled(
        "QwenImageControlNet",
        qwen_controlnet,
        {**SQUARE, "max_sequence_length": 300},
        guidance=TRUE_GUIDANCE,
        unused=(*LAST_TEXT_STREAM, *(name.replace(".1.", ".0.") for name in LAST_TEXT_STREAM)),
        media=control_image,
    ),
    row(
        "ZImageImg2Img",
        z_image_to_image,
        {**PARTLY, "max_sequence_length": 96},
        guidance=scale(4.0, 0.0),
        media=an_image,
    ),
    controlled(
        "SanaControlNet",
        sana_controlnet,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "max_sequence_length": 48,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
        guidance=scale(4.0),
        media=lambda i: {"control_image": picture(i)},
    ),
    row(
        "StableDiffusionInstructPix2Pix",
        lambda: StableDiffusionInstructPix2PixPipeline(**sd_parts(in_channels=8)),
        {"num_inference_steps": 4, "output_type": "pt"},
        denoisers=("unet",),
        guidance=scale(5.0),
        media=an_image,
    ),
    row(
        "StableDiffusionPerturbedAttention",
        lambda: StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers="mid"),
        {**SQUARE, "pag_scale": 3.0},
        denoisers=("unet",),
        guidance=scale(5.0),
    ),
    row(
        "StableDiffusionXLInpaint",
        lambda: StableDiffusionXLInpaintPipeline(**sdxl_parts(ddim())),
        PARTLY,
        denoisers=("unet",),
        guidance=scale(5.0),
        media=image_and_mask,
    ),
    row(
        "StableDiffusionXLControlNet",
        sdxl_controlnet,
        SQUARE,
        denoisers=("unet", "controlnet"),
        guidance=scale(5.0),
        media=an_image,
    ),
)
