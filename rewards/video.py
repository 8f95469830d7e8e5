"""Rewards for videos from single frames: any image reward frame by frame, and the consistency of features in time.

Axes: B samples, F frames of a clip, n of them chosen, 3 channels, H, W height and width, D features, N patches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgrpo.types import Reward, Samples, require_shape
from rewards.compose import components
from rewards.image import DTYPES, Precision, image_features, load_clip, pick
from rewards.pictures import (
    Embed,
    Frames,
    PictureReward,
    choose,
    edits,
    frame_features,
    require_frames,
    videos,
    whole,
)

Over = Literal["mean", "min", "first"]
REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {  # (B, n) -> (B,)
    "mean": lambda scores: scores.mean(1),
    "min": lambda scores: scores.amin(1),
    "first": lambda scores: scores[:, 0],
}


# ---- frame by frame


def framewise(*, reward: Reward, over: Over = "mean", frames: Frames = None) -> Reward:
    """An image reward applied to frames of each sample's own clip, beside its own prompt; (B,) or its components (B,).

    Over the chosen frames (`choose`) the mean, the minimum, or the first of them alone; range: the image reward's. Read
    one frame of all samples at a time. NaN: the clip has a pixel that is not finite, or one of the chosen frames has no
    opinion, which neither the mean nor the minimum passes over.
    """
    pick("over", over, REDUCTIONS)

    def score(samples: Samples) -> Tensor | Mapping[str, Tensor]:
        video = videos(samples)
        chosen = choose(video.shape[1], frames)[: 1 if over == "first" else None]
        found = [reward(frame_of(samples, index)) for index in chosen]
        parts = [components("frame", values, len(samples)) for values in found]
        fine = whole(video)
        reduced = {name: reduce_frames([part[name] for part in parts], over, fine) for name in parts[0]}
        if isinstance(found[0], Tensor):
            return reduced["frame"]
        return {name.removeprefix("frame/"): value for name, value in reduced.items()}

    return score


def frame_of(samples: Samples, index: int) -> Samples:
    """The same samples as if each were an image, its clip's frame at `index`."""
    return replace(samples, image=videos(samples)[:, index], video=None, source_video=None)


def reduce_frames(scores: Sequence[Tensor], over: Over, fine: Tensor) -> Tensor:
    """n scores (B,) and which clips are whole -> (B,) float32 on the CPU; NaN counts as in `framewise`."""
    table = torch.stack([score.float().cpu() for score in scores], dim=1)  # (B, n)
    return torch.where(fine & ~table.isnan().any(1), REDUCTIONS[over](table), torch.nan)


# ---- features of frames


def embed_clip(model: str, revision: str, dtype: Precision, device: str) -> Embed:
    """CLIP's projected image embedding of a picture; D features."""
    clip = load_clip(model, revision, dtype, device)
    process = CLIPImageProcessorPil.from_pretrained(model, revision=revision)
    return lambda pictures: image_features(pictures, clip, process)


def embed_tokens(model: str, revision: str, dtype: Precision, device: str) -> Embed:
    """The last states of a vision transformer such as DINO or DINOv2, after its own preprocessing; (b, 1 + N, D).

    The class token's state, then those of the N patches, row by row, without what a model puts between (registers).
    """
    pick("dtype", dtype, DTYPES)
    network = AutoModel.from_pretrained(model, revision=revision, dtype=DTYPES[dtype], use_safetensors=True)
    network = network.eval().to(device)
    process = AutoImageProcessor.from_pretrained(model, revision=revision, backend="pil")
    side = network.config.patch_size

    def embed(pictures: list[Image.Image]) -> Tensor:
        pixels = process(images=pictures, return_tensors="pt")["pixel_values"].to(device, DTYPES[dtype])
        states = network(pixel_values=pixels).last_hidden_state
        patches = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)  # N
        return torch.cat([states[:, :1], states[:, -patches:]], dim=1)

    return embed


# ---- consistency in time


def adjacent_consistency(features: Tensor) -> Tensor:
    """mean over t >= 2 of cos(e_t, e_{t-1}); (B, F, D) -> (B,) in [-1, 1]."""
    require_shape("features", features, None, None, None)
    require_frames(features.shape[1], 2)
    return cosine_similarity(features[:, 1:], features[:, :-1], dim=-1).mean(1)


def subject_consistency_of(features: Tensor) -> Tensor:
    """mean over t >= 2 of (cos(d_1, d_t) + cos(d_{t-1}, d_t)) / 2; (B, F, D) -> (B,) in [-1, 1].

    Source: subject consistency of VBench (arXiv 2311.17982), which cuts negative cosines off at 0; here they count.
    """
    adjacent = adjacent_consistency(features)
    return (cosine_similarity(features[:, 1:], features[:, :1], dim=-1).mean(1) + adjacent) / 2


def clip_consistency(
    *,
    model: str = "openai/clip-vit-large-patch14",
    revision: str = "main",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """Mean cosine of the CLIP embeddings of adjacent frames; (B,) in [-1, 1], typically 0.9 to 1. All frames count.

    A frozen clip has 1: pair it with motion (`rewards.motion:moving`). `batch` frames at a time, features in `dtype`,
    cosines in float32. NaN: a clip with a pixel that is not finite.
    """
    embed = embed_clip(model, revision, dtype, device)
    return lambda samples: adjacent_consistency(frame_features(videos(samples), embed, batch=batch))


def subject_consistency(
    *,
    model: str = "facebook/dinov2-base",
    revision: str = "main",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """`subject_consistency_of` DINO's class tokens; (B,) in [-1, 1]. All frames count.

    `model` is a folder or hub name of a vision transformer in safetensors (VBench takes DINO's ViT-B/16). A frozen clip
    has 1, as above; memory, precision and NaN too.
    """
    tokens = embed_tokens(model, revision, dtype, device)
    return lambda samples: subject_consistency_of(
        frame_features(videos(samples), lambda pictures: tokens(pictures)[:, 0], batch=batch)
    )


def source_likeness(
    *,
    model: str = "openai/clip-vit-large-patch14",
    revision: str = "main",
    frames: Frames = None,
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """Mean cosine of the CLIP embeddings of a frame and the same frame of the source; (B,) in [-1, 1], a copy 1.

    Over the chosen frames (`choose`). Memory, precision and NaN as in `clip_consistency`, of the source too.
    """
    embed = embed_clip(model, revision, dtype, device)

    def score(samples: Samples) -> Tensor:
        video, source = edits(samples)
        chosen = choose(video.shape[1], frames)
        ours, theirs = (frame_features(clip, embed, batch=batch, chosen=chosen) for clip in (video, source))
        scores = cosine_similarity(ours, theirs, dim=-1).mean(1)
        return torch.where(whole(video) & whole(source), scores, torch.nan)

    return score
