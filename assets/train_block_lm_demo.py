"""Train the start of the block demo: a tiny Qwen3 that fills in blocks, in the stage "pretrain" of the project's own trainer.

    OMP_NUM_THREADS=1 python assets/train_block_lm_demo.py

writes assets/block_lm_demo (model, tokenizer and prompts).
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import Qwen3ForCausalLM
from transformers.utils import logging

FOLDER = Path(__file__).resolve().parent / "block_lm_demo"
sys.path.insert(0, str(FOLDER.parents[1]))  # runs from a plain checkout

from mmgrpo.recipe import load
from mmgrpo.run import start
from mmgrpo.trainer import begin
from pipelines import demo_block_lm
from pipelines.tiny_block_lm import SPLITS, config, tokenizer, write_prompts

TEXTS = 32768  # that are learned from, once each at most
SHIPPED = {"train": 512, "validation": 128, "held_out": 128}  # prompts
BATCH = 128


def untrained(seed: int, folder: Path) -> None:
    """Write the model before training: weights of variance 1 / inputs, since the library's 0.02 is too small at this width."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config())
    for weight in (weight for weight in model.parameters() if weight.dim() > 1):
        nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
    nn.init.normal_(model.get_input_embeddings().weight)
    nn.init.normal_(model.lm_head.weight, std=0.01)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    options.folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write_prompts(options.folder / f"{split}.jsonl", split, SHIPPED[split])
    with TemporaryDirectory() as place:
        scratch = Path(place)
        untrained(options.seed, scratch / "untrained")
        texts = write_prompts(scratch / "texts.jsonl", "train", TEXTS, seed=1)
        lessons = {
            "policy.model": str(scratch / "untrained"), "prompts.source": str(texts), "prompts.target": "text",
            "evaluation.source": str(options.folder / "validation.jsonl"), "train.stage": "pretrain",
            "train.iterations": options.steps, "train.prompts": BATCH, "train.group_size": 1, "train.evaluate_every": 0,
            "train.save_every": options.steps, "loss.anchor_weight": 0.0, "optimizer.learning_rate": 2e-3,
            "optimizer.warmup": 50, "optimizer.decay": "linear",
        }  # fmt: skip
        given = [f"{key}={json.dumps(value)}" for key, value in lessons.items()]
        recipe = Path(demo_block_lm.__file__).parent / "recipes" / "demo_block_lm.toml"
        run = begin(
            start(load(recipe, [f"seed={options.seed}", "optimizer.betas=[0.9, 0.98]", *given])), scratch / "run"
        )
        print(f"{options.steps} steps of {BATCH} texts: {time.process_time():.0f} s of a core")
        run.policy.model.to(torch.bfloat16)
        run.policy.save(options.folder)
    places = [f"policy.model={json.dumps(str(options.folder))}"]
    places += [
        f"{key}={json.dumps(str(options.folder / 'validation.jsonl'))}"
        for key in ("prompts.source", "evaluation.source")
    ]
    shipped = start(load(recipe, places))
    print(sum(weight.numel() for weight in shipped.policy.trainable().values()), "parameters")
    print("validation:", demo_block_lm.measured(shipped)._replace(texts=()))


if __name__ == "__main__":
    main()
