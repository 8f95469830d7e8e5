"""Rows as policies: their prompts as a data set, their call as a recipe's."""

from pathlib import Path

import diffusers
import torch
from PIL import Image
from torch import Tensor

from mmgrpo.data import requests
from mmgrpo.draws import Draws
from mmgrpo.transitions import ddim
from mmgrpo.types import Batch, Prompt
from pipelines.decisions import from_levels
from pipelines.diffusion import DiffusionPolicy
from pipelines.engine import Engine
from pipelines.forward_process import ForwardProcess
from pipelines.options import Options
from pipelines.reverse_process import ReverseProcess

from . import TINY_PIPELINES, TinyPipeline

DDIM = from_levels(ddim)
NAMED = {row.name: row for row in TINY_PIPELINES}


def prompts_of(tiny: TinyPipeline, folder: Path) -> tuple[list[Prompt], tuple[str, ...]]:
    """The row's prompts as rows of a data set, its pictures as files, and the columns that go to the call."""
    prompts, columns = [], set()
    for number, text in enumerate(tiny.prompts):
        media, inputs, further = {}, {}, {}
        for name, value in tiny.media(number).items():
            if isinstance(value, Image.Image):
                media[name] = (folder / f"{name}{number}.png",)
                value.save(media[name][0])
            elif isinstance(value, list) and isinstance(value[0], Image.Image):
                media[name] = (folder / f"{name}{number}.png",)
                value[0].save(media[name][0], save_all=True, append_images=value[1:])
            elif isinstance(value, Tensor):
                inputs[name] = value[0]
            else:
                further[name] = value
        if tiny.prompt_key not in ("prompt", None):
            further[str(tiny.prompt_key)] = text
        columns |= set(further)
        prompts.append(Prompt(number, str(text), media, None, further, inputs))
    return prompts, tuple(sorted(columns))


def policy_of(
    tiny: TinyPipeline,
    folder: Path,
    *,
    guided: bool = False,
    dtype=torch.float32,
    kernel=DDIM,
    rows: int = 3,
    draws: Draws | None = None,
    **options,
) -> tuple[DiffusionPolicy, list[Prompt]]:
    diffusers.logging.set_verbosity_error()
    pipeline = tiny.build().to(options.pop("device", "cpu"), dtype)
    for name in tiny.precise:
        pipeline.components[name].to(torch.float32)
    call = {**tiny.call, **tiny.switch(guided)}
    call.pop("output_type", None)
    prompts, columns = prompts_of(tiny, folder)
    shapes = {"rollout_rows": rows, "replay_rows": options.pop("replay_rows", rows)}
    shapes["replay_steps"] = options.pop("replay_steps", 1)
    shapes["offload_trajectory"] = options.pop("offload_trajectory", False)
    engine = Engine(pipeline, Options(call, kernel, columns=columns, **shapes))
    policy = DiffusionPolicy(ReverseProcess(engine) if draws is None else ForwardProcess(engine, draws), **options)
    policy.prepare(prompts)
    return policy, prompts


def batch_of(prompts: list[Prompt], group_size: int = 3) -> Batch:
    return requests(prompts, [0, 1], group_size=group_size, seed=5, iteration=0)
