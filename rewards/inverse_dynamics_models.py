"""Inverse-dynamics models: loading them frozen, and a small network that reads pairs of frames and then the whole clip.

Axes: b clips, F frames, n = F - 1 actions, C classes of an action's component, D features, H, W px.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmgrpo.components import locate
from rewards.inverse_dynamics import Recover

Precision = Literal["float32", "bfloat16", "float16"]


def pretrained(
    *, source: str, network: str, revision: str = "main", dtype: Precision = "float32", device: str = "cpu"
) -> Recover:
    """A frozen model from a folder or hub name, safetensors only.

    network: its class, "module:Class" or "path/to/file.py:Class", a `ModelMixin` of diffusers or a `PreTrainedModel` of
    transformers, whose forward takes clips (b, F, 3, H, W) in [0, 1] and returns logits (b, n, C), or one for each component.
    """
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise ValueError(f"source is {source!r}, and there is no such folder")
    found: Any = locate(network, "network")
    usable = isinstance(found, type) and issubclass(found, ModelMixin | PreTrainedModel)
    if not usable:
        raise ValueError(
            f"network is {network!r}; expected a ModelMixin of diffusers or a PreTrainedModel of transformers"
        )
    model = found.from_pretrained(source, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True)
    model = model.to(device).eval().requires_grad_(False)

    def recover(video: Tensor) -> Tensor | list[Tensor]:
        logits = model(video.to(model.device, model.dtype))
        return logits.float() if isinstance(logits, Tensor) else [values.float() for values in logits]

    return recover


class FramePairs(ModelMixin, ConfigMixin):
    """Convolutions over each pair of neighbouring frames, then over the pairs before and after; reads any size and length."""

    @register_to_config
    def __init__(self, classes: tuple[int, ...], width: int = 32, features: int = 64) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(6, width, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(width, features, 3, stride=2, padding=1), nn.GroupNorm(8, features), nn.SiLU(),
            nn.Conv2d(features, features, 3, padding=1), nn.GroupNorm(8, features), nn.SiLU(),
        )  # fmt: skip
        self.neighbours = nn.Conv1d(features, features, 3, padding=1)
        self.heads = nn.ModuleList(nn.Linear(features, count) for count in classes)

    def forward(self, video: Tensor) -> list[Tensor]:
        """Logits of each component, (b, n, C), of clips (b, F, 3, H, W) in [0, 1]."""
        pairs = torch.cat([video[:, :-1], video[:, 1:]], 2) * 2 - 1  # (b, n, 6, H, W)
        seen = self.look(pairs.flatten(0, 1)).mean((2, 3)).unflatten(0, pairs.shape[:2])  # (b, n, D)
        seen = seen + nn.functional.silu(self.neighbours(seen.mT)).mT
        return [head(seen) for head in self.heads]
