"""Image-to-image and editing pipelines on flow matching."""

from functools import partial

from diffusers import (
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.models import AutoencoderKLWan

from .image_flow import (
    LAST_TEXT_QUERY,
    LAST_TEXT_STREAM,
    SQUARE,
    flux_parts,
    flux_transformer,
    qwen_image_parts,
    sd3_parts,
)
from .parts import fresh, picture, qwen_processor
from .record import Guidance, TinyPipeline
from .unet import mask


def qwen_edit() -> QwenImageEditPipeline:
    """The pipeline enlarges every picture to about 1024 x 1024, so this VAE cuts patches of 16 x 16 before it convolves."""
    patches = {"patch_size": 16, "in_channels": 3 * 256, "out_channels": 3 * 256, "temperal_downsample": [False] * 4}
    statistics = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.0, 0.9, 1.1, 1.2]}
    vae = fresh(AutoencoderKLWan, base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=1, **patches, **statistics)
    return QwenImageEditPipeline(**{**qwen_image_parts(), "vae": vae}, processor=qwen_processor())


def large_picture(row: int) -> dict[str, object]:
    """Of the size that the pipeline wants, as it resizes a picture alone but not one in a list."""
    return {"image": picture(row).resize((1024, 1024))}


TRUE_GUIDANCE = Guidance({"true_cfg_scale": 3.0, "negative_prompt": " "}, {"true_cfg_scale": 1.0})

row = partial(TinyPipeline, denoisers=("transformer",))

REQUIRED = (
    row(
        "FluxKontext",
        lambda: FluxKontextPipeline(**flux_parts()),
        {**SQUARE, "max_sequence_length": 48, "max_area": 256, "_auto_resize": False},
        guidance=TRUE_GUIDANCE,
        media=lambda i: {"image": picture(i, 16)},
        required=True,
    ),
    row(
        "QwenImageEdit",
        qwen_edit,
        {**SQUARE, "height": 64, "width": 64, "max_sequence_length": 400},
        guidance=TRUE_GUIDANCE,
        media=large_picture,
        unused=LAST_TEXT_STREAM,
        required=True,
    ),
)

ADDITIONAL = (
    row(
        "StableDiffusion3Img2Img",
        lambda: StableDiffusion3Img2ImgPipeline(**sd3_parts()),
        {**SQUARE, "num_inference_steps": 6, "strength": 0.7},
        guidance=Guidance({"guidance_scale": 4.0}, {"guidance_scale": 1.0}),
        unused=LAST_TEXT_QUERY,
        media=lambda i: {"image": picture(i, 16)},
    ),
    row(
        "FluxImg2Img",
        lambda: FluxImg2ImgPipeline(**flux_parts()),
        {**SQUARE, "num_inference_steps": 6, "strength": 0.7, "max_sequence_length": 48},
        guidance=TRUE_GUIDANCE,
        media=lambda i: {"image": picture(i, 16)},
    ),
    row(
        "FluxFill",
        lambda: FluxFillPipeline(**flux_parts(flux_transformer(48, 16))),
        {**SQUARE, "max_sequence_length": 48},
        guidance=Guidance({"guidance_scale": 30.0}, {"guidance_scale": 1.0}),
        media=lambda i: {"image": picture(i, 16), "mask_image": mask(i)},
    ),
)
