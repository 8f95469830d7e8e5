"""Rewards for still images: preference, alignment and aesthetic models on CLIP, and JPEG size.

Each builder loads its model once, from a local folder or a hub name, from safetensors only. Every reward converts the
image to 8 bits first (`rewards.pictures`), then applies its model's own published preprocessing, at any image size.
NaN: an image with a pixel that is not finite, or a score that is not. Axes: B samples, b of them at a time, D features.
"""

from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import open_clip
import torch
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgrpo.types import Prompt, Samples
from rewards.pictures import PictureReward, score_pictures

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Form = Literal["cosine", "original", "torchmetrics", "grpo"]
FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {  # what is called CLIPScore, from the cosine of image and text
    "cosine": lambda cosine: cosine,
    "original": lambda cosine: 2.5 * cosine.clamp(min=0),  # Hessel et al. 2021 (arXiv 2104.08718)
    "torchmetrics": lambda cosine: (100 * cosine).clamp(min=0),
    "grpo": lambda cosine: 100 * cosine / 30,  # Flow-GRPO's published code: logits / 30
}


def pick(name: str, value: str, choices: Mapping[str, object]) -> None:
    """Refuse a value that is not among the choices; raises ValueError."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


# --- CLIP in transformers ---------------------------------------------------------------------------------------------


def load_clip(model: str, revision: str, dtype: Precision, device: str) -> CLIPModel:
    pick("dtype", dtype, DTYPES)
    loaded = CLIPModel.from_pretrained(model, revision=revision, dtype=DTYPES[dtype], use_safetensors=True)
    return loaded.eval().to(device)


def image_features(pictures: list[Image.Image], clip: CLIPModel, process: CLIPImageProcessorPil) -> Tensor:
    """Projected image embeddings; -> (b, D) float32."""
    pixels = process(images=pictures, return_tensors="pt")["pixel_values"]  # (b, 3, H', W')
    return clip.get_image_features(pixel_values=pixels.to(clip.device, clip.dtype)).pooler_output.float()


def text_features(texts: list[str], clip: CLIPModel, tokenize: CLIPTokenizer) -> Tensor:
    """Projected text embeddings of the first 77 tokens, the end token included; -> (b, D) float32."""
    # always 77 wide, so that a text's embedding does not depend on its neighbours in the batch
    tokens = tokenize(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").to(clip.device)
    output = clip.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return output.pooler_output.float()


def pick_score(
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    revision: str = "main",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """exp(logit scale) * cos(image, text) / 26, typically 0.7 to 0.95.

    Source: PickScore, Kirstain et al. 2023 (arXiv 2305.01569); the division by 26 follows Flow-GRPO's code.
    `revision` is the model's; features in `dtype`, the cosine in float32. NaN as in the module's first lines.
    """
    clip = load_clip(model, revision, dtype, device)
    process, tokenize = CLIPImageProcessorPil.from_pretrained(processor), CLIPTokenizer.from_pretrained(processor)

    def score(pictures: list[Image.Image], prompts: list[Prompt]) -> Tensor:
        image = image_features(pictures, clip, process)
        text = text_features([prompt.text for prompt in prompts], clip, tokenize)
        return clip.logit_scale.float().exp() * cosine_similarity(image, text) / 26

    return partial(score_pictures, score=score, batch=batch)


def linear_head(weights: Mapping[str, Tensor], source: str) -> nn.Sequential:
    """The five linear layers D-1024-128-64-16-1 that LAION's predictor and ImageReward share, without activations.

    The published names have gaps where the dropouts were: layers.0, layers.2, layers.4, layers.6, layers.7, each with
    weight and bias. Raises ValueError for other names.
    """
    names = [f"layers.{index}.{part}" for index in (0, 2, 4, 6, 7) for part in ("weight", "bias")]
    if sorted(weights) != sorted(names):
        raise ValueError(f"the head in {source!r} holds {sorted(weights)}; expected {names}")
    head = nn.Sequential(*[nn.Linear(weights[name].shape[1], weights[name].shape[0]) for name in names[::2]])
    head.load_state_dict({ours: weights[theirs] for ours, theirs in zip(head.state_dict(), names, strict=True)})
    return head.eval()


def aesthetic(
    *,
    head: str,
    clip: str = "openai/clip-vit-large-patch14",
    revision: str = "main",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """LAION's aesthetic predictor: `linear_head` of the L2-normalised image embedding; 1 to 10, typically 4.5 to 7.

    Source: improved-aesthetic-predictor by Schuhmann, as DDPO (arXiv 2305.13301) uses it. `revision` is the CLIP model's;
    embeddings in `dtype`, the head in float32. `head` is a safetensors file with the names of the published
    sac+logos+ava1-l14-linearMSE.pth; rewards/README.md tells how to convert that one. The prompt is not looked at. NaN as in the module's first lines.
    """
    tower, layers = load_clip(clip, revision, dtype, device), linear_head(load_file(head), head).to(device)
    process = CLIPImageProcessorPil.from_pretrained(clip, revision=revision)

    def score(pictures: list[Image.Image], prompts: list[Prompt]) -> Tensor:
        scores: Tensor = layers(normalize(image_features(pictures, tower, process), dim=-1))  # (b, 1)
        return scores[:, 0]

    return partial(score_pictures, score=score, batch=batch)


# --- CLIP in open_clip ------------------------------------------------------------------------------------------------


def weight_files(model: str, pretrained: str | None) -> list[Path]:
    """The files that open_clip may load for this name and tag or file, downloaded if need be."""
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        return [file for file in folder.iterdir() if file.suffix not in (".json", ".txt", ".md")]
    if model.startswith("hf-hub:"):
        return [Path(download_pretrained_from_hf(model.removeprefix("hf-hub:")))]
    if pretrained is not None and Path(pretrained).suffix:
        return [Path(pretrained)]
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        raise ValueError(f"pretrained is {pretrained!r}; expected a .safetensors file or one of {', '.join(tags)}")
    return [Path(download_pretrained(get_pretrained_cfg(model, pretrained)))]


def refuse_pickle(model: str, pretrained: str | None) -> None:
    """open_clip would read pickled weights as well; raises ValueError unless all it may load is safetensors."""
    files = weight_files(model, pretrained)
    if not files or any(file.suffix != ".safetensors" for file in files):
        found = [str(file) for file in files]
        raise ValueError(f"model {model!r}, pretrained {pretrained!r} loads {found}; expected .safetensors files")


def clip_score(
    *,
    model: str = "ViT-L-14",
    pretrained: str | None = "openai",
    form: Form = "grpo",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """CLIPScore from the cosine c of image and text, in one of its FORMS; text cut at the model's context (77 tokens).

    cosine: c, in [-1, 1], typically 0.2 to 0.35. original: 2.5 max(c, 0), in [0, 2.5]. torchmetrics: max(100 c, 0), in
    [0, 100]. grpo: 100 c / 30, about 0.7 to 1.2. `model` is a name of open_clip with `pretrained` a tag of it or a
    safetensors file, or "hf-hub:owner/name" or "local-dir:folder" (which bring their own weights: pretrained is ignored).
    A file trained with QuickGELU, as OpenAI's, needs a model named -quickgelu; a tag knows. NaN as in the first lines.
    """
    pick("form", form, FORMS)
    pick("dtype", dtype, DTYPES)
    refuse_pickle(model, pretrained)
    quick = bool(get_pretrained_cfg(model, pretrained or "").get("quick_gelu", False))
    clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained, force_quick_gelu=quick)
    clip, tokenize = clip.eval().to(device, DTYPES[dtype]), open_clip.get_tokenizer(model)

    def score(pictures: list[Image.Image], prompts: list[Prompt]) -> Tensor:
        pixels = torch.stack([preprocess(picture) for picture in pictures])  # (b, 3, H', W')
        image = clip.encode_image(pixels.to(device, DTYPES[dtype])).float()
        text = clip.encode_text(tokenize([prompt.text for prompt in prompts]).to(device)).float()
        return FORMS[form](cosine_similarity(image, text))

    return partial(score_pictures, score=score, batch=batch)


# --- file size --------------------------------------------------------------------------------------------------------


def jpeg_incompressibility(samples: Samples, *, quality: int = 95) -> Tensor:
    """Size as a JPEG file in kB (1000 bytes), above 0; (B,). A check of the loop more than a goal.

    Source: DDPO, Black et al. 2023 (arXiv 2305.13301), section 5. 8 bits by rounding as in `rewards.pictures.to_uint8`.
    NaN: an image with a pixel that is not finite.
    """

    def size(picture: Image.Image) -> float:
        file = BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        return file.tell() / 1000

    return score_pictures(samples, lambda pictures, _: torch.tensor([size(picture) for picture in pictures]), batch=64)


def jpeg_compressibility(samples: Samples, *, quality: int = 95) -> Tensor:
    """-`jpeg_incompressibility` / 500, below 0; (B,). Source and failures: the same."""
    return -jpeg_incompressibility(samples, quality=quality) / 500
