"""Any diffusers pipeline as a policy: the pipeline object itself samples, is replayed, trained and saved.

`pipelines/engine.py` records and replays its denoising steps; this file holds what an optimizer asks of it.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor, nn
from torch.nn import Parameter

from mmgrpo.draws import Draws
from mmgrpo.routes import Routes
from mmgrpo.schedules import Plan
from mmgrpo.toml import nearest
from mmgrpo.transitions import Gaussian, Step
from mmgrpo.types import Batch, Consumer, Finding, Preview, Prompt, Reference, Samples, Trajectory
from pipelines import previews, weights
from pipelines.decisions import from_levels
from pipelines.engine import Engine
from pipelines.forward_process import ForwardProcess
from pipelines.guides import Steering
from pipelines.native import native
from pipelines.options import Options
from pipelines.processes import Process
from pipelines.reverse_process import ReverseProcess
from pipelines.schedulers import quiet, require_supported
from pipelines.source_videos import Cut, require_usable
from pipelines.tape import nested_pipelines
from pipelines.weights import Half, Precision

Decode = Literal["whole", "sliced", "tiled"]


class DiffusionPolicy:
    """A pipeline as a policy; `prepare` must have seen the run's prompts before anything else."""

    whole_samples = False  # a replay hands over one step, or a few, at a time

    def __init__(
        self,
        process: Process,
        *,
        train: Sequence[str] = (),
        lora: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.process = process
        self.engine = process.engine
        self.train = tuple(train)  # component names; empty means whatever predicts the steps
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.notes: list[str] = []  # what was found and decided in `prepare`

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Freeze what is not trained, find the denoisers, add adapters, and find a way to replay the pipeline exactly.

        Raises ValueError with what differed and at which step if there is no such way.
        """
        require_usable(prompts, self.engine.options.video)
        for pipeline in nested_pipelines(self.engine.pipeline):
            pipeline.set_progress_bar_config(disable=True)
        for module in self.engine.tape.modules.values():
            module.eval().requires_grad_(False)  # dropout would turn the ratio into noise
        for scheduler in self.engine.tape.schedulers():
            require_supported(scheduler)
            self.notes += quiet(scheduler, noisy=self.engine.options.kernel is native)
        self.engine.discover(prompts[0], self.train)
        self.notes += weights.make_trainable(self.engine.modules(), self.lora, self.gradient_checkpointing)
        self.engine.measure(prompts[0])
        self.notes += self.process.settle(prompts)
        if self.engine.predictions:
            self.notes.append(previews.measure(self.engine, prompts))

    def keep_predictions(self) -> None:
        """From now on rollouts keep what `previews` shows; before `prepare`, which finds out whether the pipeline can show it."""
        if not isinstance(self.process, ReverseProcess):
            raise ValueError(
                "the advantage needs what is predicted behind each step, and the rollouts of policy.draws record no steps; "
                "expected policy.sampler with policy.plan or policy.routes"
            )
        self.engine.predictions = True

    def previews(self, trajectory: Trajectory) -> Iterator[Preview]:
        """The clean samples that were predicted behind each step but the last."""
        return previews.previews(self.engine, trajectory)

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One sample per row; each row depends on the run's seed, its sample id and its prompt alone."""
        return self.process.rollout(batch)

    def redrawn(self, trajectory: Trajectory, batch: Batch) -> Trajectory:
        """Recorded samples as the rows of another batch, noised again by its draws; of a policy with draws."""
        assert isinstance(self.process, ForwardProcess)  # the recipe was checked
        return self.process.redrawn(trajectory, batch)

    def generate(self, batch: Batch) -> Samples:
        """One sample per row without exploration."""
        return self.process.generate(batch)

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with what a replay compares with, where the rollout did not record it."""
        return self.process.anchor(trajectory, parts)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate the decisions of a few rows at a time; each is handed to `consume` as soon as it is known."""
        self.process.replay(trajectory, consume, reference)

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes, by component and name."""
        return self.engine.trainable()

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within the context the pipeline computes without its adapters; raises ValueError if it has none."""
        if self.lora is None:
            raise ValueError("reference.kind is 'adapters_off', but policy.lora is not set; expected 'frozen'")
        return weights.adapters_off(self.engine.modules().values())

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """The self-test of the process, in this policy's dtype, guidance and batch shape."""
        return [*(Finding(True, "pipeline", note) for note in self.notes), *self.process.findings(prompts)]

    def save(self, folder: Path) -> None:
        """Adapters in the format that the pipeline loads back; full weights with `save_pretrained`."""
        weights.save(self.engine.pipeline, self.engine.modules(), self.lora is not None, folder)


def load(
    *,
    model: str,
    call: Mapping[str, Any],
    sampler: Callable[[Step], Gaussian] | Literal["native"] | None = None,
    plan: Plan | None = None,
    routes: Routes | None = None,
    draws: Draws | None = None,
    evaluation_call: Mapping[str, Any] | None = None,
    revision: str | None = None,
    pipeline: str = "DiffusionPipeline",
    dtype: Precision | Mapping[str, Precision] = "bfloat16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    autocast: Half | None = None,
    train: tuple[str, ...] = (),
    lora: Mapping[str, Any] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    rollout_rows: int = 8,
    replay_rows: int = 8,
    replay_steps: int = 1,
    same_noise: bool = False,
    columns: tuple[str, ...] = (),
    video: Cut | None = None,
    gradient_checkpointing: bool = False,
    cache: Path | None = None,
    offload_trajectory: bool = False,
    decode: Decode = "whole",
    guide: Steering | None = None,
) -> DiffusionPolicy:
    """A policy from a diffusers model.

    model: folder or hub name; pipeline: a diffusers class, or "module:Class" of your own. call: arguments of the pipeline's own
    call (height, num_inference_steps, guidance_scale, ...); evaluation_call: those that held-out samples have instead. Decisions
    are denoising steps, plan: which of them are stochastic, or routes: how the samples of a group go through the schedule; sampler:
    how, "native" for the scheduler's own noise; or, with draws, clean samples noised again (`mmgrpo.draws.Draws`), sampled by the pipeline's own solver. dtype: of the weights, or of components by name with "default" for
    the others (a video VAE is often kept in float32). train: names of trained components, by default those
    that predict the steps. lora: rank, alpha and targets of adapters; without it the components are trained whole.
    reduction: over the latent elements of a decision. rollout_rows, replay_rows: samples in one call. replay_steps: steps
    of these samples in one forward of a replay. same_noise: start noise shared inside a group. columns: of the data,
    passed to the call. video: frames, start, stride, height and width of the videos that prompts bring. cache: folder in
    which encodings are kept between runs. offload_trajectory: between rollout and replay it is on the CPU. decode: all
    samples of a call at once, one at a time ("sliced"), or each in parts whose seams are blended ("tiled"; conditions are
    encoded in parts too). guide: what moves the stochastic steps of a rollout, such as pipelines.process_reward:guide.
    """
    require_one_process(sampler=sampler, plan=plan, routes=routes, draws=draws)
    if Path(model).is_absolute() and not Path(model).is_dir():
        raise ValueError(f"policy.model is {model!r}, and there is no such folder")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded = pipeline_class(pipeline).from_pretrained(model, revision=revision, dtype=dtypes(dtype))
    if not isinstance(dtype, str):
        require_components(loaded, dtype)
    decode_in_parts(loaded, decode)
    options = Options(
        call=call,
        kernel=native if sampler == "native" else from_levels(sampler),
        evaluation_call=evaluation_call or {},
        reduction=reduction,
        rollout_rows=rollout_rows,
        replay_rows=replay_rows,
        replay_steps=replay_steps,
        same_noise=same_noise,
        columns=columns,
        autocast=None if autocast is None else getattr(torch, autocast),
        video=video or Cut(),
        offload_trajectory=offload_trajectory,
        guide=guide,
    )
    engine = Engine(loaded.to(place), options, f"{model}@{revision}, {dtype}, {autocast}, {decode}", cache)
    process = ReverseProcess(engine, plan, routes) if draws is None else ForwardProcess(engine, draws)
    return DiffusionPolicy(process, train=train, lora=lora, gradient_checkpointing=gradient_checkpointing)


def require_one_process(**given: object) -> None:
    """Raise ValueError unless the options sampler, plan, routes and draws name one process."""
    names = {name for name, value in given.items() if value is not None}
    if names not in ({"sampler", "plan"}, {"sampler", "routes"}, {"draws"}):
        said = ", ".join(f"policy.{name}" for name in given if name in names) or "none of them"
        wanted = "policy.sampler with policy.plan or policy.routes, or policy.draws alone"
        raise ValueError(f"{said} arrived; expected {wanted}")


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """A pipeline class by its name in diffusers, or by "module:Class"; raises ValueError if there is none."""
    module, _, attribute = name.rpartition(":")
    source = importlib.import_module(module) if module else diffusers
    found = getattr(source, attribute, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise ValueError(f"policy.pipeline is {name!r}; expected a pipeline class of diffusers or 'module:Class'")
    return found


def dtypes(dtype: Precision | Mapping[str, Precision]) -> torch.dtype | dict[str, torch.dtype]:
    """As diffusers takes them."""
    if isinstance(dtype, str):
        return getattr(torch, dtype)
    return {name: getattr(torch, kind) for name, kind in dtype.items()}


def require_components(pipeline: DiffusionPipeline, dtype: Mapping[str, Precision]) -> None:
    """Raise ValueError if a dtype is asked for a component that the pipeline does not have."""
    known = ("default", *(name for name, part in pipeline.components.items() if isinstance(part, nn.Module)))
    for name in dtype:
        if name not in known:
            raise ValueError(f"policy.dtype.{name}: {type(pipeline).__name__} has no such model{nearest(name, known)}")


def decode_in_parts(pipeline: DiffusionPipeline, decode: Decode) -> None:
    """Have the pipeline's VAE decode one sample at a time, and in tiles if asked; raises ValueError if it cannot."""
    if decode == "whole":
        return
    vae = pipeline.components.get("vae")
    found = "no VAE" if vae is None else f"{type(vae).__name__}, which cannot"
    refusal = f"policy.decode is {decode!r}; {type(pipeline).__name__} has {found}: expected 'whole'"
    if not isinstance(vae, AutoencoderMixin):
        raise ValueError(refusal)
    try:
        vae.enable_slicing()
        if decode == "tiled":
            vae.enable_tiling()
    except NotImplementedError:  # diffusers' word for a VAE without
        raise ValueError(refusal) from None
