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
policy           rows as policies
"""

from . import audio, edit, image_dit, image_embedding, image_flow, unet, video, video_more
from .record import PROMPTS, Guidance, TinyPipeline

REQUIRED = (*unet.REQUIRED, *image_flow.REQUIRED, *edit.REQUIRED, *video.REQUIRED)
"""The parity table."""

ADDITIONAL = (
    *unet.ADDITIONAL,
    *edit.ADDITIONAL,
    *image_dit.ADDITIONAL,
    *image_embedding.ADDITIONAL,
    *video.ADDITIONAL,
    *video_more.ADDITIONAL,
    *audio.ADDITIONAL,
)
"""More schedulers, guidance mechanisms and conditioning."""

TINY_PIPELINES = (*REQUIRED, *ADDITIONAL)

__all__ = ["ADDITIONAL", "PROMPTS", "REQUIRED", "TINY_PIPELINES", "Guidance", "TinyPipeline"]
