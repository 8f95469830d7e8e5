"""How near a text is to its prompt, and features of images, by local encoders of transformers from safetensors. D features."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from mmgrpo.types import Reward, Samples
from rewards.answers import texts
from rewards.image import DTYPES, Precision, pick
from rewards.pictures import Embed, pictures
from rewards.video import embed_clip, embed_tokens

ImageFeatures = Callable[
    [Sequence[Tensor]], Tensor
]  # n images (3, H, W) in [0, 1] of any size -> (n, D) float32, on the CPU
Pooling = Literal["mean", "first"]


def text_similarity(
    *,
    model: str,
    revision: str = "main",
    pooling: Pooling = "mean",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> Reward:
    """max(0, cos) of the embeddings of a text and of its prompt; (B,) in [0, 1], 0 for an empty text.

    The embedding is the mean of the encoder's last states, or the first of them. Texts are cut at the encoder's context.
    Source: Sentence-BERT (arXiv 1908.10084).
    """
    pick("dtype", dtype, DTYPES)
    encoder = AutoModel.from_pretrained(model, revision=revision, dtype=DTYPES[dtype], use_safetensors=True)
    encoder, tokenize = encoder.eval().to(device), AutoTokenizer.from_pretrained(model, revision=revision)
    longest = min(tokenize.model_max_length, encoder.config.max_position_embeddings)

    def embed(said: list[str]) -> Tensor:
        tokens = tokenize(said, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        states = encoder(**tokens).last_hidden_state.float()
        there = tokens["attention_mask"].unsqueeze(2)
        return states[:, 0] if pooling == "first" else (states * there).sum(1) / there.sum(1)

    @torch.no_grad()
    def score(samples: Samples) -> Tensor:
        pairs = list(zip(texts(samples), (prompt.text for prompt in samples.prompts), strict=True))
        values = torch.zeros(len(pairs))
        rows = [row for row, (said, _) in enumerate(pairs) if said.strip()]
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            said, asked = (embed([pairs[row][side] for row in part]) for side in (0, 1))
            values[part] = cosine_similarity(said, asked).clamp(min=0).cpu()
        return values

    return score


def features(
    *,
    model: str,
    kind: Literal["clip", "dino"] = "clip",
    revision: str = "main",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> ImageFeatures:
    """Features of images: CLIP's projected embedding, or the class token's state of DINO and its like.

    Images become 8 bits and go through the model's own preprocessing, `batch` at a time.
    """
    if kind == "clip":
        embed: Embed = embed_clip(model, revision, dtype, device)
    else:
        tokens = embed_tokens(model, revision, dtype, device)
        embed = lambda seen: tokens(seen)[:, 0]  # noqa: E731

    @torch.no_grad()
    def found(images: Sequence[Tensor]) -> Tensor:
        seen = [picture for image in images for picture in pictures(image.unsqueeze(0))]
        parts = [embed(seen[start : start + batch]).float().cpu() for start in range(0, len(seen), batch)]
        return torch.cat(parts)

    return found
