"""Train the start of the picture-question demo: a tiny Qwen2.5-VL on drawn pictures, stopped while it still errs.

    OMP_NUM_THREADS=1 python assets/train_vlm_demo.py

writes assets/vlm_demo (model and processor). Axes: B examples, L tokens of a prompt, N pixels' patches (16), V words.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers import Qwen2_5_VLProcessor as Processor
from transformers.utils import logging

FOLDER = Path(__file__).resolve().parent / "vlm_demo"
sys.path.insert(0, str(FOLDER.parents[1]))  # runs from a plain checkout

from pipelines.tiny_vlm import ANSWERS, KINDS, Example, config, draw, examples, processor

BATCH, RATE, HORIZON = (
    96,
    1.5e-3,
    600,
)  # examples a step, learning rate at first, step at which it would have fallen to 0
SINGLE_UNTIL = 132  # steps on pictures of one thing; without them nothing is learned but the most frequent answers
POOL, SINGLES = 16384, 3072  # examples drawn once and used again
END_WEIGHT = 0.3  # of the loss of the token that ends an answer
REPORT = 50  # steps


@dataclass(frozen=True)
class Examples:
    """Encoded examples, their prompts padded on the left."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64, 0 where padded
    positions: Tensor  # (B, 3, L) int64: time, height, width
    patches: Tensor  # (B, N, 48) in [-1, 1]
    answers: Tensor  # (B,) int64 tokens
    kinds: Tensor  # (B,) int64 in KINDS' order

    def take(self, rows: Tensor | slice) -> "Examples":
        return Examples(*(values[rows] for values in vars(self).values()))


def encode(model: Qwen2_5_VLForConditionalGeneration, reader: Processor, drawn: Sequence[Example]) -> Examples:
    """The processor's inputs of B examples, and the positions that the model gives them."""
    turns = [[{"type": "image"}, {"type": "text", "text": each.question.text}] for each in drawn]
    texts = [
        reader.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True) for turn in turns
    ]
    pictures = [Image.fromarray(draw(each.scene)) for each in drawn]
    inputs = reader(text=texts, images=pictures, return_tensors="pt", padding=True)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )  # fmt: skip
    answers = torch.tensor(reader.tokenizer.convert_tokens_to_ids([each.question.answer for each in drawn]))
    kinds = torch.tensor([list(KINDS).index(each.question.kind) for each in drawn])
    patches = inputs["pixel_values"].view(len(drawn), -1, inputs["pixel_values"].shape[1])
    return Examples(inputs["input_ids"], inputs["attention_mask"], positions.transpose(0, 1), patches, answers, kinds)


def untrained(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model before training: weights of variance 1 / inputs, since the library's 0.02 is too small at this width."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config())
    for weight in (weight for weight in model.parameters() if weight.dim() > 1):
        nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
    nn.init.zeros_(model.lm_head.weight)
    return model


def logits(model: Qwen2_5_VLForConditionalGeneration, asked: Examples, answers: Tensor) -> Tensor:
    """Of the answer, and of what follows the given answers (B,); -> (B, 2, V)."""
    grid = torch.tensor([[1, 4, 4]]).expand(len(answers), 3)  # patches
    return model(
        input_ids=torch.cat([asked.ids, answers[:, None]], 1),
        attention_mask=torch.cat([asked.mask, torch.ones_like(answers)[:, None]], 1),
        position_ids=torch.cat([asked.positions, asked.positions[:, :, -1:] + 1], 2).transpose(0, 1),
        pixel_values=asked.patches.flatten(0, 1), image_grid_thw=grid, logits_to_keep=2, use_cache=False,
    ).logits  # fmt: skip


def careless(asked: Examples, choices: Sequence[Tensor], share: float, generator: torch.Generator) -> Tensor:
    """The answers, a share of them replaced by any answer to such a question; (B,)."""
    labels, replaced = asked.answers.clone(), torch.rand(len(asked.answers), generator=generator) < share
    for kind, words in enumerate(choices):
        rows = (replaced & (asked.kinds == kind)).nonzero()[:, 0]
        labels[rows] = words[torch.randint(len(words), rows.shape, generator=generator)]
    return labels


def falling(step: int) -> float:
    """Share of the learning rate at a step, from 0."""
    return min(1, (step + 1) / 40) * max(0.05, 1 - step / HORIZON)


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    reader: Processor,
    steps: int,
    last: int,
    share: float,
    seed: int,
    report: Callable[[int], None],
) -> None:
    """AdamW with a linearly falling rate: pictures of one thing, then all, and in the `last` steps careless labels."""
    generator = torch.Generator().manual_seed(seed)
    pool = encode(model, reader, list(islice(examples("train", 1000 + seed), POOL)))
    alone = (each for each in examples("train", 2000 + seed, ("colour", "shape")) if len(each.scene) == 1)
    singles = encode(model, reader, list(islice(alone, SINGLES)))
    choices = [torch.tensor(reader.tokenizer.convert_tokens_to_ids(list(words))) for words in ANSWERS.values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
    for step in range(1, steps + 1):
        source = singles if step <= SINGLE_UNTIL else pool
        asked = source.take(torch.randint(len(source.ids), (BATCH,), generator=generator))
        labels = careless(asked, choices, share if step > steps - last else 0.0, generator)
        answer, after = logits(model, asked, labels).unbind(1)
        end = torch.full_like(labels, reader.tokenizer.eos_token_id)
        (cross_entropy(answer, labels) + END_WEIGHT * cross_entropy(after, end)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % REPORT == 0:
            report(step)


@torch.no_grad()
def measure(model: Qwen2_5_VLForConditionalGeneration, asked: Examples) -> dict[str, tuple[float, float]]:
    """Share of right most-likely answers and mean probability of the right one, of all questions and of each kind."""
    chunks = [asked.take(slice(first, first + 256)) for first in range(0, len(asked.ids), 256)]
    chances = torch.cat([logits(model, chunk, chunk.answers)[:, 0].softmax(-1) for chunk in chunks])
    greedy = (chances.argmax(-1) == asked.answers).float()
    sampled = chances.gather(1, asked.answers[:, None])[:, 0]
    kinds = {name: asked.kinds == number for number, name in enumerate(KINDS)}
    rows = {"all": torch.ones_like(asked.kinds, dtype=torch.bool), **kinds}
    return {
        name: (round(greedy[of].mean().item(), 3), round(sampled[of].mean().item(), 3)) for name, of in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=HORIZON, help=f"optimizer steps, at most {HORIZON}")
    parser.add_argument("--careless-steps", type=int, default=108, help="the last of them, on partly random labels")
    parser.add_argument("--careless-share", type=float, default=0.5, help="share of random labels in these steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model, reader = untrained(options.seed), processor()
    held_out = encode(model, reader, list(islice(examples("held_out", 0), 512)))

    def report(step: int) -> None:
        print(step, f"{time.process_time():.0f} s", measure(model, held_out), flush=True)

    train(model, reader, options.steps, options.careless_steps, options.careless_share, options.seed, report)
    model.to(torch.bfloat16).save_pretrained(options.folder)
    processor().save_pretrained(options.folder)  # a used one would store its last padding
    shipped = AutoModelForImageTextToText.from_pretrained(options.folder, dtype=torch.float32).eval()
    reader = AutoProcessor.from_pretrained(options.folder)
    print(sum(weight.numel() for weight in shipped.parameters()), "parameters")
    for split in ("held_out", "train"):
        drawn = list(islice(examples(split, 0), 512))
        print(split, "(greedy, sampled):", measure(shipped, encode(shipped, reader, drawn)), flush=True)


if __name__ == "__main__":
    main()
