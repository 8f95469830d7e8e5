"""Small clips for tests of video rewards, and tiny random networks for them, written where they are asked for."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import alexnet
from torchvision.models.optical_flow import raft_small
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from mmgrpo.types import Batch, Prompt, Samples


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(seed: int = 0, count: int = 3, frames: int = 5, height: int = 36, width: int = 44) -> Tensor:
    """Clips whose samples differ in how much changes from frame to frame; (B, F, 3, H, W) in [0, 1]."""
    still = torch.rand(count, 1, 3, height, width, generator=seeded(seed))
    noise = torch.rand(count, frames, 3, height, width, generator=seeded(seed + 1))
    share = torch.linspace(0.2, 0.6, count)[:, None, None, None, None]
    return (1 - share) * still + share * noise


def clip_samples(
    video: Tensor | None, source: Tensor | None = None, prompts: tuple[Prompt, ...] | None = None
) -> Samples:
    texts = ("a red cat", "two blue dogs", "a house", "a tree")
    if prompts is None:
        columns = [{"edited_caption": f"{text} at night", "source_caption": text} for text in texts]
        prompts = tuple(
            Prompt(row, texts[row], columns=columns[row]) for row in range(0 if video is None else len(video))
        )
    ids = torch.arange(len(prompts))
    return Samples(Batch(prompts, ids, ids, seed=0, iteration=0), video=video, source_video=source)


def tiny_dino(folder: Path) -> str:
    """A random DINOv2 of 16 features for pictures of 28 px, patches of 7 px, as transformers saves it."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(image_size=28, patch_size=7, **sizes))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # far enough from the initial values to tell frames apart
    model.save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return str(folder)


def tiny_raft(file: Path) -> str:
    """A random raft_small, whose flows are of a few pixels."""
    torch.manual_seed(5)
    save_file(raft_small(weights=None).state_dict(), str(file))
    return str(file)


def tiny_lpips(file: Path) -> str:
    """A random AlexNet with random rows, under the published names."""
    torch.manual_seed(6)
    weights = {name: value for name, value in alexnet(weights=None).state_dict().items() if name.startswith("features")}
    for at, wide in enumerate((64, 192, 384, 256, 256)):
        weights[f"lin{at}.model.1.weight"] = torch.rand(1, wide, 1, 1, generator=seeded(at))
    save_file(weights, str(file))
    return str(file)
