"""A pipeline's denoising steps as decisions: recorded where the plan has them stochastic, and evaluated again.

Axes: B samples, S decisions (groups of denoiser calls and the steps that follow them), b rows of one pipeline call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmgrpo.routes import Route, Routes
from mmgrpo.schedules import Plan, all_but_last
from mmgrpo.types import Batch, Chunk, Consumer, Evaluation, Finding, Prompt, Reference, Samples, Trajectory
from pipelines import selftest
from pipelines.batching import Capture, DenoiserCall, doubled, joined, together
from pipelines.engine import MOST, Engine, autocast
from pipelines.listeners import Replayer
from pipelines.settle import settle
from pipelines.travel import schedule_shares, thinned, travelled, ways_of


class ReverseProcess:
    """The denoising steps of a pipeline under a sampler."""

    def __init__(self, engine: Engine, plan: Plan | None = None, routes: Routes | None = None) -> None:
        self.engine = engine
        self.plan = plan or all_but_last  # all samples take all steps
        self.routes = routes  # in its place: samples of a group go different ways
        self.shares = torch.ones(0)  # of noise, at the levels of the schedule and at its end, for routes; (S + 1,)

    def settle(self, prompts: Sequence[Prompt]) -> list[str]:
        """Find the most economical exact replay; -> notes; raises ValueError with what differed and at which step."""
        guide, layout = self.engine.options.guide, self.engine.layout
        if guide is not None:
            guide.require_usable(layout.steps, layout.parts)
        notes = settle(self, prompts)
        if self.routes is not None:
            self.shares = schedule_shares(self.engine, prompts[0])
            notes.append(f"routes through levels {', '.join(f'{float(share):.3f}' for share in self.shares)}")
        return notes

    def findings(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """The four parts of the self-test, in this policy's dtype, guidance and batch shape."""
        return selftest.findings(self, prompts)

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory itself: the rollout recorded the model outputs that a replay compares with."""
        return trajectory

    @torch.no_grad()
    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One sample per row; each row depends on the run's seed, its sample id and its prompt alone."""
        engine = self.engine
        if self.routes is None:
            return self.walked(batch, self.plan(engine.layout.steps, batch.iteration, batch.seed))
        return travelled(self, batch, self.routes(self.shares, batch.iteration, batch.seed))

    @torch.no_grad()
    def walked(self, batch: Batch, planned: Tensor) -> tuple[Trajectory, Samples]:
        """One sample per row, and its decisions; the planned steps, (S,) bool, are stochastic and trained."""
        taken, trained = range(self.engine.layout.steps), planned.nonzero().flatten().tolist()
        return travelled(self, batch, (Route(tuple(taken), tuple(trained)),))

    @torch.no_grad()
    def generate(self, batch: Batch) -> Samples:
        """One sample per row with the noise of the sampler off."""
        never = torch.zeros(MOST, dtype=torch.bool)
        engine = self.engine
        return engine.made(batch, lambda part: engine.recorder(part, never), engine.options.evaluation_call)[1]

    # -- replay -------------------------------------------------------------------------------------------------

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate the trained steps of a few rows at a time; they are handed to `consume` as soon as they are known."""
        for rows in self._recorded_calls(trajectory):
            where = trajectory.record["seat"][rows] if self.engine.layout.seated else torch.arange(len(rows))
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
        record, ways = trajectory.record, ways_of(trajectory)
        if not self.engine.layout.seated:
            yield from self.engine.calls(trajectory.batch, record["rows"], ways)
            return
        for rows in self.engine.calls(trajectory.batch, torch.full_like(record["rows"], len(trajectory)), ways):
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
        if self.engine.options.replay_steps > 1:
            for steps in wanted.split(self.engine.options.replay_steps):
                outputs |= self._replay_together(part, steps, emit, references)
            return outputs
        for steps in [wanted] if self.engine.stub.kind == "zeros" else wanted.split(1):
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
        with autocast(self.engine.pipeline, self.engine.options.autocast):
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
            self.engine.layout.denoisers, self.engine.memo, self.engine.options.kernel, part.record, steps, self.engine.layout.parts,
            self.engine.options.reduction, self.engine.stub, emit, references, supply,
        )  # fmt: skip
        self.engine.run(replayer, part.batch, reschedule=thinned(part))
        return replayer.outputs

    def _captured(self, part: Trajectory, steps: Sequence[int]) -> dict[str, DenoiserCall]:
        """The denoiser calls of the given steps, which are not made: their arguments do not depend on their outputs."""
        capture = Capture(self.engine.stub, steps)
        replayer = Replayer(
            self.engine.layout.denoisers, self.engine.memo, self.engine.options.kernel, part.record, (), self.engine.layout.parts,
            self.engine.options.reduction, capture, lambda step, evaluation: None, last=max(steps),
        )  # fmt: skip
        with torch.no_grad():
            self.engine.run(replayer, part.batch, reschedule=thinned(part))
        return capture.calls

    @torch.no_grad()
    def outputs(self, trajectory: Trajectory) -> dict[str, Tensor]:
        """The model outputs of the trained steps under today's weights, one call for all rows; by record name."""
        return self._replay_rows(trajectory, lambda steps, evaluation: None)

    @torch.no_grad()
    def noise_off_states(self, batch: Batch) -> list[Tensor]:
        """The next state after every scheduler step with the sampler's noise off."""
        recorder = self.engine.recorder(batch, torch.zeros(self.engine.layout.steps, dtype=torch.bool))
        recorder.everything = True
        self.engine.run(recorder, batch)
        return [tensor for name, tensor in recorder.record.items() if name.startswith("next.")]

    @torch.no_grad()
    def rounded(self, trajectory: Trajectory) -> tuple[Trajectory, float]:
        """The trajectory with its model outputs recomputed at `replay_rows`, and the mean |log-ratio| that this removed."""
        changed = (*(name for name in trajectory.record if name.startswith("output.")), "rows", "seat")
        record = {**trajectory.record, **{name: trajectory.record[name].clone() for name in changed}}
        noise: list[Tensor] = []
        most = torch.tensor(self.engine.options.replay_rows).expand(len(trajectory))
        for rows in self.engine.calls(trajectory.batch, most, ways_of(trajectory, sizes=False)):
            outputs = self._replay_rows(
                trajectory.take(rows), lambda steps, evaluation: noise.append(evaluation.log_ratio.abs().mean())
            )
            for name, output in outputs.items():
                record[name][rows] = output.to(record[name])
            record["rows"][rows], record["seat"][rows] = len(rows), torch.arange(len(rows))
        anchored = Trajectory(trajectory.batch, trajectory.mask, trajectory.kind, record)
        return anchored, float(torch.stack(noise).mean()) if noise else 0.0


def one_step(emit: Callable[[Tensor, Evaluation], None], step: int, evaluation: Evaluation) -> None:
    emit(torch.tensor([step]), evaluation)
