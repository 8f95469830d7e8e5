"""What the benchmarks share: a Stable Diffusion 3 pipeline of random weights as a policy, paired times, rates, one JSON line.

Axes: B samples, S trained decisions, L words of a prompt, D features. No text encoder is built: prompts carry their
embeddings. The last step of a call is deterministic, so S decisions take S + 1 denoising steps.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmgrpo import recipe, trainer
from mmgrpo.advantages import standardized
from mmgrpo.aggregations import seq_mean
from mmgrpo.data import requests
from mmgrpo.improve import Loss
from mmgrpo.journal import peak_memory
from mmgrpo.objectives import clipped
from mmgrpo.run import Run
from mmgrpo.shadow import Reference
from mmgrpo.transitions import flow_sde
from mmgrpo.types import Batch, Prompt, Trajectory
from pipelines.decisions import from_levels
from pipelines.diffusion import DiffusionPolicy
from pipelines.engine import Engine
from pipelines.options import Options
from pipelines.reverse_process import ReverseProcess

ADAPTERS = {"rank": 32, "alpha": 64}  # of Flow-GRPO's Stable Diffusion 3.5, as in the recipe sd35_medium_ocr
HEADS = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "qk_norm": "rms_norm"}
DECODER = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609}


@dataclass(frozen=True)
class Size:
    """A pipeline's configuration and how it is called."""

    transformer: Mapping[str, Any]
    channels: tuple[int, ...]  # of the VAE's levels, each half as large as the one before
    words: int  # L
    latent: int  # side of the latents
    decisions: int  # S
    rows: int  # samples in one call of the pipeline
    guidance: float  # above 1 each sample is two rows of the denoiser
    dtype: torch.dtype
    lora: Mapping[str, Any] | None  # None: every weight is trained


SMALLEST = Size(  # the path of sd35_medium at toy size
    {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64, "caption_projection_dim": 64,
     "pooled_projection_dim": 32, "sample_size": 8, "pos_embed_max_size": 16, "dual_attention_layers": (0,)},
    (32, 32), words=5, latent=8, decisions=2, rows=2, guidance=4.5, dtype=torch.bfloat16, lora=ADAPTERS,
)  # fmt: skip
TINY = Size(  # 29 million parameters
    {"num_layers": 5, "num_attention_heads": 6, "joint_attention_dim": 256, "caption_projection_dim": 384,
     "pooled_projection_dim": 128, "sample_size": 16, "pos_embed_max_size": 32, "dual_attention_layers": (0, 1, 2)},
    (32, 64), words=32, latent=16, decisions=3, rows=4, guidance=1.0, dtype=torch.float32, lora=None,
)  # fmt: skip
SD35_MEDIUM = Size(  # 2,243 million parameters; 512 x 512 pixels in 10 steps, as in the recipe sd35_medium_ocr
    {"num_layers": 24, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
     "pooled_projection_dim": 2048, "sample_size": 128, "pos_embed_max_size": 384,
     "dual_attention_layers": tuple(range(13))},
    (128, 256, 512, 512), words=333, latent=64, decisions=9, rows=4, guidance=4.5, dtype=torch.bfloat16, lora=ADAPTERS,
)  # fmt: skip
SIZES = {"smallest": SMALLEST, "tiny": TINY, "sd35_medium": SD35_MEDIUM}


class Bench(NamedTuple):
    """A policy that is ready to be measured."""

    policy: DiffusionPolicy
    prompts: list[Prompt]
    size: Size
    device: torch.device


def options(about: str | None, sizes: Sequence[str] = tuple(SIZES)) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=sizes, default="tiny")
    return parser


def built(size: str, device: str, *, decisions: int = 0, rows: int = 0, replay_steps: int = 1) -> Bench:
    """A prepared policy of random weights; 0 stands for the size's own number of decisions and rows."""
    diffusers.logging.set_verbosity_error()
    torch.manual_seed(0)
    chosen, place = SIZES[size], torch.device(device)
    chosen = replace(chosen, decisions=decisions or chosen.decisions, rows=rows or chosen.rows)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**HEADS, **chosen.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=decoder(chosen.channels),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    ).to(place, chosen.dtype)  # fmt: skip
    shapes = {"rollout_rows": chosen.rows, "replay_rows": chosen.rows, "replay_steps": replay_steps}
    engine = Engine(pipeline, Options(call_of(chosen), from_levels(flow_sde), **shapes))
    policy = DiffusionPolicy(ReverseProcess(engine), lora=chosen.lora)
    prompts = [prompt(number, chosen, place) for number in range(2)]
    policy.prepare(prompts)
    return Bench(policy, prompts, chosen, place)


def decoder(channels: Sequence[int]) -> AutoencoderKL:
    down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    levels = {"down_block_types": down, "up_block_types": up, "block_out_channels": tuple(channels)}
    return AutoencoderKL(layers_per_block=2, scaling_factor=1.5305, **DECODER, **levels)


def call_of(size: Size) -> dict[str, Any]:
    side = size.latent * 2 ** (len(size.channels) - 1)  # pixels
    steps = size.decisions + 1
    return {"height": side, "width": side, "num_inference_steps": steps, "guidance_scale": size.guidance}


