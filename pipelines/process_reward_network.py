"""A process reward model: what reward a sample will get, read off its noisy latents, their noise level and its prompt.

A transformer over patches of latents of any shape, (B, C, H, W), (B, C, F, H, W) or (B, L, C), and the words of the prompt.
Words are hashed into a table of learned embeddings: pipelines have no common name for what their own encoders say.
Conditions other than words (a first frame, a source video) are not seen.
Axes: B samples, C channels, L tokens of latents, W words of a prompt, D features.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mmgrpo.components import typed
from mmgrpo.types import Prompt, require_shape
from pipelines.speech_networks import TimeEmbedding

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Sizes:
    """What a network is made with."""

    channels: int  # C
    axes: int  # of latents beside samples and channels: 1 to 3
    patch: int = 2  # latents of a token along each axis, of axes that hold them; a sequence is not cut
    width: int = 96  # D
    blocks: int = 4
    heads: int = 4
    vocabulary: int = 4096  # entries that words are hashed to
    words: int = 77  # of a prompt that are read

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % (2 * self.heads):
            raise ValueError(f"width is {self.width} with {self.heads} heads; expected a multiple of twice the heads")
        if min(self.channels, self.patch, self.blocks, self.words) < 1 or not 1 <= self.axes <= 3:
            raise ValueError(f"{self} arrived; expected at least one of each, and at most 3 axes")
        if self.vocabulary < 2:
            raise ValueError(f"vocabulary is {self.vocabulary}; expected at least 2, entry 0 stands for no word")


class ProcessReward(nn.Module):
    """(x_t, t, prompts) -> the expected reward of the sample that x_t becomes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.width
        area = sizes.patch**sizes.axes if sizes.axes > 1 else 1
        self.enter = nn.Linear(sizes.channels * area, width)
        self.places = nn.Linear(2 * PLACES * sizes.axes, width)
        self.vocabulary = nn.Embedding(sizes.vocabulary, width, padding_idx=0)
        self.order = nn.Linear(2 * PLACES, width)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, sizes.heads, sizes.axes) for _ in range(sizes.blocks))
        self.normalise = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 1)

    def forward(self, state: Tensor, level: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, ...) on the flow's path, (B,) in [0, 1], B prompts -> (B,) in the units of the reward."""
        require_shape("level", level, len(state))
        patches, grid = self._patches(state)
        latents = self.enter(patches) + self.places(grid_waves(grid, state.device))  # (B, L, D)
        numbers = hashed([prompt.text for prompt in prompts], self.sizes).to(state.device)  # (B, W)
        words = self.vocabulary(numbers) + self.order(waves(torch.arange(numbers.shape[1], device=state.device)))
        tokens = torch.cat([latents, words], 1)
        there = torch.cat([torch.ones(patches.shape[:2], dtype=torch.bool, device=state.device), numbers > 0], 1)
        time = self.time(level.to(latents))
        for block in self.blocks:
            tokens = block(tokens, time, there[:, None, None], grid)
        return self.leave(self.normalise(tokens[:, : patches.shape[1]].mean(1))).squeeze(1)

    def _patches(self, state: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens (B, L, C * area), and how many lie along each axis; raises ValueError if they do not fit."""
        sizes = self.sizes
        if (found := latent_axes(state)) != (sizes.channels, sizes.axes):
            raise ValueError(
                f"latents of shape {tuple(state.shape)} have {found[0]} channels along {found[1]} axes; the process reward "
                f"model reads {sizes.channels} along {sizes.axes}"
            )
        if sizes.axes == 1:
            return state, tuple(state.shape[1:2])
        for axis in range(2, state.dim()):
            state = cut(state, axis, sizes.patch)
        tokens = state.flatten(2, 1 + sizes.axes).transpose(1, 2).flatten(2)
        return tokens, tuple(state.shape[2 : 2 + sizes.axes])


def latent_axes(state: Tensor) -> tuple[int, int]:
    """Channels, and axes beside them: of three axes (B, L, C) the last is the channels, of more (B, C, ...) the second."""
    if not 3 <= state.dim() <= 5:
        raise ValueError(f"latents have shape {tuple(state.shape)}; expected 3 to 5 axes")
    return (state.shape[2], 1) if state.dim() == 3 else (state.shape[1], state.dim() - 2)


def cut(state: Tensor, axis: int, patch: int) -> Tensor:
    """An axis as patches, padded with zeros to whole ones; what lies inside of a patch moves to the end."""
    padding = [0, 0] * (state.dim() - 1 - axis) + [0, -state.shape[axis] % patch]
    return functional.pad(state, padding).unflatten(axis, (-1, patch)).movedim(axis + 1, -1)


PLACES = 8  # wavelengths of a place, from 4 to 4 * 2^7 tokens


def grid_waves(grid: Sequence[int], device: torch.device) -> Tensor:
    """Waves of every place of a grid, axis beside axis; -> (L, 2 PLACES axes)."""
    along = torch.meshgrid(*(torch.arange(length, device=device) for length in grid), indexing="ij")
    return torch.cat([waves(place.flatten()) for place in along], 1)


def waves(place: Tensor) -> Tensor:
    """Sines and cosines of places (L,) int64; -> (L, 2 PLACES)."""
    angle = place[:, None] * (torch.pi / 2 / 2.0 ** torch.arange(PLACES, device=place.device))
    return torch.cat([angle.sin(), angle.cos()], 1)


class Block(nn.Module):
    """What neighbouring latents make together, attention, and a perceptron, the latter two scaled and shifted by the time."""

    def __init__(self, width: int, heads: int, axes: int) -> None:
        super().__init__()
        self.around = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](width, width, 3, padding=1)
        self.heads = heads
        self.normalise = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 4 * width)
        self.triple = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, time: Tensor, there: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, L, D), (B, D), (B, 1, 1, L) bool: the token exists, places along each axis of the first ones -> (B, L, D)."""
        latents = math.prod(grid)
        near = self.around(functional.silu(x[:, :latents]).transpose(1, 2).unflatten(2, tuple(grid)))
        x = torch.cat([x[:, :latents] + near.flatten(2).transpose(1, 2), x[:, latents:]], 1)
        shift, scale, shift_after, scale_after = self.modulation(time)[:, None].chunk(4, 2)
        inner = self.normalise(x) * (1 + scale) + shift
        query, key, value = self.triple(inner).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=there)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.normalise(x) * (1 + scale_after) + shift_after)


def hashed(texts: Sequence[str], sizes: Sizes) -> Tensor:
    """Entries of the first words of each text, 0 beyond its end; -> (B, W) int64, W at least 1."""
    rows = [[entry(word, sizes.vocabulary) for word in words_of(text)[: sizes.words]] for text in texts]
    longest = max(1, *map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def words_of(text: str) -> list[str]:
    """Words in small letters, and every other sign that is not a space by itself."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def entry(word: str, vocabulary: int) -> int:
    """1 to vocabulary - 1, the same in every process."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % (vocabulary - 1)


# -- on disk


def save(folder: Path, network: ProcessReward) -> None:
    """Write config.json and model.safetensors, which `load` reads back bit for bit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(asdict(network.sizes), indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)


def load(folder: Path) -> ProcessReward:
    """The model of a folder, in evaluation mode on the CPU; raises ValueError in one line that names the file."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; expected a process reward model written by mmgrpo")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    network = ProcessReward(typed(config, Sizes, str(folder / CONFIG)))
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:  # torch lists every name and shape that differs, a line each
        raise ValueError(f"{folder / WEIGHTS} does not fit: {' '.join(str(error).split())[:300]}") from error
    return network.eval().requires_grad_(False)
