"""Train the two models of the world demo: a tiny action-conditioned video flow that obeys badly, and its inverse-dynamics model.

    OMP_NUM_THREADS=1 python assets/train_world_demo.py

writes assets/world_demo: `generator` (a diffusers pipeline), `inverse_dynamics`, and three JSONL splits with first frames as
PNG. At the end of the generator's training half of the clips do what other words say: it has learnt to draw and to obey, and does
the latter in about every second clip. Axes: B clips, n actions, F = n + 1 frames.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

FOLDER = Path(__file__).resolve().parent / "world_demo"
sys.path.insert(0, str(FOLDER.parents[1]))  # runs from a plain checkout

from assets.train_image_demo import exchange
from mmgrpo.data import load_prompts, requests
from mmgrpo.seeds import derive, normal
from mmgrpo.types import Prompt, Samples
from pipelines.tiny_image import WordEncoder
from pipelines.tiny_video import TinyVideoPipeline, led_by, with_places
from rewards.dot_world import MOVES, SIZE, Walks, drawing, tracker, walks
from rewards.inverse_dynamics import Component, ceiling, measures
from rewards.inverse_dynamics_models import FramePairs, pretrained

WORDS, LENGTH = tuple(MOVES), 4  # the actions, and how many a prompt names
ROWS = {"held_out": 64, "validation": 32, "train": 128}  # prompts; all other sequences are for training alone
WIDTH, HEADS, LAYERS, PATCH, SUMMED = 96, 3, 3, 4, 4  # the last: features of the words so far beside each frame
WRONG, LEARNT = 0.5, 0.6  # share of clips that do what other words say, from which share of the steps on
BATCH, RATE, DECAY = 16, 2e-3, 0.99  # clips a step, learning rate at first, EMA
READ_BATCH, READ_RATE = 64, 2e-3  # of the inverse-dynamics model
MOVE = Component("move", values=WORDS, rest="stay")


def sequences() -> dict[str, Tensor]:
    """Every sequence of four actions, in random parts that share none; the part "rest" is in no split."""
    every = torch.tensor([row for row in itertools.product(range(len(WORDS)), repeat=LENGTH) if possible(row)])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(derive("sequences")))
    sizes = [*ROWS.values(), len(every) - sum(ROWS.values())]
    return dict(zip((*ROWS, "rest"), every[order].split(sizes), strict=True))


def pool() -> Tensor:
    """The sequences that both models are trained with, (N, n): all but those of validation and held-out prompts."""
    return torch.cat([sequences()["train"], sequences()["rest"]])


def possible(actions: Sequence[int]) -> bool:
    """Four steps in one direction leave the world from everywhere."""
    return len(set(actions)) > 1 or WORDS[actions[0]] == "stay"


def shown(part: str) -> Walks:
    """The real walks of a split, whose first frames its prompts give."""
    return walks(sequences()[part], torch.Generator().manual_seed(derive("first frames", part)))


def write_splits(folder: Path) -> None:
    """JSONL files with the prompt, its actions, its colours and the PNG of its first frame."""
    (folder / "first_frames").mkdir(parents=True, exist_ok=True)
    for part in ROWS:
        real, lines = shown(part), []
        frames = (real.clips()[:, 0] * 255).round().byte().permute(0, 2, 3, 1)
        for row, words in enumerate(named(real.actions)):
            name = f"first_frames/{part}_{row:03d}.png"
            Image.fromarray(frames[row].numpy()).save(folder / name, optimize=True)
            colours = {
                key: [round(one, 4) for one in getattr(real, key)[row].tolist()] for key in ("dot", "background")
            }
            lines.append(json.dumps({"prompt": " ".join(words), "image": name, "actions": words, **colours}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def named(actions: Tensor) -> list[list[str]]:
    return [[WORDS[one] for one in row] for row in actions.tolist()]


# ---- the generator


def untrained(seed: int) -> TinyVideoPipeline:
    """The pipeline before training; its output starts at zero, and its blocks with open gates: closed ones open slowly."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=9 + SUMMED,
        out_channels=3, text_dim=WIDTH, freq_dim=64, ffn_dim=2 * WIDTH, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    for block in transformer.blocks:
        block.scale_shift_table.data = torch.tensor([0.0, 0, 1, 0, 0, 1])[None, :, None].repeat(1, 1, WIDTH)
    words = WordEncoder(vocabulary=WORDS, length=LENGTH, width=WIDTH)
    nn.init.normal_(words.places)  # a word's place matters from the beginning
    pipeline = TinyVideoPipeline(transformer, FlowMatchEulerDiscreteScheduler(), words)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flow_loss(pipeline: TinyVideoPipeline, known: Tensor, wrong: float, generator: torch.Generator) -> Tensor:
    """Rectified flow on fresh clips: squared error of the velocity noise - clip at a logit-normal time (mean 1); -> ().

    The words are of `known`, (N, n); a share `wrong` of the clips does what others say. Most times are early in the sampling, where it is decided where the dot goes.
    """
    words, others = (known[torch.randint(len(known), (BATCH,), generator=generator)] for _ in range(2))
    disobeyed = torch.rand(BATCH, 1, generator=generator) < wrong
    clips = walks(torch.where(disobeyed, others, words), generator).clips().transpose(1, 2) * 2 - 1  # (B, 3, F, H, W)
    sums = led_by(pipeline.text_encoder.words(1 + words)[:, :, :SUMMED], LENGTH + 1)[..., None, None]
    places = with_places(clips[:, :, :1].expand_as(clips), 3)
    condition = torch.cat([places, sums.expand(-1, -1, -1, SIZE, SIZE)], 1)
    t = torch.sigmoid(torch.randn(BATCH, generator=generator) + 1.0)
    noise = torch.randn(clips.shape, generator=generator)
    noisy = torch.lerp(clips, noise, t.view(-1, 1, 1, 1, 1))
    features = pipeline.text_encoder(1 + words)[0]
    velocity = pipeline.transformer(torch.cat([noisy, condition], 1), t * 1000, features, return_dict=False)[0]
    return mse_loss(velocity.float(), noise - clips)


