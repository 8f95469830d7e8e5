"""Turn prompts into the arguments of a pipeline's own call, and its result into samples."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Generator, Tensor, nn

from mmgrpo.types import Prompt
from pipelines.source_videos import Cut, is_animated, is_picture, read

Form = Literal["list", "repeat", "single"]
REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
UNLIKE_OTHERS = "prompt_embeds"  # pipelines refuse a text beside its embedding


def parameters(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's own call."""
    return inspect.signature(type(pipeline).__call__).parameters


def validate(pipeline: DiffusionPipeline, call: Mapping[str, Any]) -> None:
    """Refuse call arguments that the pipeline does not take; raises ValueError naming the nearest."""
    known = parameters(pipeline)
    for name in call:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"policy.call.{name}: {type(pipeline).__name__} takes no such argument{hint}")


def call_arguments(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Prompt],
    generators: Sequence[Generator],
    call: Mapping[str, Any],
    columns: Sequence[str],
    form: Form,
    cut: Cut,
) -> dict[str, Any]:
    """Arguments that generate one sample per prompt; `repeat` needs equal prompts and passes them once."""
    known = parameters(pipeline)
    asked = list(prompts) if form == "list" else [prompts[0]]
    alone = form == "single"
    arguments: dict[str, Any] = {}
    if "prompt" in known and UNLIKE_OTHERS not in prompts[0].inputs:
        arguments["prompt"] = [prompt.text for prompt in asked] if form == "list" else prompts[0].text
    elif "batch_size" in known:
        arguments["batch_size"] = len(prompts)
    for name in prompts[0].media:
        media = [conditions(prompt.media[name], cut) for prompt in asked]
        arguments[name] = media if form == "list" else media[0]
    for name in prompts[0].inputs:
        stacked = torch.stack([prompt.inputs[name] for prompt in prompts]).to(pipeline.device)
        arguments[name] = stacked.to(pipeline.dtype) if stacked.is_floating_point() else stacked
    for name in columns:
        arguments[name] = [prompt.columns[name] for prompt in asked]
    if form == "repeat":
        arguments[next(name for name in REPEATS if name in known)] = len(prompts)
    if "generator" in known:
        arguments["generator"] = generators[0] if alone else list(generators)
    if "output_type" in known:
        arguments["output_type"] = "pt"
    return arguments | dict(call)


def forms(pipeline: DiffusionPipeline) -> list[Form]:
    """Ways of asking for several samples at once, the most economical first."""
    ways: list[Form] = ["list"]
    if any(name in parameters(pipeline) for name in REPEATS):
        ways.append("repeat")
    return [*ways, "single"]


def conditions(paths: Sequence[Path], cut: Cut) -> Any:
    """The conditioning medium of one prompt; several files are a list."""
    media = [load_media(path, cut) for path in paths]
    return media[0] if len(media) == 1 else media


def load_media(path: Path, cut: Cut) -> Image.Image | list[Image.Image]:
    """A picture as RGB, or the chosen frames of a video or an animated picture (GIF, WebP, PNG)."""
    if is_picture(path) and not is_animated(path):
        with Image.open(path) as picture:
            return picture.convert("RGB")
    return list(read(path, cut))


def to_media(result: BaseOutput | tuple[Any, ...], count: int) -> dict[str, Tensor]:
    """The pipeline's result by the field of `Samples`: 4 axes are images, 5 videos, 3 sound; on the CPU in float32."""
    media = as_tensor(result[0]).cpu().float()
    if len(media) != count:
        raise ValueError(f"the pipeline returned {len(media)} samples for {count} prompts")
    match media.dim():
        case 4:
            return {"image": as_rgb(media).clamp(0, 1)}
        case 5:
            return {"video": as_rgb(media).clamp(0, 1)}
        case 3:
            return {"audio": media.clamp(-1, 1)}
        case 2:
            return {"audio": media.unsqueeze(1).clamp(-1, 1)}
    raise ValueError(f"the pipeline returned shape {tuple(media.shape)}; expected images, videos or sound")


def sampling_rate(modules: Mapping[str, nn.Module]) -> int | None:
    """Samples per second of the sound that the pipeline makes, from its decoder's configuration."""
    found = [attrgetter("config")(modules[name]) for name in ("vae", "vocoder") if name in modules]
    # a config of diffusers is a mapping, one of transformers becomes one
    configs: list[Mapping[str, Any]] = [one if isinstance(one, Mapping) else one.to_dict() for one in found]
    rates = [config["sampling_rate"] for config in configs if "sampling_rate" in config]
    return int(rates[-1]) if rates else None


def as_rgb(media: Tensor) -> Tensor:
    """Grey pictures become three equal channels; (..., 1 or 3, H, W) -> (..., 3, H, W)."""
    shape = list(media.shape)
    shape[-3] = 3
    return media.expand(shape) if media.shape[-3] == 1 else media


def as_tensor(media: Any) -> Tensor:
    """Pipelines answer with tensors, arrays (channels last) or lists of either."""
    if isinstance(media, (list, tuple)):
        return torch.stack([as_tensor(item) for item in media])
    if isinstance(media, np.ndarray):
        array = torch.from_numpy(media)
        return array.movedim(-1, -3) if array.dim() > 2 and array.shape[-1] in (1, 3) else array
    if isinstance(media, Image.Image):
        return torch.from_numpy(np.asarray(media.convert("RGB"))).movedim(-1, -3) / 255
    return media


def fill(whole: dict[str, Tensor], part: Mapping[str, Tensor], rows: Tensor, count: int) -> None:
    """Put the tensors of one call into those of all rows, which the first call makes: no second copy of a long video.

    Raises ValueError if a call made other tensors than the first.
    """
    if whole and whole.keys() != part.keys():
        raise ValueError(f"a call of the pipeline made {sorted(part)}; expected {sorted(whole)} as in the first")
    for name, tensor in part.items():
        if name not in whole:
            whole[name] = tensor.new_empty(count, *tensor.shape[1:])
        if whole[name].shape[1:] != tensor.shape[1:]:
            expected = tuple(whole[name].shape[1:])
            raise ValueError(
                f"a call made {name} of shape {tuple(tensor.shape[1:])}; expected {expected}, as the first"
            )
        whole[name][rows] = tensor
