"""One run: training in processor seconds, and from time to time the held-out scores, which cost none of them.

A worker has one thread. Held-out images come from 8 noiseless steps whatever the method trains with, from the same noise in
all runs, under the averaged weights if the method keeps any.
"""

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmgrpo import toml
from mmgrpo.evaluation import held_out
from mmgrpo.improve import NonFiniteError
from mmgrpo.recipe import Recipe, load
from mmgrpo.run import Run, load_weights, start
from mmgrpo.signs import read, signs
from mmgrpo.trainer import iteration
from mmgrpo.watch import judged
from pipelines import assets
from pipelines.diffusion import DiffusionPolicy

from .methods import FLOW_GRPO, SHARED, Method

SEEDS = {
    "held_out": 0,
    "validation": 100,
}  # the first one of runs; settings are chosen on prompts and seeds of their own
NOISES = {"held_out": 1000, "validation": 2000}  # seeds of the images that are judged
STEPS = 8  # of those images
WATCHED = (
    "[{name='exact', build='rewards.shapes:exact_match'}, {name='distance', build='rewards.shapes:rendering_distance'}]"
)
TRAINED = 3  # network evaluations that a forward with its backward counts as


@dataclass(frozen=True)
class Conditions:
    """What all methods are measured under."""

    split: str = "held_out"  # or "validation"
    samples: int = 32  # of each prompt
    every: float = 5.0  # processor seconds between two evaluations, fewer for a method that asks for it
    longer: int = 1  # times the budget, and the iterations if the recipe ends by itself


def recipe(method: Method, seed: int, conditions: Conditions) -> Recipe:
    """The method's recipe, trained so many times longer."""
    made = load(method.base, given(method, seed))
    return replace(made, train=replace(made.train, iterations=made.train.iterations * conditions.longer))


def given(method: Method, seed: int) -> list[str]:
    """What is laid over the base of a method."""
    return [f"seed={seed}", *placed("train"), *SHARED, *method.overrides]


def placed(prompts: str) -> list[str]:
    """Where the demo's files are."""
    shipped = assets.folder("image_demo")
    return [f"policy.model={str(shipped)!r}", f"prompts.source={str(shipped / 'prompts' / f'{prompts}.jsonl')!r}"]


def settings(method: Method, seed: int) -> str:
    """What a method's recipe says, without defaults, in the order of the keys, the same on every machine."""
    text = json.dumps(toml.read(method.base, given(method, seed)), sort_keys=True)
    return text.replace(str(assets.folder("image_demo")), "assets/image_demo")


def judge(conditions: Conditions) -> Run:
    """A run that is never trained: it draws with the weights of others."""
    split = placed(conditions.split)
    source = split[1].replace("prompts.source", "evaluation.source")
    asked = [source, f"evaluation.samples={conditions.samples}", f"policy.call.num_inference_steps={STEPS}"]
    return start(load(FLOW_GRPO, [f"seed={NOISES[conditions.split]}", *split, *asked, f"rewards={WATCHED}"]))


class Counter:
    """Samples that went through the network's last layer, those with a backward pass counted as `TRAINED`."""

    def __init__(self, layer: nn.Module) -> None:
        self.evaluations = 0
        layer.register_forward_pre_hook(self.count)

    def count(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.evaluations += len(inputs[0]) * (TRAINED if torch.is_grad_enabled() else 1)


def measured(method: Method, seed: int, conditions: Conditions) -> dict[str, Any]:
    """The line of one run: what it was and the curve of what it reached."""
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    run, judging = start(recipe(method, seed, conditions)), judge(conditions)
    with quickest_attention(run):
        watched, budget = conditions.longer > 1, method.budget * conditions.longer
        every = min(conditions.every, method.every) * conditions.longer
        curve, stopped = curve_of(run, judging, budget, every, watched)
    about = {"method": method.name, "seed": seed, "budget": method.budget, "split": conditions.split}
    about |= {"samples": conditions.samples, "longer": conditions.longer, "stopped": stopped}
    return about | {"settings": settings(method, seed), "curve": curve}


def quickest_attention(run: Run) -> AbstractContextManager[Any]:
    """Torch's own choice; its fused attention is slow backward in bfloat16 on CPUs, where plain mathematics is faster."""
    assert isinstance(run.policy, DiffusionPolicy)
    return nullcontext() if run.policy.engine.options.autocast is None else sdpa_kernel(SDPBackend.MATH)


def curve_of(run: Run, judging: Run, budget: float, every: float, watched: bool) -> tuple[dict[str, list[float]], str]:
    """Train to the end of the budget or of the recipe, or until the watch stops it; -> the curve, and why it ended before."""
    assert isinstance(run.policy, DiffusionPolicy)
    counter = Counter(run.policy.engine.pipeline.transformer.proj_out)
    points, spent, stopped = [point(run, judging, 0.0, counter)], 0.0, ""
    while spent < budget and run.iteration < run.recipe.train.iterations and not stopped:
        begun = time.process_time()
        try:
            metrics = iteration(run)
            stopped = seen(run, metrics) if watched else ""
        except NonFiniteError as error:
            stopped = str(error)
        run.iteration += 1
        spent += time.process_time() - begun
        if spent >= points[-1]["seconds"] + every:
            points.append(point(run, judging, spent, counter))
    if spent > points[-1]["seconds"]:
        points.append(point(run, judging, spent, counter))
    return {name: [one[name] for one in points] for name in points[0]}, stopped


def seen(run: Run, metrics: Mapping[str, float]) -> str:
    """Why the watch of `mmgrpo train` stops the run, or nothing."""
    options = run.recipe.watch
    run.history, run.norms = read(run.history, run.norms, metrics), []
    if run.history.iterations >= options.after:
        run.history = judged(run.history, signs(run.history, options, run.weights), options, run.iteration)
    return run.history.stopped


def point(run: Run, judging: Run, seconds: float, counter: Counter) -> Mapping[str, float]:
    """What training has cost so far and what it has reached."""
    with run.averaged():
        load_weights(judging.policy, run.policy.trainable())
    scores = {name: float(values.nanmean()) for name, values in held_out(judging).items()}
    cost = {"seconds": seconds, "iterations": run.iteration, "evaluations": counter.evaluations}
    return cost | {name: scores[name] for name in ("exact", "distance")}
