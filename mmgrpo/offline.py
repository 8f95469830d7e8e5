"""The stage "offline": the samples of every prompt are made and scored once, by the weights of the start, then trained on in groups.

GDRO (arXiv 2601.02036) makes 16 samples of each prompt and trains on 6 of them at a time, noised again in every iteration.
samples.json               what the samples depend on; a run that would make others refuses the folder
prompt_ID.safetensors      the samples of a prompt and their rewards; its header holds JSON (mmgrpo/packing.py)
Axes: P prompts, M samples made of each, G those of a group, B rows of a batch.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as in_bytes
from torch import Tensor

from mmgrpo import checkpoint, packing
from mmgrpo.comparing import needed
from mmgrpo.data import requests
from mmgrpo.gathering import Gathered, joined_feedback, joined_trajectory, next_batch, take_feedback
from mmgrpo.interrupt import Interrupted, Interrupts
from mmgrpo.journal import Stopwatch
from mmgrpo.recall import Kept, in_memory, packed, unpacked
from mmgrpo.run import Run, save
from mmgrpo.scoring import score
from mmgrpo.seeds import derive
from mmgrpo.types import Batch, Feedback, Policy, Prompt, Trajectory

LIST = "samples.json"
TRAINING = (  # options of a policy that its samples do not depend on
    "draws", "train", "lora", "gradient_checkpointing", "reduction", "replay_rows", "replay_steps", "evaluation_call",
    "rollout_rows", "offload_trajectory", "device", "cache",
)  # fmt: skip


@runtime_checkable
class Redrawing(Protocol):
    """A policy whose decisions are draws: made anew from its samples, whenever those were made."""

    def redrawn(self, trajectory: Trajectory, batch: Batch) -> Trajectory:
        """Recorded samples as the rows of another batch, with the decisions of its seed, iteration and groups; no gradient."""
        ...


def redrawing(policy: Policy) -> Redrawing:
    """The policy as one that draws anew; raises ValueError if it cannot."""
    if not isinstance(policy, Redrawing):
        raise ValueError(
            f"train.stage is 'offline', and a {type(policy).__name__} cannot draw anew from samples that were made once; "
            "expected a policy with `redrawn`, such as pipelines.diffusion:load"
        )
    return policy


def require_redrawable(run: Run) -> None:
    """Raise ValueError where an iteration would ask for what samples that were made once do not tell."""
    redrawing(run.policy)
    if needed(run.compare):
        raise ValueError(
            f"the advantage needs {needed(run.compare)[0]!r} of every decision, which samples that were made once do not tell; "
            "expected another advantage, or train.stage 'align'"
        )


# ---- before the first iteration


def collect(run: Run, folder: Path, bar: Progress, interrupts: Interrupts) -> None:
    """Make the samples that are not there yet, part by part; raises Interrupted behind the part at which a stop was asked for.

    The run is saved before, with the weights that make them. They do not depend on what was interrupted, and the random
    generators are left as they were: a run that finds its samples made goes on like the one that made them.
    """
    run.stored = opened(run, folder)
    left = [part for part in parts(run) if not all(file_of(run.stored, run.prompts[one]).exists() for one in part)]
    if run.iteration and left:
        raise ValueError(
            f"offline.folder: {run.stored} lacks samples of prompt {run.prompts[left[0][0]].id}, and the weights that made them "
            f"have gone {run.iteration} iterations further; expected all of its files"
        )
    if not checkpoint.saved(folder):
        save(run, folder)
    states, total = packing.random_states(), len(run.prompts)
    done = total - sum(map(len, left))
    task = bar.add_task("samples of prompts", total=total, completed=done, note="")
    for part in left:
        for group in made(run, part):
            write(run.stored, group)
        done += len(part)
        bar.update(task, completed=done, note=f"{done * run.recipe.offline.samples} samples")
        if interrupts.signal is not None:
            said = f"stopped with the samples of {done} of {total} prompts, saved"
            raise Interrupted(f"{said}; continue with: mmgrpo resume {folder}", interrupts.signal)
    packing.restore_random_states(states)
    run.samples = total * run.recipe.offline.samples


def opened(run: Run, folder: Path) -> Path:
    """The folder of the samples, new or as this run would fill it; raises ValueError naming what is another there."""
    place = Path(run.recipe.offline.folder) if run.recipe.offline.folder else folder / "offline"
    place.mkdir(parents=True, exist_ok=True)
    wanted, path = origin(run), place / LIST
    if not path.exists():
        written(path, (json.dumps(wanted, indent=1) + "\n").encode())
    held = json.loads(path.read_text(encoding="utf-8"))
    for name in dict.fromkeys([*wanted, *held]):
        if held.get(name) != wanted.get(name):
            raise ValueError(
                f"offline.folder: the samples in {place} are those of {name} = {held.get(name)!r}; expected "
                f"{wanted.get(name)!r}, as in this recipe, or another folder"
            )
    return place


def origin(run: Run) -> dict[str, object]:
    """What the samples and their rewards depend on, by the name that the user typed; as JSON gives it back."""
    recipe = run.recipe
    found: dict[str, object] = {
        "seed": recipe.seed,
        "offline.samples": recipe.offline.samples,
        "prompts": f"{len(run.prompts)} with SHA-256 {digest(run.prompts)}",
    }
    found |= {f"policy.{name}": value for name, value in recipe.policy.items() if name not in TRAINING}
    asked = [reward for reward in recipe.rewards if not reward.held_out_only]
    found |= {f"rewards.{reward.name}": {"weight": reward.weight, **reward.component} for reward in asked}
    plain: dict[str, object] = json.loads(json.dumps(found, default=str))
    return plain


def digest(prompts: Sequence[Prompt]) -> str:
    """Of what the prompts say, the names of their media included."""
    rows = [
        [one.id, one.text, one.target, one.columns, one.messages, {name: [path.name for path in paths] for name, paths in one.media.items()}]
        for one in prompts
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def parts(run: Run) -> list[range]:
    """The prompts by parts whose samples are made together: about as many as an iteration trains on, one prompt at least."""
    train, total = run.recipe.train, len(run.prompts)
    size = max(1, train.prompts * train.group_size // run.recipe.offline.samples)
    return [range(first, min(first + size, total)) for first in range(0, total, size)]


def made(run: Run, part: range) -> list[Kept]:
    """The samples of a part's prompts by today's weights, with their rewards; a group for each prompt."""
    options, seed = run.recipe.offline, run.recipe.seed
    batch = requests(run.prompts, part, group_size=options.samples, seed=seed, iteration=0, first_group=part[0])
    trajectory, samples = run.policy.rollout(batch)
    feedback = score(run.rewards, run.weights, samples)
    each = torch.arange(len(batch)).view(len(part), options.samples)
    return [Kept(0.0, 0, in_memory(trajectory.take(rows)), take_feedback(feedback, rows)) for rows in each]


# ---- files


def file_of(folder: Path, prompt: Prompt) -> Path:
    """Where the samples of a prompt are."""
    return folder / f"prompt_{prompt.id}.safetensors"


def write(folder: Path, group: Kept) -> None:
    """Keep the samples of a prompt, whole or not at all."""
    tensors, facts = packed([group])
    data = in_bytes(checkpoint.storable(tensors), {"facts": json.dumps(facts)})
    written(file_of(folder, group.trajectory.batch.prompts[0]), data)


def written(path: Path, data: bytes) -> None:
    """Write a file beside its place, wait until it is on the disk, and put it there; runs may share its folder."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read(folder: Path, prompt: Prompt) -> Kept:
    """The samples of a prompt; raises ValueError for a damaged file."""
    path = file_of(folder, prompt)
    try:
        with safe_open(path, "pt") as file:
            tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["facts"]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; expected the samples of prompt {prompt.id}") from None
    [group] = unpacked(packing.Packed(checkpoint.aligned(tensors), json.loads(facts)), [prompt])
    return group


