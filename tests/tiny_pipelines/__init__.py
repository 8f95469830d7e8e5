"""Tiny random diffusers pipelines that need no download, one row each.

record           what is known about a row, and how to call it
parts            tokenizers, text encoders, image encoders and VAEs that the rows share
image_flow       text to image on flow matching: the parity table
edit             image to image and editing on flow matching
unet             Stable Diffusion and its relatives, pixels without a VAE, consistency models
image_dit        more image transformers
image_embedding  pictures from image embeddings and class labels; two pipelines in one
video            text and image to video
video_more       audio-video, per-frame noise levels, a variance-exploding video model
audio            text to audio
audio_more       text to audio by way of a language model: too slow for a row
controls         control networks, adapters, inpainting and image conditioning
guided_apart     guidance by networks of their own and by guider objects
cascade          a decoder alone, and with its prior in one pipeline
image_more       a consistency sampler, a learned variance, embeddings instead of texts
newer            average velocities, a linear video model
video_edit       videos from videos, instructions, pictures and masks; motion modules; per-token timesteps
policy           rows as policies
"""

from . import (
    audio,
    cascade,
    controls,
    edit,
    guided_apart,
    image_dit,
    image_embedding,
    image_flow,
    image_more,
    newer,
    unet,
    video,
    video_edit,
    video_more,
)
from .record import PROMPTS, Guidance, TinyPipeline

REQUIRED = (*unet.REQUIRED, *image_flow.REQUIRED, *edit.REQUIRED, *video.REQUIRED, *video_edit.REQUIRED)
"""The parity table."""

ADDITIONAL = (
    *unet.ADDITIONAL,
    *edit.ADDITIONAL,
    *image_dit.ADDITIONAL,
    *image_embedding.ADDITIONAL,
    *video.ADDITIONAL,
    *video_more.ADDITIONAL,
    *audio.ADDITIONAL,
    *controls.ADDITIONAL,
    *image_more.ADDITIONAL,
    *cascade.ADDITIONAL,
    *guided_apart.ADDITIONAL,
    *video_edit.ADDITIONAL,
    *newer.ADDITIONAL,
)
"""More schedulers, guidance mechanisms and conditioning."""

TINY_PIPELINES = (*REQUIRED, *ADDITIONAL)

__all__ = ["ADDITIONAL", "PROMPTS", "REQUIRED", "TINY_PIPELINES", "Guidance", "TinyPipeline"]
