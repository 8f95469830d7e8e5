"""Train the image demo's start: a tiny rectified flow on true renderings of all 48 prompts, stopped while it still errs.

    OMP_NUM_THREADS=1 python assets/train_image_demo.py

writes assets/image_demo (a diffusers pipeline) and assets/image_demo/prompts (three JSONL splits). Axes: B images.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

FOLDER = Path(__file__).resolve().parent / "image_demo"
sys.path.insert(0, str(FOLDER.parents[1]))  # runs from a plain checkout

from mmgrpo.seeds import derive, normal
from mmgrpo.types import Batch, Prompt, Samples
from pipelines.tiny_image import TinyImagePipeline, WordEncoder
from rewards.shapes import COLOURS, NUMBERS, SHAPES, SIZE, WISHES, Wish, render, rendering_distance, shape_accuracy

WIDTH, HEADS, LAYERS, PATCH = 96, 4, 4, 4
BATCH, NO_WISH = 64, 0.1  # images a step, share of empty prompts
RATE, HORIZON, DECAY = 2e-3, 4000, 0.998  # learning rate at first, step at which it would have fallen to 0, EMA
RENDERINGS = 512  # per prompt


def split(wish: Wish) -> str:
    """12 prompts held out, 8 for validation, 28 for training; each count and colour is held out equally often."""
    colour, shape = list(COLOURS).index(wish.colour), SHAPES.index(wish.shape)
    diagonal = (wish.count + colour + shape) % 4
    if diagonal == 0:
        return "held_out"
    return "validation" if diagonal == 2 and wish.count % 3 != shape else "train"


def write_splits(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("held_out", "validation", "train"):
        rows = [{"prompt": wish.text, **asdict(wish)} for wish in WISHES if split(wish) == name]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def untrained(seed: int) -> TinyImagePipeline:
    """The pipeline before training; adaptive norms and the output start at zero, so every block starts as the identity."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE, patch_size=PATCH, in_channels=3, out_channels=3, num_layers=LAYERS, qk_norm="rms_norm",
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH, pos_embed_max_size=SIZE // PATCH,
    )  # fmt: skip
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in [norm.linear for norm in norms] + [transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    words = WordEncoder(vocabulary=(*NUMBERS, *COLOURS, *SHAPES), width=WIDTH)
    pipeline = TinyImagePipeline(transformer, FlowMatchEulerDiscreteScheduler(), words)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batches(words: WordEncoder, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [-1, 1], (B, 3, H, W), and the word numbers of their prompts, (B, 3), some of them empty."""
    generator = torch.Generator().manual_seed(derive(seed, "data"))
    wishes = [wish for wish in WISHES for _ in range(RENDERINGS)]
    images, numbers = render(wishes, generator) * 2 - 1, words.tokenize([wish.text for wish in wishes])
    while True:
        rows = torch.randint(len(wishes), (BATCH,), generator=generator)
        empty = torch.rand(BATCH, 1, generator=generator) < NO_WISH
        yield images[rows], numbers[rows].masked_fill(empty, 0)


def flow_loss(pipeline: TinyImagePipeline, images: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Rectified flow: squared error of the velocity noise - image at a logit-normal time (mean 0.3); -> ()."""
    time_ = torch.sigmoid(torch.randn(len(images), generator=generator) + 0.3)
    noise = torch.randn(images.shape, generator=generator)
    noisy = torch.lerp(images, noise, time_[:, None, None, None])
    features, pooled = pipeline.text_encoder(numbers)
    velocity = pipeline.transformer(noisy, features, pooled, time_ * 1000, return_dict=False)[0]
    return mse_loss(velocity.float(), noise - images)


def train(pipeline: TinyImagePipeline, steps: int, seed: int, report: Callable[[int], None], every: int) -> None:
    """AdamW with a linearly falling rate; every `every` steps and at the end, `report` sees the averaged weights."""
    weights = [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / HORIZON))
    generator, data = torch.Generator().manual_seed(derive(seed, "noise")), batches(pipeline.text_encoder, seed)
    for step in range(1, steps + 1):
        flow_loss(pipeline, *next(data), generator).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - min(DECAY, step / (step + 10)))
        if step % every == 0 or step == steps:
            exchange(weights, average)
            report(step)
            if step < steps:
                exchange(weights, average)


@torch.no_grad()
def exchange(weights: list[nn.Parameter], values: list[Tensor]) -> None:
    """Swap the contents of the two lists."""
    kept = [weight.clone() for weight in weights]
    torch._foreach_copy_(weights, values)
    torch._foreach_copy_(values, kept)


def measure(pipeline: TinyImagePipeline, name: str, steps: int, noises: int = 32, seed: int = 0) -> dict[str, float]:
    """Mean reward and quality of `noises` fixed-noise images of each prompt of a split, drawn in `steps` Euler steps."""
    wishes = [wish for wish in WISHES if split(wish) == name for _ in range(noises)]
    latents = normal([derive(seed, "evaluation", row) for row in range(len(wishes))], (3, SIZE, SIZE))
    texts = [wish.text for wish in wishes]
    image = pipeline(texts, steps, latents=latents, output_type="pt").images
    ids = torch.arange(len(wishes))
    prompts = tuple(Prompt(row, wish.text, columns=asdict(wish)) for row, wish in enumerate(wishes))
    samples = Samples(Batch(prompts, ids, ids, seed, 0), image=image)
    scores, distance = shape_accuracy(samples), rendering_distance(samples)
    exact = scores["exact"].bool()
    means = {**scores, "q": distance, "q_ok": distance[exact]}  # q_ok: over the exact images only
    return {key: round(values.mean().item(), 3) for key, values in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps, at most 4000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--report-every", type=int, default=400, help="steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = untrained(options.seed)
    start = time.process_time()

    def report(step: int) -> None:
        print(step, f"{time.process_time() - start:.0f} s", measure(pipeline, "held_out", 5), flush=True)

    train(pipeline, options.steps, options.seed, report, options.report_every)
    pipeline.to(torch.bfloat16).save_pretrained(options.folder)
    write_splits(options.folder / "prompts")
    shipped = TinyImagePipeline.from_pretrained(options.folder)
    shipped.set_progress_bar_config(disable=True)
    print(sum(weight.numel() for weight in shipped.transformer.parameters()), "parameters")
    for steps in (5, 8, 20):
        for seed in (0, 1, 2):
            print(
                f"held_out, {steps} steps, noises {seed}:", measure(shipped, "held_out", steps, seed=seed), flush=True
            )
    for name in ("validation", "train"):
        print(f"{name}, 5 steps, noises 0:", measure(shipped, name, 5), flush=True)


if __name__ == "__main__":
    main()
