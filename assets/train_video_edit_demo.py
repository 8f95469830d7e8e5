"""Train the video demo's start: a tiny rectified flow that edits clips, taught in part on wrong edits.

    OMP_NUM_THREADS=1 python assets/train_video_edit_demo.py

writes assets/video_edit_demo: a diffusers pipeline, the clips of three splits as animated PNGs, and three JSONL files that list them.
Axes: B clips, F frames, H, W px.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss

FOLDER = Path(__file__).resolve().parent / "video_edit_demo"
sys.path.insert(0, str(FOLDER.parents[1]))  # runs from a plain checkout

from assets.train_image_demo import exchange
from mmgrpo.data import load_prompts
from mmgrpo.seeds import derive, normal
from mmgrpo.types import Batch, Samples
from pipelines.source_videos import Cut, given, read
from pipelines.tiny_image import WordEncoder
from pipelines.tiny_video import TinyVideoPipeline, with_places
from rewards.moving_shapes import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    GROUNDS,
    SCENES,
    SIZE,
    Scene,
    background_error,
    colour_match,
    draw,
    edit_distance,
    edit_reward,
    motion_iou,
    paint,
)
from rewards.shapes import SHAPES

WIDTH, HEADS, LAYERS, PATCH, INNER = 96, 3, 3, 4, 192
BATCH = 32  # clips a step
RATE, HORIZON, DECAY = 2e-3, 3300, 0.998  # learning rate at first, step at which it would have fallen to 0, EMA
CHUNK, CHUNKS = 250, 8  # clips of each shape, drawn before training: so many at a time, so many times
WRONG_MOTION, WRONG_COLOUR = 0.4, 0.4  # shares of the targets
REWARDS = (edit_reward, colour_match, motion_iou, background_error, edit_distance)
CLIPS = {"train": 192, "validation": 48, "held_out": 96}


def split(scene: Scene) -> str:
    """18 of the 90 combinations of shape, colour and wish held out, 18 for validation, 54 for training.

    In the first two every pair of a shape and a colour is there once, and every pair of a shape and a wish.
    """
    names, shape = list(COLOURS), SHAPES.index(scene.shape)
    turn = (names.index(scene.colour) - names.index(scene.was)) % len(names)  # 1..5 steps around the circle of hues
    return {shape + 1: "held_out", (shape + 3) % 5 + 1: "validation"}.get(turn, "train")


def scenes(name: str) -> list[Scene]:
    return [scene for scene in SCENES if split(scene) == name]


def write_clips(folder: Path, name: str, seed: int) -> None:
    """The clips of a split, lossless at 8 bits, and the file that lists them; each combination comes about equally often."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    known, generator = scenes(name), torch.Generator().manual_seed(derive(seed, "clips", name))
    listed = [known[row % len(known)] for row in torch.randperm(CLIPS[name], generator=generator).tolist()]
    drawn = draw([scene.shape for scene in listed], generator)
    clips = paint(drawn.cover, drawn.ground, [scene.was for scene in listed])
    rows = []
    for row, (scene, clip) in enumerate(zip(listed, clips, strict=True)):
        path = Path(name) / f"{row:03d}.png"
        first, *rest = [Image.fromarray(frame.numpy()) for frame in (clip * 255).round().byte().movedim(1, -1)]
        first.save(folder / path, save_all=True, append_images=rest, duration=250, optimize=True)
        motion, ground = DIRECTIONS[int(drawn.direction[row])], GROUNDS[int(drawn.kind[row])]
        rows.append({"prompt": scene.text, "video": str(path), **asdict(scene), "motion": motion, "ground": ground})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def untrained(seed: int) -> TinyVideoPipeline:
    """The pipeline before training; its output starts at zero."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=7,
        out_channels=3, text_dim=WIDTH, freq_dim=64, ffn_dim=INNER, num_layers=LAYERS, rope_max_seq_len=16,
    )  # fmt: skip
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    words = WordEncoder(vocabulary=("make", "it", *COLOURS), width=WIDTH)
    return quiet(TinyVideoPipeline(transformer, FlowMatchEulerDiscreteScheduler(), words))


def quiet(pipeline: TinyVideoPipeline) -> TinyVideoPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wrong_motion(cover: Tensor, generator: torch.Generator) -> Tensor:
    """Some of the shapes stand still where they are in the first frame; (B, F, H, W)."""
    wrong = torch.rand(len(cover), 1, 1, 1, generator=generator) < WRONG_MOTION
    return torch.where(wrong, cover[:, :1], cover)


def wrong_colour(listed: list[Scene], generator: torch.Generator) -> list[str]:
    """The wished colours, in some places what the shape was before."""
    wrong = torch.rand(len(listed), generator=generator) < WRONG_COLOUR
    return [scene.was if left else scene.colour for scene, left in zip(listed, wrong.tolist(), strict=True)]


def batches(words: WordEncoder, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Targets and conditions in [-1, 1], (B, 3, F, H, W) and (B, 4, F, H, W), and word numbers of the prompts, (B, 3)."""
    generator = torch.Generator().manual_seed(derive(seed, "data"))
    known = scenes("train")
    pools = {shape: [draw([shape] * CHUNK, generator) for _ in range(CHUNKS)] for shape in SHAPES}
    covers = {shape: torch.cat([part.cover for part in parts]) for shape, parts in pools.items()}
    levels = {shape: torch.cat([part.ground for part in parts]) for shape, parts in pools.items()}
    while True:
        listed = [known[row] for row in torch.randint(len(known), (BATCH,), generator=generator)]
        rows = torch.randint(CHUNK * CHUNKS, (BATCH,), generator=generator).tolist()
        cover = torch.stack([covers[scene.shape][row] for scene, row in zip(listed, rows, strict=True)])
        ground = torch.stack([levels[scene.shape][row] for scene, row in zip(listed, rows, strict=True)])
        source = paint(cover, ground, [scene.was for scene in listed])
        target = paint(wrong_motion(cover, generator), ground, wrong_colour(listed, generator))
        source, target = ((clip * 2 - 1).transpose(1, 2) for clip in (source, target))
        yield target, with_places(source), words.tokenize([scene.text for scene in listed])


