"""One decoder that writes text tokens and denoises images: a language model of transformers, and what images need around it.

An image's latents are cut into patches; each is one token of the decoder, with the time of its noise added. From the hidden
states of these tokens a linear head makes the flow's velocity, noise - image. A finished image is read back as the same tokens at
time 0. This is the form of Transfusion (arXiv 2408.11039, linear patches, one set of weights for both) and, with another module of
the protocol `Hybrid`, of BAGEL (arXiv 2505.14683, weights of their own for images). Left out: U-Net patches, guidance without a prompt.
Axes: b rows, T text tokens, N tokens of an image, Q tokens of a call, L those remembered, D features, C channels, H, W of latents.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmgrpo.toml import refuse_unknown
from pipelines.token_probabilities import Head

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEYS = ("trunk", "image", "marks", "vae")
Build = Callable[[Mapping[str, Any]], nn.Module]  # config -> a module with the members of `Hybrid`
FREQUENCIES = 64  # of the time embedding, half of them sines


class Hybrid(Protocol):
    """What a policy asks of a model that writes and draws; a module of the user's own has these members."""

    latent: tuple[int, int, int]  # (C, H, W)
    tokens: int  # N

    @property
    def head(self) -> Head:
        """The last layer of text, as arithmetic."""
        ...

    def empty(self) -> Cache:
        """A memory of nothing: `crop`, `batch_select_indices` and `get_seq_length` are used of it."""
        ...

    def embed_text(self, token: Tensor) -> Tensor:
        """(b, T) int64 -> (b, T, D)."""
        ...

    def embed_image(self, latent: Tensor, t: Tensor) -> Tensor:
        """Latents (b, C, H, W) with noise of time t (b,), 0 for a finished image -> (b, N, D)."""
        ...

    def run(self, embedded: Tensor, position: Tensor, seen: Tensor, cache: Cache) -> Tensor:
        """Hidden states (b, Q, D) of tokens (b, Q, D) at positions (b, Q); `seen` (b, Q, L + Q) bool: who attends to whom.

        The cache, of L tokens, grows by Q.
        """
        ...

    def velocity(self, hidden: Tensor, t: Tensor) -> Tensor:
        """(b, N, D) hidden states of an image's tokens, (b,) -> (b, C, H, W) at least float32."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, C, H, W)."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, 3, h, w) in [0, 1]."""
        ...


