"""Peak memory of a rollout and its update against the number of denoising steps, of which two are trained, for a long latent.

The pipeline is Wan's with random weights and patches of 8 x 8, so that a latent is large beside the activations that it takes.
Beside each number of steps stands the same with all steps but the last trained, whose trajectory holds them all. The level
right before a rollout (weights, moments) is subtracted; peaks are measured as in `update_memory`.
Target: with two trained steps the largest peak at most 1.05 times the smallest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from mmgrpo.run import Run
from mmgrpo.schedules import Plan, all_but_last, listed
from mmgrpo.transitions import flow_sde
from mmgrpo.types import Prompt
from pipelines.decisions import from_levels
from pipelines.diffusion import DiffusionPolicy
from pipelines.engine import Engine
from pipelines.options import Options
from pipelines.reverse_process import ReverseProcess

from .measuring import Bench, Size, group, options, report, started, update
from .update_memory import peak_on_cpu, peak_on_cuda

TRAINED = partial(listed, indices=(1, 2))
HEADS = {"patch_size": (1, 8, 8), "in_channels": 16, "out_channels": 16, "text_dim": 64, "freq_dim": 64}
SMALLEST = Size(
    {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 24, "ffn_dim": 48},
    (4,), words=5, latent=16, decisions=2, rows=2, guidance=1.0, dtype=torch.bfloat16, lora=None,
)  # fmt: skip
TINY = Size(  # 21 x 32 x 32 latents of 16 channels: 344,064 numbers; 0.9 million parameters
    {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512},
    (8,), words=32, latent=32, decisions=2, rows=2, guidance=1.0, dtype=torch.float32, lora=None,
)  # fmt: skip
SIZES: Mapping[str, tuple[Size, int]] = {"smallest": (SMALLEST, 3), "tiny": (TINY, 21)}  # and frames


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, tuple(SIZES))
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--offload", action="store_true", help="the trajectory waits on the CPU")
    asked = parser.parse_args(argv)
    bench = built(asked.size, asked.device, asked.offload)
    frames = SIZES[asked.size][1]
    run = started(bench)
    step(bench, run, asked.samples)  # AdamW's moments are made at the first update
    windowed, whole = (
        [measured(bench, run, asked.samples, frames, steps, plan) for steps in asked.steps]
        for plan in (TRAINED, all_but_last)
    )
    peaks = [point["peak_bytes"] for point in windowed]
    figures = {"growth": max(peaks) / min(peaks) - 1, "offload": asked.offload, "points": windowed, "all_steps": whole}
    report("video_memory", bench, figures)


def built(name: str, device: str, offload: bool) -> Bench:
    """A prepared policy of random weights whose prompts carry their embeddings."""
    diffusers.logging.set_verbosity_error()
    torch.manual_seed(0)
    (size, frames), place = SIZES[name], torch.device(device)
    still = {"temperal_downsample": [], "scale_factor_spatial": 1, "scale_factor_temporal": 1}  # a pixel a latent
    pipeline = WanPipeline(
        transformer=WanTransformer3DModel(**HEADS, **size.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(base_dim=size.channels[0], dim_mult=[1], num_res_blocks=1, **still),
        text_encoder=None, tokenizer=None,
    ).to(place, size.dtype)  # fmt: skip
    shapes = {"rollout_rows": size.rows, "replay_rows": size.rows, "offload_trajectory": offload}
    engine = Engine(pipeline, Options(call_of(size, frames, 4), from_levels(flow_sde), **shapes))
    policy = DiffusionPolicy(ReverseProcess(engine, TRAINED))
    embedding = torch.randn(size.words, HEADS["text_dim"], device=place, dtype=size.dtype)
    prompts = [Prompt(0, "", inputs={"prompt_embeds": embedding})]
    policy.prepare(prompts)
    return Bench(policy, prompts, size, place)


def call_of(size: Size, frames: int, steps: int) -> dict[str, Any]:
    shape = {"height": size.latent, "width": size.latent, "num_frames": frames}
    return {**shape, "num_inference_steps": steps, "guidance_scale": size.guidance}


def step(bench: Bench, run: Run, samples: int) -> int:
    """A rollout and its update; -> bytes of the trajectory."""
    trajectory, _ = bench.policy.rollout(group(bench, samples))
    update(run, trajectory)
    return sum(tensor.nbytes for tensor in trajectory.record.values())


def measured(bench: Bench, run: Run, samples: int, frames: int, steps: int, plan: Plan) -> dict[str, int]:
    """Peak of one rollout and its update, above the level right before."""
    engine = bench.policy.engine
    engine.options = replace(engine.options, call=call_of(bench.size, frames, steps))
    engine.measure(bench.prompts[0])
    bench.policy.process.plan = plan
    stored: list[int] = []
    peak = peak_on_cuda if bench.device.type == "cuda" else peak_on_cpu
    found = peak(lambda: stored.append(step(bench, run, samples)))
    trained = int(plan(steps, 0, 0).sum())
    return {"steps": steps, "trained": trained, "trajectory_bytes": stored[0], "peak_bytes": found}


if __name__ == "__main__":
    main()