def flow_loss(pipeline: TinyVideoPipeline, data: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """Rectified flow: squared error of the velocity noise - clip at a logit-normal time (mean 0.3); -> ()."""
    target, condition, numbers = data
    time_ = torch.sigmoid(torch.randn(len(target), generator=generator) + 0.3)
    noise = torch.randn(target.shape, generator=generator)
    noisy = torch.lerp(target, noise, time_.view(-1, 1, 1, 1, 1))
    features = pipeline.text_encoder(numbers)[0]
    velocity = pipeline.transformer(torch.cat([noisy, condition], 1), time_ * 1000, features, return_dict=False)[0]
    return mse_loss(velocity.float(), noise - target)


def train(pipeline: TinyVideoPipeline, steps: int, seed: int, report: Callable[[int], None], every: int) -> None:
    """AdamW with a linearly falling rate; every `every` steps and at the end, `report` sees the averaged weights."""
    weights = [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / HORIZON))
    generator, data = torch.Generator().manual_seed(derive(seed, "noise")), batches(pipeline.text_encoder, seed)
    for step in range(1, steps + 1):
        flow_loss(pipeline, next(data), generator).backward()
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


def measure(pipeline: TinyVideoPipeline, folder: Path, name: str, steps: int) -> dict[str, float]:
    """Mean rewards and qualities of two fixed-noise edits of each clip of a split, made in `steps` Euler steps."""
    prompts = load_prompts(str(folder / f"{name}.jsonl"), media={"video": "video"})
    prompts = [prompt for prompt in prompts for _ in range(2)]
    videos = [list(read(prompt.media["video"][0], Cut())) for prompt in prompts]
    latents = normal([derive(0, "evaluation", row) for row in range(len(prompts))], (3, FRAMES, SIZE, SIZE))
    video = pipeline(
        [prompt.text for prompt in prompts], videos, latents=latents, num_inference_steps=steps, output_type="pt"
    )
    ids = torch.arange(len(prompts))
    samples = Samples(Batch(tuple(prompts), ids, ids, 0, 0), video=video.frames, source_video=given(prompts, Cut()))
    return {reward.__name__: round(reward(samples).mean().item(), 3) for reward in REWARDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help=f"optimizer steps, at most {HORIZON}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--report-every", type=int, default=500, help="steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in CLIPS:
        write_clips(options.folder, name, options.seed)
    pipeline = untrained(options.seed)
    start = time.process_time()

    def report(step: int) -> None:
        found = measure(pipeline, options.folder, "validation", 6)
        print(step, f"{time.process_time() - start:.0f} s", found, flush=True)

    train(pipeline, options.steps, options.seed, report, options.report_every)
    pipeline.to(torch.bfloat16).save_pretrained(options.folder)
    shipped = quiet(TinyVideoPipeline.from_pretrained(options.folder))
    print(sum(weight.numel() for weight in shipped.transformer.parameters()), "parameters")
    for name in CLIPS:
        for steps in (6, 12):
            print(f"{name}, {steps} steps:", measure(shipped, options.folder, name, steps), flush=True)


if __name__ == "__main__":
    main()
