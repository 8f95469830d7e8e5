"""A flow over speech as a policy: it enhances noisy recordings; each denoising step is one decision, or each draw.

`pipelines/recordings.py` makes the recordings, `pipelines/speech_steps.py` the steps, `pipelines/speech_draws.py` the draws of clean
recordings noised again; this file holds what an optimizer asks.
Axes: B samples, b those of one call, N samples of a waveform, C channels, K bands or frequencies, T frames, S steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from mmgrpo import seeds
from mmgrpo.draws import Draws
from mmgrpo.schedules import Plan
from mmgrpo.transitions import flow_sde
from mmgrpo.types import Batch, Chunk, Consumer, Evaluation, Finding, Lesson, Prompt, Reference, Samples, Trajectory
from pipelines import flow_draws, recordings, speech_check, speech_draws, speech_models
from pipelines.mel import with_vocoder
from pipelines.recordings import Heard, Mixing, hear
from pipelines.recordings_check import check
from pipelines.speech_draws import State
from pipelines.speech_flow import matching_loss
from pipelines.speech_models import Model
from pipelines.speech_steps import Given, Options, Sampler, Steps, Velocities, calls, fresh_noise, uniform
from pipelines.weights import Half, Precision, choose_trained


class SpeechPolicy:
    """A flow over speech as a policy."""

    whole_samples = False  # a replay hands over one step or draw at a time

    def __init__(
        self,
        model: Model,
        options: Options,
        decided: Plan | Draws,
        mixing: Mixing,
        *,
        train: Sequence[str] = (),
        clipped: float = 0.001,
    ) -> None:
        if mixing.rate != model.representation.rate:
            raise ValueError(
                f"recordings come at {mixing.rate} Hz; expected {model.representation.rate}, the model's rate"
            )
        self.steps = Steps(model, options)
        self.decided = decided
        self.mixing = mixing
        self.clipped = clipped
        self.longest = 0  # samples of any prompt; records are padded to it, so that rollouts can be joined
        self.notes = [choose_trained(model.network, train)]

    @property
    def model(self) -> Model:
        return self.steps.model

    @property
    def options(self) -> Options:
        return self.steps.options

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Read every recording; raises one ValueError that lists all that cannot be used."""
        check(prompts, self.mixing, self.clipped)
        lengths = [recordings.length(prompt, self.mixing) for prompt in prompts]
        self.longest = max(lengths)
        self.notes.append(
            f"{len(prompts)} recordings of {min(lengths)} to {self.longest} samples at {self.mixing.rate} Hz"
        )

    # -- rollout ------------------------------------------------------------------------------------------------

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        """One enhanced recording per row; the rows of a group hear the same. Each depends on its ids alone, up to rounding."""
        steps = self.options.steps
        if isinstance(self.decided, Draws):
            trajectory, samples = self.walked(batch, self.mixing, torch.zeros(steps, dtype=torch.bool), ends=True)
            return speech_draws.drawn(trajectory, self.decided), samples
        return self.walked(batch, self.mixing, self.decided(steps, batch.iteration, batch.seed))

    def redrawn(self, trajectory: Trajectory, batch: Batch) -> Trajectory:
        """Recorded samples as the rows of another batch, noised again by its draws; of a policy with draws."""
        assert isinstance(self.decided, Draws)  # the recipe was checked
        return speech_draws.drawn(replace(trajectory, batch=batch), self.decided)

    def generate(self, batch: Batch) -> Samples:
        """One enhanced recording per row, whole, with the noise of the sampler off."""
        return self.walked(
            batch, replace(self.mixing, seconds=None), torch.zeros(self.options.steps, dtype=torch.bool)
        )[1]

    @torch.no_grad()
    def walked(self, batch: Batch, mixing: Mixing, planned: Tensor, ends: bool = False) -> tuple[Trajectory, Samples]:
        """One enhanced recording per row, and its decisions; the planned steps, (S,) bool, are stochastic and trained.

        `ends`: the latents that recordings end with are recorded.
        """
        heard = hear(batch, mixing)
        record, audio = {"length": heard.length}, torch.zeros_like(heard.clean)
        longest = max(self.longest, heard.noisy.shape[1])
        if ends or planned.any():
            record["noisy"] = pad(heard.noisy, (0, longest - heard.noisy.shape[1]))
        for rows in calls(heard.length, self.options.rollout_rows):
            audio[rows, : int(heard.length[rows[0]])] = self._walk(batch, heard, rows, planned, record, ends)
        mask = planned.expand(len(batch), -1).clone()
        samples = Samples(
            batch,
            audio=audio.unsqueeze(1),
            rate=self.mixing.rate,
            reference_audio=heard.clean.unsqueeze(1),
            audio_length=heard.length,
        )
        return Trajectory(batch, mask, torch.zeros_like(mask, dtype=torch.int64), record), samples

    def _walk(
        self, batch: Batch, heard: Heard, rows: Tensor, planned: Tensor, record: dict[str, Tensor], ends: bool
    ) -> Tensor:
        """From noise to clean recordings, (b, N); what a replay needs is put into the record."""
        given = self.steps.given(heard.noisy[rows, : int(heard.length[rows[0]])])
        shape, ids = given.centre.shape[1:], batch.sample[rows].tolist()

        def keep(name: str, value: Tensor) -> None:
            if name not in record:
                latent = self.steps.latent(max(self.longest, heard.noisy.shape[1]))
                record[name] = torch.zeros(len(batch), *latent, dtype=value.dtype)
            record[name][rows, ..., : shape[-1]] = value.cpu()

        x = given.centre + fresh_noise(batch.seed, self.starts(batch.take(rows)), "start", shape).to(given.centre)
        for step, stochastic in enumerate(planned.tolist()):
            velocity = self.steps.velocity(x, step, given)
            mean, std = self.steps.gaussian(x, velocity, step, given.centre, stochastic)
            if stochastic:
                keep(f"state.{step}", x)
                keep(f"velocity.{step}", velocity)
                mean = mean + std * fresh_noise(batch.seed, ids, step, shape).to(mean)
            x = mean.float()
            if stochastic:
                keep(f"state.{step + 1}", x)
        if ends:
            keep("clean", x)
        return self.steps.decode(x, given)

    def starts(self, batch: Batch) -> list[int]:
        """The ids that the noise of each row's start follows from: its own or, with `same_noise`, its group's."""
        ids: list[int] = (batch.group if self.options.same_noise else batch.sample).tolist()
        return ids

    # -- replay -------------------------------------------------------------------------------------------------

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        """The trajectory with the velocities under today's weights, in the calls of the coming replays."""
        record = dict(trajectory.record)
        for part in parts:
            taken = trajectory.take(part)
            for rows, column, state, given in self._recorded(taken):
                with torch.enable_grad():  # the kernels of a replay, which may differ from those without a gradient
                    found = self.steps.velocity_at(state.x, state.t, given).detach().cpu()
                name = f"anchor.{column}"
                if name not in record:
                    latent = self.steps.latent(record["noisy"].shape[1])
                    record[name] = torch.full((len(trajectory), *latent), torch.nan, dtype=found.dtype)
                record[name][part[rows], ..., : found.shape[-1]] = found
        return replace(trajectory, record=record)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        """Evaluate one trained step or draw of a few rows at a time, with gradient; `consume` may run backward.

        Without an anchor today's weights are those that sampled: a log-ratio compares each step with its own velocity.
        """
        held = None
        for rows, column, state, given in self._recorded(trajectory):
            if reference is not None:
                with torch.no_grad(), reference.applied():
                    held = self.steps.velocity_at(state.x, state.t, given)
            found = self._evaluated(trajectory, rows, column, state, given, held)
            consume(Chunk(rows, torch.tensor([column]), found))

    def _recorded(self, trajectory: Trajectory) -> Iterator[tuple[Tensor, int, State, Given]]:
        """Rows, column, state and recordings of every call of a replay."""
        length = trajectory.record["length"]
        for rows in calls(length, self.options.replay_rows):
            given = self.steps.given(trajectory.record["noisy"][rows, : int(length[rows[0]])])
            for column in trajectory.mask[rows].any(0).nonzero().flatten().tolist():
                yield rows, column, self._state(trajectory, rows, column, given), given

    def _state(self, trajectory: Trajectory, rows: Tensor, column: int, given: Given) -> State:
        """What the network sees of one decision of a call's rows."""
        if isinstance(self.decided, Draws):
            return speech_draws.noised(trajectory.take(rows), column, self._of(trajectory, "clean", rows, given), given)
        x = self._of(trajectory, f"state.{column}", rows, given).to(given.centre)
        return State(x, self.steps.levels[column].sigma.expand(len(rows)))

    def _of(self, trajectory: Trajectory, name: str, rows: Tensor, given: Given) -> Tensor:
        """What was recorded of a call's rows without its padding; (b, C, K, T)."""
        return trajectory.record[name][rows, ..., : given.centre.shape[-1]]

    def _evaluated(
        self, trajectory: Trajectory, rows: Tensor, column: int, state: State, given: Given, held: Tensor | None
    ) -> Evaluation:
        """One decision of a call's rows under today's weights and those of a reference; (b, 1) each."""
        velocity = self.steps.velocity_at(state.x, state.t, given)

        def recorded(name: str) -> Tensor:
            return self._of(trajectory, name, rows, given).to(velocity)

        old = velocity.detach()
        if f"anchor.{column}" in trajectory.record:
            anchored = recorded(f"anchor.{column}")
            old = torch.where(anchored.isnan(), old, anchored)  # NaN: replayed before any update
        if state.target is not None:
            return flow_draws.evaluated(velocity, state.target, state.t, old, held)
        velocities = Velocities(velocity, old, recorded(f"velocity.{column}"), held)
        return self.steps.evaluated(state.x, recorded(f"state.{column + 1}"), velocities, column, given.centre)

    # -- training -----------------------------------------------------------------------------------------------

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """The flow-matching loss of each row, a few at a time; time and noise follow from the sample ids."""
        heard = hear(batch, self.mixing)
        for rows in calls(heard.length, self.options.replay_rows):
            length, ids = int(heard.length[rows[0]]), batch.sample[rows].tolist()
            clean, noisy = (wave[rows, :length].to(self.steps.device) for wave in (heard.clean, heard.noisy))
            t = torch.stack([uniform(seeds.derive(batch.seed, one, "teach", "time")) for one in ids]).to(clean)
            eps = fresh_noise(batch.seed, ids, "teach", self.steps.latent(length)).to(clean)
            consume(rows, matching_loss(self.steps.precise, clean, noisy, t, eps))

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training changes, by name."""
        return {name: value for name, value in self.model.network.named_parameters() if value.requires_grad}

    def adapters_off(self) -> AbstractContextManager[None]:
        """Raises ValueError: a network of speech has no adapters."""
        raise ValueError("reference.kind is 'adapters_off', but a speech policy has no adapters; expected 'frozen'")

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What must hold before training, on a few of the run's prompts."""
        return [*(Finding(True, "model", note) for note in self.notes), *speech_check.findings(self, prompts)]

    def save(self, folder: Path) -> None:
        """The model's folder, as `pipelines.speech_models.load` reads it."""
        speech_models.save(folder, self.model.network, self.model.representation)