def prompt(number: int, size: Size, device: torch.device) -> Prompt:
    """A prompt of random embeddings, and, where there is guidance, those of the empty one."""
    generator = torch.Generator().manual_seed(number)
    shapes = {
        "prompt_embeds": (size.words, size.transformer["joint_attention_dim"]),
        "pooled_prompt_embeds": (size.transformer["pooled_projection_dim"],),
    }
    if size.guidance > 1:
        shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Prompt(number, "", inputs={name: tensor.to(device, size.dtype) for name, tensor in drawn.items()})


def with_decisions(bench: Bench, decisions: int) -> Bench:
    """The same policy with another number of decisions."""
    size, engine = replace(bench.size, decisions=decisions), bench.policy.engine
    engine.options = replace(engine.options, call=call_of(size))
    engine.measure(bench.prompts[0])
    return bench._replace(size=size)


def group(bench: Bench, samples: int) -> Batch:
    """So many samples of the first prompt."""
    return requests(bench.prompts, [0], group_size=samples, seed=0, iteration=0)


def started(bench: Bench) -> Run:
    """A run of the trainer that needs no reward: AdamW, the clipped objective, no reference."""
    settings = recipe.Recipe(
        seed=0, policy={}, prompts=recipe.Prompts(""), rewards=(), advantage={}, objective={}, loss=recipe.Loss(),
        reference=recipe.Reference(), ema=recipe.Ema(), optimizer=recipe.Optimizer(1e-6),
        train=recipe.Train(iterations=1, prompts=1, group_size=2), evaluation=recipe.Evaluation(""),
    )  # fmt: skip
    trained = bench.policy.trainable()
    return Run(
        recipe=settings, policy=bench.policy, prompts=bench.prompts, held_out=[], rewards={}, compare=standardized,
        loss=Loss(clipped), aggregate=seq_mean, reference=Reference("none", trained), average=None,
        optimizer=torch.optim.AdamW(trained.values(), 1e-6, fused=True),
    )  # fmt: skip


def update(run: Run, trajectory: Trajectory) -> None:
    """The trainer's own update from all rows of a trajectory, under random advantages."""
    values, everything = advantages(trajectory), torch.ones(len(trajectory), dtype=torch.bool)
    judged = trainer.Judged(values, everything, None, torch.zeros_like(values))
    part = trainer.weighed(run, trajectory, judged, torch.arange(len(trajectory)))
    trainer.update(run, trajectory, part, fresh=True)


def advantages(trajectory: Trajectory) -> Tensor:
    """Random advantages, one a sample, (B, S)."""
    drawn = torch.randn(len(trajectory), 1, generator=torch.Generator().manual_seed(1))
    return drawn.expand(trajectory.mask.shape)


class Pairs(NamedTuple):
    """How long one thing takes in units of another that runs right before or after it."""

    ratio: float  # median over the pairs
    low: float  # quartiles of the ratio
    high: float
    fastest: float  # shortest time of the first over the shortest of the second
    seconds: float  # of the first, median
    against: float  # seconds of the second, median


def paired(first: Callable[[], None], second: Callable[[], None], pairs: int, device: torch.device) -> Pairs:
    """Time two things in turns, the order swapped from pair to pair, so that a busy machine slows both alike."""
    for work in (first, second):
        work()  # kernels are chosen and memory is allocated at the first run
    ones, others = [], []
    for number in range(pairs):
        turns = ((first, ones), (second, others))
        for work, times in turns if number % 2 == 0 else turns[::-1]:
            times.append(seconds(work, device))
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if pairs > 1 else ratios * 3
    return Pairs(middle, low, high, min(ones) / min(others), statistics.median(ones), statistics.median(others))


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run: on CUDA by the wall clock, the device's work included; on a CPU those of this process alone.

    Processor seconds depend less on what else the machine does; with one thread on an idle machine they are the clock's.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope of the straight line through log(time) against log(size), by least squares."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, times)]).slope


def operations(work: Callable[[], None]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions of one run, backward included."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        work()
    return counter.get_total_flops()


def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any, **named: Any) -> int:
    """Operations of one attention, from its shapes; torch counts those of CUDA kernels alone."""
    return sdpa_flop_count(query, key, value)


def attention_backward(slope: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(slope, query, key, value)


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product, the most that this device shows."""
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: torch.mm(left, right), device) for _ in range(10)]
    return 2 * side**3 / min(times)


def throughput(work: Callable[[], None], taken: float, images: int, bench: Bench) -> dict[str, float]:
    """Rates of work that takes so many seconds and makes or trains so many images; runs it once more to count."""
    rate, best = operations(work) / taken, matrix_rate(bench.device, bench.size.dtype)
    return {"images_per_second": images / taken, "tflops": rate / 1e12, "matrix_share": rate / best}


def report(name: str, bench: Bench, figures: Mapping[str, object]) -> None:
    """Print one JSON line: what was measured, on what, and the figures."""
    trained = bench.policy.trainable()
    model = bench.policy.engine.pipeline.transformer
    cuda = bench.device.type == "cuda"
    about = {
        "benchmark": name,
        "device": torch.cuda.get_device_name(bench.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(bench.size.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "rows": bench.size.rows,
        "guidance": bench.size.guidance,
    }
    print(json.dumps(about | dict(figures) | peak_memory(bench.device)))
