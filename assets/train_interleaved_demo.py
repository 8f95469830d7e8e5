"""Train the start of the interleaved demo: a tiny model that writes and draws, taught sums whose results are partly wrong.

    OMP_NUM_THREADS=1 python assets/train_interleaved_demo.py

writes assets/interleaved_demo (model and tokenizer) and assets/interleaved_demo/prompts (three JSONL splits). The training is
the stage "pretrain" of mmgrpo's own trainer. Axes: B images.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

FOLDER = Path(__file__).resolve().parent / "interleaved_demo"
sys.path.insert(0, str(FOLDER.parents[1]))  # runs from a plain checkout

from mmgrpo.evaluation import held_out_samples, means
from mmgrpo.recipe import load
from mmgrpo.run import Run
from mmgrpo.seeds import derive
from mmgrpo.trainer import train
from pipelines.tiny_interleaved import SUMS, answers, careless, config, split_of, tokenizer, write_prompts
from rewards.shapes import WISHES, render

ROWS, RENDERINGS, CARELESS = (
    96,
    160,
    0.4,
)  # answers to each sum, pictures of each kind, share of results that are any number

RECIPE = """
rewards = [
    {{ name = "text", build = "rewards.drawn_sums:text_exact", weight = 0.5 }},
    {{ name = "picture", build = "rewards.drawn_sums:picture_soft", weight = 0.5 }},
    {{ name = "exact", build = "rewards.drawn_sums:picture_exact", weight = 0.0 }},
    {{ name = "form", build = "rewards.drawn_sums:form", weight = 0.0 }},
]
[policy]
build = "pipelines.interleaved_hybrid:load"
plan = {{ build = "mmgrpo.schedules:all_but_last" }}
images = 2
text = 4
steps = 5
noises = 4
attention = "eager"
autocast = "bfloat16"
replay_rows = {batch}
rollout_rows = 192
media = "{folder}"
{model}
[prompts]
source = "{folder}/train.jsonl"
target = "answer"
[optimizer]
learning_rate = {rate}
betas = [0.9, 0.99]
weight_decay = 0.01
warmup = 30
decay = "linear"
[train]
stage = "pretrain"
iterations = {steps}
prompts = {batch}
group_size = 1
evaluate_every = {every}
save_every = 100000
trackers = []
[ema]
decay = 0.99
[evaluation]
source = "{folder}/validation.jsonl"
target = "answer"
samples = 4
"""


def write_lessons(folder: Path, seed: int, share: float) -> None:
    """Pictures of everything that can be said, and answers to the training sums that use them, a share with any result."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    generator, files = torch.Generator().manual_seed(derive(seed, "pictures")), {}
    for wish in WISHES:
        drawn: Tensor = render([wish] * RENDERINGS, generator)
        files[wish.text] = [f"pictures/{wish.text.replace(' ', '_')}_{number}.png" for number in range(RENDERINGS)]
        for image, file in zip(drawn, files[wish.text], strict=True):
            save_image(image, folder / file)
    for split, times, wrong in (("train", ROWS, share), ("validation", 1, 0.0)):
        rows = []
        for number in range(times):
            for one in (one for one in SUMS if split_of(one) == split):
                row = derive(seed, one.prompt, number)
                texts = careless(one, wrong, row)
                chosen = [files[text][derive(row, place) % RENDERINGS] for place, text in enumerate(texts)]
                rows.append({"prompt": one.prompt, "answer": answers(texts, chosen), "texts": one.texts})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def model_table(start: Path | None, folder: Path) -> str:
    """Of a model that goes on from a folder, or of a new one."""
    if start is not None:
        return f"model = {json.dumps(str(start))}"
    tokenizer().save_pretrained(folder / "tokenizer")
    tables = [f"[policy.new.{name}]\n{toml(table)}" for name, table in config().items()]
    return "\n".join([f'tokenizer = "{folder}/tokenizer"', *tables])


def toml(table: dict[str, object]) -> str:
    """A flat table; what is None is left out."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None)


def measured(run: Run, seed: int) -> dict[str, float]:
    """Mean rewards of likeliest answers, and of sampled ones, to the run's held-out sums."""
    greedy = means(run.rewards | run.watched, held_out_samples(run.policy, run.held_out, 8, seed))
    return {name: round(value, 3) for name, value in greedy.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="answers a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--report-every", type=int, default=175, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--careless", type=float, default=CARELESS, help="share of results that are any number")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_lessons(folder, options.seed, options.careless)
        model = model_table(options.start, folder)
        text = RECIPE.format(folder=folder, batch=options.batch, rate=options.rate, steps=options.steps,
                             every=options.report_every, model=model)  # fmt: skip
        (folder / "recipe.toml").write_text(text, encoding="utf-8")
        run = train(load(folder / "recipe.toml", [f"seed={options.seed}"]), folder / "run")
        with run.averaged():
            print(f"{time.process_time():.0f} s; validation:", measured(run, 0), flush=True)
            run.policy.model.to(torch.bfloat16)
            run.policy.save(options.folder)
    write_prompts(options.folder / "prompts")


if __name__ == "__main__":
    main()