class HybridModel(nn.Module):
    """A causal language model as the trunk, with patches in and a flow head out; latents are pixels in [-1, 1] without a VAE."""

    def __init__(
        self, trunk: PreTrainedModel, size: int, channels: int = 3, patch: int = 4, vae: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"image.size is {size}; expected a multiple of image.patch, {patch}")
        width, inside = trunk.get_input_embeddings().embedding_dim, channels * patch * patch
        self.patch, self.latent, self.tokens = patch, (channels, size, size), (size // patch) ** 2
        self.trunk, self.vae = trunk, vae
        self.patch_in = nn.Linear(inside, width)
        self.places = nn.Parameter(torch.randn(self.tokens, width) / math.sqrt(width))
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 2 * width)
        self.flow_head = nn.Linear(width, inside)
        for layer in (self.modulation, self.flow_head):  # the velocity starts at 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if vae is not None:
            vae.requires_grad_(False)

    @property
    def head(self) -> Head:
        layer = self.trunk.get_output_embeddings()
        return Head(layer.weight, layer.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.patch_in.weight.dtype

    def empty(self) -> Cache:
        return DynamicCache()

    def embed_text(self, token: Tensor) -> Tensor:
        embedded: Tensor = self.trunk.get_input_embeddings()(token)
        return embedded

    def embed_image(self, latent: Tensor, t: Tensor) -> Tensor:
        patches = into_patches(latent, self.patch).to(self.dtype)
        embedded: Tensor = self.patch_in(patches) + self.places + self._timed(t).unsqueeze(1)
        return embedded

    def run(self, embedded: Tensor, position: Tensor, seen: Tensor, cache: Cache) -> Tensor:
        mask = seen.unsqueeze(1)  # one for all heads
        if self.trunk.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(embedded.dtype).min).to(embedded.dtype)
        hidden: Tensor = self.trunk.base_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return hidden

    def velocity(self, hidden: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.modulation(silu(self._timed(t))).unsqueeze(1).chunk(2, dim=2)
        found = self.flow_head(hidden * (1 + scale) + shift)
        return from_patches(found.to(torch.promote_types(found.dtype, torch.float32)), self.patch, self.latent)

    def _timed(self, t: Tensor) -> Tensor:
        """Features of times in [0, 1]; (b,) -> (b, D)."""
        angle = 1000 * t.float().unsqueeze(1) * torch.logspace(0, -4, FREQUENCIES // 2, device=t.device)
        found: Tensor = self.time(torch.cat([angle.sin(), angle.cos()], dim=1).to(self.dtype))
        return found

    def encode(self, image: Tensor) -> Tensor:
        if self.vae is None:
            return image * 2 - 1
        found = self.vae.encode((image * 2 - 1).to(self.vae.dtype)).latent_dist.mode().float()
        return (found - self._shift) * self.vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        if self.vae is not None:
            latent = latent / self.vae.config.scaling_factor + self._shift
            latent = self.vae.decode(latent.to(self.vae.dtype)).sample.float()
        return (latent / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        assert self.vae is not None
        return self.vae.config.shift_factor or 0.0


def into_patches(latent: Tensor, patch: int) -> Tensor:
    """(b, C, H, W) -> (b, N, C patch^2), row by row."""
    rows, channels, height, width = latent.shape
    cut = latent.view(rows, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch * patch)


def from_patches(patches: Tensor, patch: int, latent: tuple[int, int, int]) -> Tensor:
    """The inverse of `into_patches`; -> (b, C, H, W)."""
    channels, height, width = latent
    cut = patches.view(len(patches), height // patch, width // patch, channels, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), channels, height, width)


# On disk: a folder with config.json {trunk, image, marks, vae}, model.safetensors, and the tokenizer's files


def create(config: Mapping[str, Any], attention: str = "sdpa", where: str = "policy.new") -> HybridModel:
    """A new model of `{"trunk", "image": {"size", "channels", "patch"}, "marks", "vae"}`; raises ValueError.

    The trunk is a transformers config with its model_type, or a folder or hub name whose weights are taken; so is the VAE, of
    diffusers, if there is one. What images need around the trunk is random.
    """
    refuse_unknown(config, KEYS, where)
    for key in KEYS[:3]:
        if key not in config:
            raise ValueError(f"{where}.{key} is missing; expected {', '.join(KEYS[:3])}, and vae if there is one")
    trunk, vae = config["trunk"], config.get("vae")
    if isinstance(trunk, str):
        decoder = AutoModelForCausalLM.from_pretrained(trunk, attn_implementation=attention, dtype=torch.float32)
    else:
        decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(**trunk), attn_implementation=attention)
    if isinstance(vae, str):
        coder = AutoencoderKL.from_pretrained(vae)
    else:
        coder = None if vae is None else AutoencoderKL.from_config(vae)
    return HybridModel(decoder, **config["image"], vae=coder)


def described(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config from which `create` makes the model again without any other folder."""
    if not isinstance(model, HybridModel):
        return dict(config)
    found = {**config, "trunk": plain(model.trunk.config.to_dict())}
    return found if model.vae is None else {**found, "vae": plain(dict(model.vae.config))}


def opened(
    model: str | None, new: Mapping[str, Any] | None, build: Build | None, attention: str
) -> tuple[Any, dict[str, Any]]:
    """The model of a folder, or a new one of a config, and its config; raises ValueError unless one of them is asked for."""
    if (model is None) == (new is None):
        raise ValueError(f"policy.model is {model!r} and policy.new is {new!r}; expected one of them")
    if model is not None:
        return load(Path(model), build, attention)
    assert new is not None
    return create(new, attention) if build is None else build(new), dict(new)


def load(folder: Path, build: Build | None = None, attention: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder and its config; raises ValueError naming the file. `build` makes a module of the user's own."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"policy.model is {str(folder)!r}, which has no {name}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model = create(config, attention, str(folder / CONFIG)) if build is None else build(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:  # torch lists every name and shape that differs, a line each
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {' '.join(str(error).split())[:300]}") from error
    return model, config


def save(folder: Path, model: nn.Module, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the folder; weights keep their dtype, and tied ones are written under each of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(described(model, config), indent=2) + "\n", encoding="utf-8")
    save_file({name: value.clone().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    tokenizer.save_pretrained(folder)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A library's config as JSON holds it, without notes on where it came from."""
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name != "dtype"}
    return dict(json.loads(json.dumps(kept, default=str)))
