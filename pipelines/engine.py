"""Run any diffusers pipeline under listeners, in calls of bounded size.

Nothing here knows a model. `pipelines/tape.py` stands between the pipeline's own loop and its scheduler,
`pipelines/listeners.py` and `pipelines/matching.py` listen, `pipelines/levels.py` reads the noise levels.
Axes: B samples, S decisions (groups of denoiser calls and the steps that follow them), b rows of one pipeline call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from mmgrpo import seeds
from mmgrpo.types import Batch, Prompt, Samples
from pipelines import arguments, thinning
from pipelines.guides import steered_steps
from pipelines.levels import Levels
from pipelines.listeners import STRAIGHT_ON, Recorder, Way
from pipelines.memo import Memo
from pipelines.options import Layout, Options
from pipelines.source_videos import given
from pipelines.stubs import Stub
from pipelines.tape import Discovery, Tape
from pipelines.thinning import Change

MOST = 100_000  # steps of any pipeline


class Recording(Protocol):
    """A listener that keeps what a replay needs."""

    @property
    def record(self) -> Mapping[str, Tensor]: ...


class Engine:
    """One pipeline, how it is run, and what was learnt of it."""

    def __init__(
        self, pipeline: DiffusionPipeline, options: Options, revision: str = "", cache: Path | None = None
    ) -> None:
        arguments.validate(pipeline, {**options.call, **options.evaluation_call})
        self.pipeline = pipeline
        self.options = options
        self.tape = Tape(pipeline)
        self.memo = Memo(f"{type(pipeline).__name__}|{revision}", cache)
        self.stub = Stub()
        self.layout = Layout((), ())
        self.predictions = False  # of clean samples are kept in a rollout

    @torch.no_grad()
    def discover(self, prompt: Prompt, train: Sequence[str]) -> None:
        """Find the denoisers with one run of the stock pipeline; raises ValueError if `train` names no component."""
        discovery = Discovery()
        self.run(discovery, probe_batch([prompt], [0]), "single")
        trained = tuple(train) or discovery.predictors(self.tape.modules)
        for name in trained:
            if name not in self.tape.modules:
                raise ValueError(f"policy.train names {name!r}; the pipeline has {sorted(self.tape.modules)}")
        self.layout = Layout(discovery.denoisers(), trained)

    @torch.no_grad()
    def measure(self, prompt: Prompt) -> None:
        """Count the decisions of a run in which every step is planned."""
        probe = probe_batch([prompt], [0])
        recorder = self.recorder(probe, torch.ones(MOST, dtype=torch.bool))
        self.run(recorder, probe, "single")
        self.layout.steps = recorder.counter.group + 1
        self.layout.parts = dict(recorder.parts)

    def schedule(self, prompt: Prompt, changed: Mapping[str, Any] | None = None) -> list[Levels]:
        """The steps of the schedule that the pipeline sets; raises ValueError if it sets none."""
        found: list[Levels] = []

        def note(scheduler: SchedulerMixin) -> None:
            found.extend(thinning.steps(scheduler))
            raise thinning.Seen

        try:
            self.run(None, probe_batch([prompt], [0]), "single", changed, note)
        except thinning.Seen:
            return found
        name = type(self.pipeline).__name__
        raise ValueError(f"{name} never sets its scheduler's timesteps; expected a pipeline that does")

    def recorder(self, batch: Batch, planned: Tensor, way: Way = STRAIGHT_ON) -> Recorder:
        """The listener of one call's rollout in which the planned steps, (S,) bool, are stochastic."""
        row_seeds = [seeds.derive(batch.seed, int(sample)) for sample in batch.sample]
        keep_outputs = self.stub.kind == "recorded"
        steered = steered_steps(self.options.guide, batch.prompts, row_seeds, planned) if self.layout.steps else None
        return Recorder(
            self.layout.denoisers, self.memo, self.options.kernel, planned, row_seeds, keep_outputs,
            self.options.offload_trajectory, self.options.keep_states, steered, way,
        )  # fmt: skip

    def modules(self) -> dict[str, nn.Module]:
        """The trained modules by component name."""
        return {name: self.tape.modules[name] for name in self.layout.trained}

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes, by component and name."""
        return {
            f"{component}.{name}": parameter
            for component, module in self.modules().items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def dtype(self) -> torch.dtype:
        """In which the trained modules compute."""
        weights = (parameter.dtype for module in self.modules().values() for parameter in module.parameters())
        return self.options.autocast or min(weights, key=lambda kind: kind.itemsize)

    @property
    def planned(self) -> Tensor:
        """Every step, (S,) bool."""
        return torch.ones(self.layout.steps, dtype=torch.bool)

    # -- samples ---------------------------------------------------------------------------------------------------

    def made(
        self,
        batch: Batch,
        listen: Callable[[Batch], Recording],
        changed: Mapping[str, Any] | None = None,
        reschedule: Change | None = None,
    ) -> tuple[dict[str, Tensor], Samples]:
        """The record and the samples of all rows, in order; `listen` makes the listener of each call."""
        record: dict[str, Tensor] = {}
        media: dict[str, Any] = {}
        for rows in self.calls(batch, torch.tensor(self.options.rollout_rows).expand(len(batch))):
            part = batch.take(rows)
            listener = listen(part)
            made = arguments.to_media(self.run(listener, part, changed=changed, reschedule=reschedule), len(rows))
            seats = {"rows": torch.full_like(rows, len(rows)), "seat": torch.arange(len(rows))}
            arguments.fill(media, made, rows, len(batch))
            arguments.fill(record, dict(listener.record) | seats, rows, len(batch))
        rate = arguments.sampling_rate(self.tape.modules) if "audio" in media else None
        return record, Samples(batch, rate=rate, source_video=given(batch.prompts, self.options.video), **media)

    # -- one call of the pipeline ---------------------------------------------------------------------------------

    def run(
        self,
        listener: Any,
        batch: Batch,
        form: arguments.Form | None = None,
        changed: Mapping[str, Any] | None = None,
        reschedule: Change | None = None,
    ) -> Any:
        """The pipeline's own call for a batch under a listener; -> its result, or None if the listener stopped it.

        `changed` are call arguments in the place of the usual ones; `reschedule` changes the schedule that the call sets.
        """
        ids = batch.group if self.options.same_noise else batch.sample
        generators = [Generator().manual_seed(seeds.derive(batch.seed, "start", int(row))) for row in ids]
        asked = arguments.call_arguments(
            self.pipeline, batch.prompts, generators, {**self.options.call, **(changed or {})}, self.options.columns,
            form or self.layout.form, self.options.video,
        )  # fmt: skip
        with autocast(self.pipeline, self.options.autocast):
            return self.tape.run(listener, asked, seeds.derive(batch.seed, "global", batch.iteration), reschedule)

    def calls(self, batch: Batch, sizes: Tensor, kinds: Tensor | None = None) -> Iterator[Tensor]:
        """Rows of each call of the pipeline, at most their size at a time and of one kind; of one prompt if it must be."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (prompt, kind) in enumerate(
            zip(batch.prompts, (sizes if kinds is None else kinds).tolist(), strict=True)
        ):
            groups.setdefault((0 if self.layout.mixed else prompt.id, kind), []).append(row)
        for rows in groups.values():
            calls = -(-len(rows) // (1 if self.layout.form == "single" else int(sizes[rows[0]])))
            yield from torch.tensor(rows).tensor_split(calls)


def autocast(pipeline: DiffusionPipeline, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision for one call of the pipeline; cached casts would lose the gradient of weights first used without it."""
    if dtype is None:
        return nullcontext()  # to ask a pipeline for its device is a walk over all modules
    return torch.autocast(pipeline.device.type, dtype, cache_enabled=not torch.is_grad_enabled())


def probe_batch(prompts: Sequence[Prompt], samples: Sequence[int]) -> Batch:
    """Requests of a run of its own, with which a pipeline is looked at before training."""
    ids = torch.tensor(samples)
    return Batch(tuple(prompts), torch.arange(len(prompts)), ids, seed=seeds.derive("probe"), iteration=0)
