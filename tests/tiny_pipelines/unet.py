"""Pipelines on U-Nets and variance-preserving schedules: Stable Diffusion and its relatives."""

from functools import partial

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image

from .parts import WIDTH, clip_text, clip_text_projected, clip_tokenizer, fresh, image_vae, picture
from .record import Guidance, TinyPipeline

SQUARE = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "pt"}
NO_SIZE = {"num_inference_steps": 4, "output_type": "pt"}
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**options: object) -> DDIMScheduler:
    return DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


def unet_sizes(**options: object) -> dict[str, object]:
    sizes = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    }
    return {**sizes, **options}


def unet(**options: object) -> UNet2DConditionModel:
    up = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8}
    return fresh(UNet2DConditionModel, **unet_sizes(**up, **options))


def sd_parts(**options: object) -> dict[str, object]:
    return {
        "unet": unet(**options),
        "scheduler": ddim(),
        "vae": image_vae(scaling_factor=0.5),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sdxl_parts(scheduler: object) -> dict[str, object]:
    time_ids = 6 * 8 + WIDTH
    return {
        "unet": unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=time_ids,
            use_linear_projection=True,
        ),
        "scheduler": scheduler,
        "vae": image_vae(scaling_factor=0.5, force_upcast=False),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text_projected(2),
        "tokenizer_2": clip_tokenizer(),
    }


def controlnet() -> ControlNetModel:
    return fresh(ControlNetModel, **unet_sizes(conditioning_embedding_out_channels=(8, 16)), seed=3)


def pixel_unet(**options: object) -> UNet2DModel:
    """A U-Net on 3 x 8 x 8 pixels without a text input."""
    return fresh(
        UNet2DModel,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(16, 32),
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def mask(row: int) -> Image.Image:
    """The left half and a band that moves with the row are painted anew."""
    pixels = torch.zeros(16, 16, dtype=torch.uint8)
    pixels[:, :8] = 255
    pixels[4 * (row % 4) : 4 * (row % 4) + 4] = 255
    return Image.fromarray(pixels.numpy(), "L")


def scale(on: float, off: float = 1.0) -> Guidance:
    return Guidance({"guidance_scale": on}, {"guidance_scale": off})


row = partial(TinyPipeline, denoisers=("unet",), guidance=scale(5.0))

REQUIRED = (
    row("StableDiffusion", lambda: StableDiffusionPipeline(**sd_parts()), SQUARE, required=True),
    row("StableDiffusionXL", lambda: StableDiffusionXLPipeline(**sdxl_parts(ddim())), SQUARE, required=True),
)

ADDITIONAL = (
    row(
        "StableDiffusionVPrediction",
        lambda: StableDiffusionPipeline(
            **{**sd_parts(), "scheduler": ddim(prediction_type="v_prediction", timestep_spacing="trailing")}
        ),
        {**SQUARE, "guidance_rescale": 0.7},
    ),
    row(
        "StableDiffusionXLEuler",
        lambda: StableDiffusionXLPipeline(**sdxl_parts(EulerDiscreteScheduler(**VP, timestep_spacing="leading"))),
        SQUARE,
    ),
    row(
        "StableDiffusionImg2Img",
        lambda: StableDiffusionImg2ImgPipeline(**sd_parts()),
        {**NO_SIZE, "num_inference_steps": 6, "strength": 0.7},
        media=lambda i: {"image": picture(i, 16)},
    ),
    row(
        "StableDiffusionInpaint",
        lambda: StableDiffusionInpaintPipeline(**sd_parts(in_channels=9)),
        SQUARE,
        media=lambda i: {"image": picture(i, 16), "mask_image": mask(i)},
    ),
    row(
        "StableDiffusionInpaintBlending",
        lambda: StableDiffusionInpaintPipeline(**sd_parts()),
        SQUARE,
        media=lambda i: {"image": picture(i, 16), "mask_image": mask(i)},
    ),
    row(
        "StableDiffusionControlNet",
        lambda: StableDiffusionControlNetPipeline(**sd_parts(), controlnet=controlnet()),
        SQUARE,
        denoisers=("unet", "controlnet"),
        media=lambda i: {"image": picture(i, 16)},
    ),
    row(
        "StableDiffusionXLImg2Img",
        lambda: StableDiffusionXLImg2ImgPipeline(**sdxl_parts(EulerAncestralDiscreteScheduler(**VP))),
        {**NO_SIZE, "num_inference_steps": 6, "strength": 0.7},
        media=lambda i: {"image": picture(i, 16)},
    ),
    row(
        "LatentConsistency",
        lambda: LatentConsistencyModelPipeline(
            **{**sd_parts(time_cond_proj_dim=16), "scheduler": LCMScheduler(**VP, original_inference_steps=50)}
        ),
        SQUARE,
        guidance=scale(8.0, 0.0),
    ),
    row(
        "DDPM",
        lambda: DDPMPipeline(unet=pixel_unet(), scheduler=DDPMScheduler(clip_sample=False)),
        {"num_inference_steps": 4, "output_type": "np"},
        guidance=None,
        prompt_key=None,
        counted=True,
    ),
    row(
        "DDIM",
        lambda: DDIMPipeline(unet=pixel_unet(), scheduler=DDIMScheduler()),
        {"num_inference_steps": 4, "output_type": "np", "eta": 0.5},
        guidance=None,
        prompt_key=None,
        counted=True,
    ),
    row(
        "ConsistencyModel",
        lambda: ConsistencyModelPipeline(
            unet=pixel_unet(num_class_embeds=10), scheduler=CMStochasticIterativeScheduler()
        ),
        {"num_inference_steps": 4, "output_type": "pt"},
        guidance=None,
        prompts=(0, 3, 7),
        prompt_key="class_labels",
        counted=True,
    ),
)