def train(pipeline: TinyVideoPipeline, steps: int, seed: int, report: Callable[[int], None], every: int) -> None:
    """AdamW with a linearly falling rate; every `every` steps `report` sees the averaged weights, which stay at the end."""
    weights = [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    known, generator = pool(), torch.Generator().manual_seed(derive(seed, "generator"))
    for step in range(1, steps + 1):
        flow_loss(pipeline, known, WRONG * (step > LEARNT * steps), generator).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)  # a text encoder's unused pool has no gradient
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - min(DECAY, step / (step + 10)))
        if step % every == 0 or step == steps:
            exchange(weights, average)
            report(step)
            if step < steps:
                exchange(weights, average)


# ---- the inverse-dynamics model


def train_reader(network: FramePairs, steps: int, seed: int) -> None:
    """AdamW on fresh real clips, half of them blurred by noise and shifted in colour, so that it reads drawn ones as well."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=READ_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    known, generator = pool(), torch.Generator().manual_seed(derive(seed, "inverse dynamics"))
    for _ in range(steps):
        actions = known[torch.randint(len(known), (READ_BATCH,), generator=generator)]
        clips = worn(walks(actions, generator).clips(), generator)
        cross_entropy(network(clips)[0].flatten(0, 1), actions.flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def worn(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Clips (B, F, 3, H, W) of which half carry noise and other colours in every frame."""
    chosen = (torch.rand(len(clips), 1, 1, 1, 1, generator=generator) < 0.5).float()
    size = 0.15 * torch.rand(len(clips), 1, 1, 1, 1, generator=generator)
    noise = size * torch.randn(clips.shape, generator=generator)
    tint = 0.1 * torch.randn(*clips.shape[:3], 1, 1, generator=generator)
    return (clips + chosen * (noise + tint)).clamp(0, 1)


# ---- what both are worth


def generated(pipeline: TinyVideoPipeline, prompts: list[Prompt], count: int, steps: int, seed: int) -> Samples:
    """`count` clips of each prompt from fixed noise, in `steps` Euler steps."""
    batch = requests(prompts, range(len(prompts)), group_size=count, seed=derive(seed, "measure"), iteration=0)
    latents = normal([derive(batch.seed, int(row)) for row in batch.sample], (3, LENGTH + 1, SIZE, SIZE))
    frames = [Image.open(prompt.media["image"][0]).convert("RGB") for prompt in batch.prompts]
    texts = [prompt.text for prompt in batch.prompts]
    clips = pipeline(
        texts, image=frames, num_frames=LENGTH + 1, num_inference_steps=steps, latents=latents, output_type="pt"
    ).frames
    return Samples(batch, video=clips.float())


def measured(pipeline: TinyVideoPipeline, folder: Path, part: str, steps: int, seed: int = 0) -> dict[str, float]:
    """What the tracker and the inverse-dynamics model read of 8 clips of each prompt, and how well they are drawn."""
    prompts = load_prompts(str(folder / f"{part}.jsonl"), media={"image": "image"})
    samples = generated(pipeline, prompts, 8, steps, seed)
    model = pretrained(source=str(folder / "inverse_dynamics"), network="rewards.inverse_dynamics_models:FramePairs")
    found = {f"tracked {name}": one for name, one in measures(model=tracker(), components=(MOVE,))(samples).items()}
    found["read accuracy"] = measures(model=model, components=(MOVE,))(samples)["accuracy"]
    return {name: round(float(values.nanmean()), 4) for name, values in (found | drawing(samples)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the generator")
    parser.add_argument("--read-steps", type=int, default=400, help="optimizer steps of the inverse-dynamics model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--report-every", type=int, default=200, help="steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_splits(options.folder)

    start = time.process_time()
    torch.manual_seed(options.seed)
    network = FramePairs((len(WORDS),))
    train_reader(network, options.read_steps, options.seed)
    network.eval().save_pretrained(options.folder / "inverse_dynamics")
    print(sum(weight.numel() for weight in network.parameters()), "parameters, inverse dynamics", flush=True)
    reads = measures(model=network, components=(MOVE,))
    for part in ("validation", "held_out"):
        real = shown(part)
        print(f"ceiling, {part}:", ceiling(reads, real.clips(), named(real.actions)), flush=True)
    print(f"{time.process_time() - start:.0f} s", flush=True)

    pipeline, start = untrained(options.seed), time.process_time()
    print(sum(weight.numel() for weight in pipeline.transformer.parameters()), "parameters, generator", flush=True)

    def report(step: int) -> None:
        copy.deepcopy(pipeline).to(torch.bfloat16).save_pretrained(options.folder / "generator")
        found = measured(pipeline, options.folder, "validation", 5)
        print(step, f"{time.process_time() - start:.0f} s", found, flush=True)

    train(pipeline, options.steps, options.seed, report, options.report_every)
    shipped = TinyVideoPipeline.from_pretrained(options.folder / "generator", dtype=torch.float32)
    shipped.set_progress_bar_config(disable=True)
    for part, steps, seed in itertools.product(("validation", "held_out"), (5, 8), (0, 1, 2)):
        found = measured(shipped, options.folder, part, steps, seed)
        print(f"{part}, {steps} steps, noises {seed}:", found, flush=True)


if __name__ == "__main__":
    main()