def load(
    *,
    plan: Plan | None = None,
    draws: Draws | None = None,
    model: str | None = None,
    new: Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    steps: int = 10,
    power: float = 1.0,
    network: str | None = None,
    vocoder: str | None = None,
    train: tuple[str, ...] = (),
    reduction: Literal["mean", "sum"] = "mean",
    noise: Path | None = None,
    snr: tuple[float, float] = (0.0, 10.0),
    impulses: Path | None = None,
    seconds: float | None = None,
    resample: bool = True,
    clipped: float = 0.001,
    rollout_rows: int = 16,
    replay_rows: int = 16,
    dtype: Precision = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    autocast: Half | None = None,
    same_noise: bool = False,
) -> SpeechPolicy:
    """A policy from a folder of `pipelines.speech_models`, or with random weights, to be pretrained.

    model: the folder; new: in its place, what its config.json would hold. power: steps lie at
    uniform times to this power; above 1 the last ones, which decide most, are short. plan: which of the steps are
    stochastic and trained; sampler: how, by default mmgrpo.transitions:flow_sde; or, with draws, clean latents noised again
    (`mmgrpo.draws.Draws`), sampled without noise. network: "path/to/file.py:Class" for weights of a network of your own. vocoder: for mel
    spectrograms, "griffin_lim" or "path/to/file.py:build". train: patterns of the names of trained parameters ("blocks.*"), by default all. reduction: over
    the latent elements of a step. noise, impulses: folders of noise and of room impulse responses, for prompts without a
    noisy recording; snr: lowest and highest, dB. seconds: longer recordings are
    cut to it at random in training. resample: convert
    recordings of other rates. clipped: share of samples at full scale that a recording may have. rollout_rows,
    replay_rows: recordings computed at once. dtype: of the weights; autocast: of the network's computation.
    same_noise: all samples of a group start from one noise, and differ by the sampler's alone.
    """
    decided = flow_draws.chosen(sampler is not None, plan, draws)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded = speech_models.opened(model, new, network)
    loaded = replace(loaded, representation=with_vocoder(loaded.representation, vocoder, place))
    loaded.network.to(place, getattr(torch, dtype))
    kind = None if autocast is None else getattr(torch, autocast)
    options = Options(steps, sampler or flow_sde, reduction, rollout_rows, replay_rows, kind, power, same_noise)
    mixing = Mixing(loaded.representation.rate, resample, seconds, noise, snr, impulses)
    return SpeechPolicy(loaded, options, decided, mixing, train=train, clipped=clipped)