# ---- in an iteration


def regrouped(run: Run, phases: Stopwatch) -> Gathered:
    """Groups of stored samples of the prompts whose turn it is, with draws of this iteration; advances the run's position."""
    batch, size = next_batch(run), run.recipe.train.group_size
    with phases.measure("read"):
        pairs = zip(batch.prompts[::size], batch.group[::size].tolist(), strict=True)
        groups = [chosen(run, prompt, number) for prompt, number in pairs]
        stored = joined_trajectory([trajectory for trajectory, _ in groups])
        judged = joined_feedback([feedback for _, feedback in groups])
    trajectory = redrawing(run.policy).redrawn(stored, batch)
    feedback = replace(judged, group=batch.group, prompts=batch.prompts, mask=trajectory.mask)
    run.rollouts += 1
    return Gathered(trajectory, feedback, feedback, {}, torch.zeros(len(batch), dtype=torch.bool))


def chosen(run: Run, prompt: Prompt, group: int) -> tuple[Trajectory, Feedback]:
    """The stored samples that make up a group of the run, G of the prompt's M."""
    kept = read(run.stored, prompt)
    rows = members(
        len(kept.trajectory), run.recipe.train.group_size, derive(run.recipe.seed, "offline", run.iteration, group)
    )
    return kept.trajectory.take(rows), take_feedback(kept.feedback, rows)


def members(made: int, size: int, seed: int) -> Tensor:
    """`size` of the samples that were made of a prompt, none twice; (G,) int64."""
    return torch.randperm(made, generator=torch.Generator().manual_seed(seed))[:size]
