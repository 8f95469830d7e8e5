"""A pipeline's samples as decisions of the forward process: clean samples noised again, at levels of its own schedule.

The rollout is the pipeline's own call with its own scheduler, of any order. A draw is evaluated by that call too, on a schedule
that holds the levels of the draws alone. Axes: B samples, K draws, b rows of one call, D elements of a draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import Parameter

from mmgrpo.draws import Draws, all_noise_seeds, all_shares
from mmgrpo.transitions import Level
from mmgrpo.types import KINDS, Batch, Chunk, Consumer, Evaluation, Finding, Prompt, Reference, Samples, Trajectory
from pipelines import forward_check, mixed_draws, thinning
from pipelines.engine import Engine
from pipelines.levels import Levels
from pipelines.matching import Emit, Matcher, Sampling, State, Witness, cleans, noise_of, olds
from pipelines.settle import REFUSALS, shown

FINE = 500  # steps of the schedule that levels are taken from


class ForwardProcess:
    """Draws of the samples that a pipeline made with its own solver."""

    def __init__(self, engine: Engine, draws: Draws) -> None:
        self.engine = engine
        self.draws = draws
        self.levels: list[Levels] = []  # of a fine schedule; FINE of them once the process is settled
        self.mixed = False  # rows at different levels share a forward

    def settle(self, prompts: Sequence[Prompt]) -> list[str]:
        """Choose the most economical call in which a draw is evaluated as the pipeline's own loop would; -> notes."""
        try:
            self.levels = self.engine.schedule(prompts[0], self.call())
        except REFUSALS as error:
            name = type(self.engine.pipeline).__name__
            raise ValueError(f"policy.draws: {name} has no schedule of {FINE} steps: {shown(error)}") from error
        return forward_check.settle(self, prompts)

    def findings(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What must hold before training."""
        return forward_check.findings(self, prompts)

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes."""
        return self.engine.trainable()

    @cached_property
    def noise_shares(self) -> Tensor:
        """Of the fine schedule's levels; (FINE,)."""
        return torch.stack([thinning.noise_share(level.now) for level in self.levels])

    def call(self) -> dict[str, object]:
        """The call's arguments in training that are not those of a rollout: those of the fine schedule."""
        return {**self.draws.call, "num_inference_steps": FINE}

    # -- rollout ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One sample per row by the pipeline's own solver, and the levels and noises of its draws."""
        record, samples = self.sampled(batch, {})
        return self.drawn(batch, record), samples

    def redrawn(self, trajectory: Trajectory, batch: Batch) -> Trajectory:
        """Recorded samples as the rows of another batch, with the levels and noises of its draws."""
        return self.drawn(batch, self.clean(trajectory.record))

    def drawn(self, batch: Batch, clean: Mapping[str, Tensor]) -> Trajectory:
        """Clean samples of the rows, by part, with the levels and noises of the batch's draws, which are their decisions."""
        sets, which = all_shares(self.draws, batch).unique(dim=0, return_inverse=True)
        entries = torch.tensor([thinning.nearest(self.noise_shares, levels) for levels in sets])[which]  # (B, K)
        mask, kind = torch.ones(entries.shape, dtype=torch.bool), torch.full(entries.shape, KINDS["draw"])
        record = {**clean, "entry": entries, "noise": all_noise_seeds(self.draws, batch)}
        return Trajectory(batch, mask, kind, record)

    @torch.no_grad()
    def generate(self, batch: Batch) -> Samples:
        """One sample per row by the pipeline's own solver."""
        return self.sampled(batch, self.engine.options.evaluation_call)[1]

    @torch.no_grad()
    def sampled(
        self, batch: Batch, changed: Mapping[str, object], witness: Witness | None = None
    ) -> tuple[dict[str, Tensor], Samples]:
        """The latents that the rows end with, by part, and their samples; some arguments of the call are changed."""
        engine = self.engine
        record, samples = engine.made(
            batch, lambda part: Sampling(engine.layout.denoisers, engine.memo, len(part), witness), changed
        )
        return self.clean(record), samples

    def clean(self, record: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of a record until its replay: the latents that samples end with."""
        place = "cpu" if self.engine.options.offload_trajectory else self.engine.pipeline.device
        return {name: value.to(place) for name, value in record.items() if name.startswith("clean.")}

    # -- replay -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with the outputs under today's weights, in the calls of the coming replays."""
        record = dict(trajectory.record)
        for part in parts:
            taken = trajectory.take(part)
            for rows in self._calls(taken):
                for draw, output in self._outputs(taken.take(rows)).items():
                    name = f"old.{draw}"
                    if name not in record:
                        record[name] = output.new_full((len(trajectory), output.shape[1]), torch.nan)
                    record[name][part[rows]] = output
        return replace(trajectory, record=record)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate one draw of a few rows at a time, with gradient; `consume` may run backward."""
        for rows in self._calls(trajectory):
            part = trajectory.take(rows)
            references = None
            if reference is not None:
                with torch.no_grad(), reference.applied():
                    references = self._outputs(part)

            def emit(draw: int, evaluation: Evaluation, rows: Tensor = rows) -> None:
                consume(Chunk(rows, torch.tensor([draw]), evaluation))

            self._run(part, emit, references)

    def _calls(self, trajectory: Trajectory) -> list[Tensor]:
        """Rows of each call: where levels cannot share a forward, those of one set of levels."""
        entries = trajectory.record["entry"]
        kinds = None if self.mixed else entries.unique(dim=0, return_inverse=True)[1]
        most = torch.tensor(self.engine.options.replay_rows).expand(len(trajectory))
        return list(self.engine.calls(trajectory.batch, most, kinds))

    def _outputs(self, part: Trajectory) -> dict[int, Tensor]:
        """The outputs of each draw under today's weights; (b, D)."""
        return self._run(part, lambda draw, evaluation: None, None)

    def _run(self, part: Trajectory, emit: Emit, references: Mapping[int, Tensor] | None) -> dict[int, Tensor]:
        """The draws of a call's rows; -> the outputs of each, (b, D)."""
        if self.mixed:
            return mixed_draws.evaluated(self, part, emit, references)
        entries = part.record["entry"][0].tolist()
        state = partial(noised, part, [self.levels[entry].now for entry in entries])
        return self.matched(part, [0, *entries], state, emit, references)

    def matched(
        self,
        part: Trajectory,
        taken: Sequence[int],
        state: State,
        emit: Emit,
        references: Mapping[int, Tensor] | None = None,
        changed: Mapping[str, object] | None = None,
    ) -> dict[int, Tensor]:
        """One call on the taken entries of the fine schedule, or that of changed arguments, with the given states behind the first."""
        engine, record = self.engine, part.record
        matcher = Matcher(
            engine.layout.denoisers, engine.memo, len(taken) - 1, engine.layout.parts, cleans(record), state,
            engine.stub, emit, olds(record), references,
        )  # fmt: skip
        asked = self.call() if changed is None else changed
        engine.run(matcher, part.batch, changed=asked, reschedule=thinning.thinner(taken))
        if len(matcher.outputs) != len(taken) - 1:
            raise ValueError(
                f"{type(engine.pipeline).__name__} evaluated {len(matcher.outputs)} of {len(taken) - 1} draws: its loop does not "
                "follow its scheduler's timesteps; expected a pipeline that does, for policy.draws"
            )
        return matcher.outputs


def noised(
    part: Trajectory, levels: Sequence[Level], draw: int, piece: int, like: Tensor, frozen: Tensor | None
) -> Tensor:
    """The clean samples noised to the level of a draw, elements without noise left as they are; of the shape of `like`."""
    clean = part.record[f"clean.{piece}"].to(like)
    level, noise = levels[draw], noise_of(part, draw, piece).to(like)
    state = (level.alpha.to(like) * clean + level.sigma.to(like) * noise).reshape(like.shape)
    return state if frozen is None else torch.where(frozen, clean.reshape(like.shape), state)
