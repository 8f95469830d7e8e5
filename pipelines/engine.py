"""Run any diffusers pipeline so that its denoising steps are recorded, and evaluated again in calls of bounded size.

Nothing here knows a model. `pipelines/tape.py` stands between the pipeline's own loop and its scheduler,
`pipelines/listeners.py` records and replays, `pipelines/levels.py` reads the noise levels.
Axes: B samples, S decisions (groups of denoiser calls and the steps that follow them), b rows of one pipeline call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from mmgrpo import seeds
from mmgrpo.types import Batch, Chunk, Consumer, Evaluation, Prompt, Reference, Samples, Trajectory
from pipelines import arguments
from pipelines.batching import Capture, DenoiserCall, doubled, joined, together
from pipelines.guides import steered_steps
from pipelines.listeners import Recorder, Replayer
from pipelines.memo import Memo
from pipelines.options import Layout, Options
from pipelines.source_videos import given
from pipelines.stubs import Stub
from pipelines.tape import Discovery, Tape


class Engine:
    """One pipeline, how it is run, and what was learnt of it."""

    def __init__(
        self, pipeline: DiffusionPipeline, options: Options, revision: str = "", cache: Path | None = None
    ) -> None:
        arguments.validate(pipeline, options.call)
        self.pipeline = pipeline
        self.options = options
        self.tape = Tape(pipeline)
        self.memo = Memo(f"{type(pipeline).__name__}|{revision}", cache)
        self.stub = Stub()
        self.layout = Layout((), ())

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
        recorder = self._recorder(probe, torch.ones(100_000, dtype=torch.bool))
        self.run(recorder, probe, "single")
        self.layout.steps = recorder.counter.group + 1
        self.layout.parts = dict(recorder.parts)

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

    # -- rollout ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, batch: Batch, planned: Tensor) -> tuple[Trajectory, Samples]:
        """One sample per row, and its decisions; the planned steps, (S,) bool, are stochastic and trained."""
        record, samples = self._generate(batch, planned)
        trained = [f"output.{step}.0" in record for step in range(self.layout.steps)]
        mask = torch.tensor(trained).expand(len(batch), -1).clone()
        trajectory = Trajectory(batch, mask, torch.zeros_like(mask, dtype=torch.int64), record)
        if self.layout.anchored or int(record["rows"].max()) > self.options.replay_rows:
            trajectory, self.layout.rounding = self.anchor(trajectory)
        return trajectory, samples

    @torch.no_grad()
    def generate(self, batch: Batch) -> Samples:
        """One sample per row with the noise of the sampler off."""
        return self._generate(batch, ~self.planned)[1]

    def _generate(self, batch: Batch, planned: Tensor) -> tuple[dict[str, Tensor], Samples]:
        """The record and the samples of all rows, in order."""
        record: dict[str, Tensor] = {}
        media: dict[str, Any] = {}
        for rows in self._calls(batch, torch.tensor(self.options.rollout_rows).expand(len(batch))):
            part = batch.take(rows)
            recorder = self._recorder(part, planned)
            made = arguments.to_media(self.run(recorder, part), len(rows))
            seats = {"rows": torch.full_like(rows, len(rows)), "seat": torch.arange(len(rows))}
            arguments.fill(media, made, rows, len(batch))
            arguments.fill(record, recorder.record | seats, rows, len(batch))
        rate = arguments.sampling_rate(self.tape.modules) if "audio" in media else None
        return record, Samples(batch, rate=rate, source_video=given(batch.prompts, self.options.video), **media)

    def _recorder(self, batch: Batch, planned: Tensor) -> Recorder:
        row_seeds = [seeds.derive(batch.seed, int(sample)) for sample in batch.sample]
        keep_outputs = self.stub.kind == "recorded"
        steered = steered_steps(self.options.guide, batch.prompts, row_seeds, planned) if self.layout.steps else None
        return Recorder(
            self.layout.denoisers, self.memo, self.options.kernel, planned, row_seeds, keep_outputs,
            self.options.offload_trajectory, self.options.keep_states, steered,
        )  # fmt: skip

    # -- replay -------------------------------------------------------------------------------------------------

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate the trained steps of a few rows at a time; they are handed to `consume` as soon as they are known."""
        for rows in self._recorded_calls(trajectory):
            where = trajectory.record["seat"][rows] if self.layout.seated else torch.arange(len(rows))
            call = rows[-1:].repeat(int(trajectory.record["rows"][rows[0]]))  # other batch shapes round differently
            call[where] = rows
            part = trajectory.take(call)
            references = None
            if reference is not None:
                with torch.no_grad(), reference.applied():
                    references = self._replay_rows(part, lambda steps, evaluation: None)

            def emit(steps: Tensor, evaluation: Evaluation, rows: Tensor = rows, where: Tensor = where) -> None:
                consume(Chunk(rows, steps, evaluation.take(where)))

            self._replay_rows(part, emit, references)

    def _recorded_calls(self, trajectory: Trajectory) -> Iterator[Tensor]:
        """Rows of each call; where seats matter, no two rows of a call have the same."""
        record = trajectory.record
        if not self.layout.seated:
            yield from self._calls(trajectory.batch, record["rows"])
            return
        for rows in self._calls(trajectory.batch, torch.full_like(record["rows"], len(trajectory)), record["rows"]):
            waiting = rows
            while len(waiting):
                firsts = [
                    int((record["seat"][waiting] == seat).nonzero()[0]) for seat in record["seat"][waiting].unique()
                ]
                taken = torch.zeros(len(waiting), dtype=torch.bool)
                taken[firsts] = True
                yield waiting[taken]
                waiting = waiting[~taken]

    def _replay_rows(
        self,
        part: Trajectory,
        emit: Callable[[Tensor, Evaluation], None],
        references: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One or, where steps depend on earlier ones, several calls of the pipeline; -> the model outputs by record name."""
        wanted = part.mask.any(0).nonzero().flatten()
        outputs: dict[str, Tensor] = {}
        if self.options.replay_steps > 1:
            for steps in wanted.split(self.options.replay_steps):
                outputs |= self._replay_together(part, steps, emit, references)
            return outputs
        for steps in [wanted] if self.stub.kind == "zeros" else wanted.split(1):
            outputs |= self._replay_steps(part, steps.tolist(), partial(one_step, emit), references)
        return outputs

    def _replay_together(
        self,
        part: Trajectory,
        steps: Tensor,
        emit: Callable[[Tensor, Evaluation], None],
        references: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Steps evaluated in one forward of the denoiser, between a run that captures and one that uses it."""
        listed = steps.tolist()
        calls = self._captured(part, listed)
        with autocast(self.pipeline, self.options.autocast):
            supply = together(calls, partial(self._captured, doubled(part), listed))
        found: list[Evaluation] = []
        outputs = self._replay_steps(part, listed, lambda step, value: found.append(value), references, supply)
        emit(steps, joined(found))
        return outputs

    def _replay_steps(
        self,
        part: Trajectory,
        steps: Sequence[int],
        emit: Callable[[int, Evaluation], None],
        references: Mapping[str, Tensor] | None = None,
        supply: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One call of the pipeline that evaluates the given steps."""
        replayer = Replayer(
            self.layout.denoisers, self.memo, self.options.kernel, part.record, steps, self.layout.parts,
            self.options.reduction, self.stub, emit, references, supply,
        )  # fmt: skip
        self.run(replayer, part.batch)
        return replayer.outputs

    def _captured(self, part: Trajectory, steps: Sequence[int]) -> dict[str, DenoiserCall]:
        """The denoiser calls of the given steps, which are not made: their arguments do not depend on their outputs."""
        capture = Capture(self.stub, steps)
        replayer = Replayer(
            self.layout.denoisers, self.memo, self.options.kernel, part.record, (), self.layout.parts,
            self.options.reduction, capture, lambda step, evaluation: None, last=max(steps),
        )  # fmt: skip
        with torch.no_grad():
            self.run(replayer, part.batch)
        return capture.calls

    @torch.no_grad()
    def outputs(self, trajectory: Trajectory) -> dict[str, Tensor]:
        """The model outputs of the trained steps under today's weights, one call for all rows; by record name."""
        return self._replay_rows(trajectory, lambda steps, evaluation: None)

    @torch.no_grad()
    def noise_off_states(self, batch: Batch) -> list[Tensor]:
        """The next state after every scheduler step with the sampler's noise off."""
        recorder = self._recorder(batch, torch.zeros(self.layout.steps, dtype=torch.bool))
        recorder.everything = True
        self.run(recorder, batch)
        return [tensor for name, tensor in recorder.record.items() if name.startswith("next.")]

    @torch.no_grad()
    def anchor(self, trajectory: Trajectory) -> tuple[Trajectory, float]:
        """The trajectory with its model outputs recomputed at `replay_rows`, and the mean |log-ratio| that this removed."""
        changed = (*(name for name in trajectory.record if name.startswith("output.")), "rows", "seat")
        record = {**trajectory.record, **{name: trajectory.record[name].clone() for name in changed}}
        noise: list[Tensor] = []
        for rows in self._calls(trajectory.batch, torch.tensor(self.options.replay_rows).expand(len(trajectory))):
            outputs = self._replay_rows(
                trajectory.take(rows), lambda steps, evaluation: noise.append(evaluation.log_ratio.abs().mean())
            )
            for name, output in outputs.items():
                record[name][rows] = output.to(record[name])
            record["rows"][rows], record["seat"][rows] = len(rows), torch.arange(len(rows))
        anchored = Trajectory(trajectory.batch, trajectory.mask, trajectory.kind, record)
        return anchored, float(torch.stack(noise).mean()) if noise else 0.0

    # -- one call of the pipeline ---------------------------------------------------------------------------------

    def run(self, listener: Any, batch: Batch, form: arguments.Form | None = None) -> Any:
        """The pipeline's own call for a batch under a listener; -> its result, or None if the listener stopped it."""
        ids = batch.group if self.options.same_noise else batch.sample
        generators = [Generator().manual_seed(seeds.derive(batch.seed, "start", int(row))) for row in ids]
        asked = arguments.call_arguments(
            self.pipeline, batch.prompts, generators, self.options.call, self.options.columns,
            form or self.layout.form, self.options.video,
        )  # fmt: skip
        with autocast(self.pipeline, self.options.autocast):
            return self.tape.run(listener, asked, seeds.derive(batch.seed, "global", batch.iteration))

    def _calls(self, batch: Batch, sizes: Tensor, kinds: Tensor | None = None) -> Iterator[Tensor]:
        """Rows of each call of the pipeline, at most their size at a time and of one kind; of one prompt if it must be."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (prompt, kind) in enumerate(
            zip(batch.prompts, (sizes if kinds is None else kinds).tolist(), strict=True)
        ):
            groups.setdefault((0 if self.layout.mixed else prompt.id, kind), []).append(row)
        for rows in groups.values():
            calls = -(-len(rows) // (1 if self.layout.form == "single" else int(sizes[rows[0]])))
            yield from torch.tensor(rows).tensor_split(calls)


def one_step(emit: Callable[[Tensor, Evaluation], None], step: int, evaluation: Evaluation) -> None:
    emit(torch.tensor([step]), evaluation)


def autocast(pipeline: DiffusionPipeline, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision for one call of the pipeline; cached casts would lose the gradient of weights first used without it."""
    if dtype is None:
        return nullcontext()  # to ask a pipeline for its device is a walk over all modules
    return torch.autocast(pipeline.device.type, dtype, cache_enabled=not torch.is_grad_enabled())


def probe_batch(prompts: Sequence[Prompt], samples: Sequence[int]) -> Batch:
    """Requests of a run of its own, with which a pipeline is looked at before training."""
    ids = torch.tensor(samples)
    return Batch(tuple(prompts), torch.arange(len(prompts)), ids, seed=seeds.derive("probe"), iteration=0)
