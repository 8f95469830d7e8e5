"""Process reward models at work: one that steers the steps of a rollout, and one that learns from a generator's own samples.

`pipelines/process_reward_network.py` is the model. A lesson (train.stage = "pretrain") generates samples, asks the reward about them,
noises the clean latents again at random levels, and regresses the reward from what is left.
Axes: B samples, b those of one chunk, K levels of each.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from mmgrpo import seeds
from mmgrpo.groups import rank_correlation
from mmgrpo.steering import Strength, rowwise
from mmgrpo.types import (
    Batch,
    Consumer,
    Finding,
    Lesson,
    Prompt,
    Reference,
    Reward,
    Samples,
    Trajectory,
    require_shape,
)  # fmt: skip
from pipelines.diffusion import DiffusionPolicy
from pipelines.engine import probe_batch
from pipelines.guides import Steering, by_differences, by_gradient
from pipelines.process_reward_network import ProcessReward, Sizes, latent_axes, load, save

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which what was learned is examined


class Learner:
    """A process reward model as what the stage "pretrain" trains; it generates as its generator does."""

    whole_samples = False

    def __init__(
        self,
        generator: DiffusionPolicy,
        reward: Reward,
        network: ProcessReward | Mapping[str, int],
        draws: int,
        rows: int,
    ) -> None:
        if draws < 1 or rows < 1:
            raise ValueError(f"policy.draws is {draws} and policy.rows is {rows}; expected at least 1")
        self.generator = generator
        self.reward = reward
        self.made = network  # or what a new one is made with
        self.draws = draws
        self.rows = rows

    @property
    def network(self) -> ProcessReward:
        assert isinstance(self.made, ProcessReward)  # after `prepare`
        return self.made

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Prepare and freeze the generator, and make a network for its latents if there is none."""
        engine = self.generator.engine
        self.generator.prepare(prompts)
        for value in engine.trainable().values():
            value.requires_grad_(False)
        engine.options = replace(engine.options, keep_states=True)
        latents = self._finished(self.generator.rollout(probe_batch(prompts[:1], [0]))[0])
        channels, axes = latent_axes(latents)
        if not isinstance(self.made, ProcessReward):
            self.made = ProcessReward(Sizes(channels, axes, **self.made))
        self.made.to(latents.device).requires_grad_(True)

    def _finished(self, trajectory: Trajectory) -> Tensor:
        """The latents that the pipeline decodes, (B, ...) float32."""
        return trajectory.record[f"next.{self.generator.engine.layout.steps - 1}.0"].float()

    # -- lessons ------------------------------------------------------------------------------------------------

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """Squared error of the reward of each row, a few at a time: the mean over K levels; 0 where it has no opinion."""
        clean, wanted = self._judged(batch)
        known = ~wanted.isnan()
        for rows in torch.arange(len(batch)).split(self.rows):
            level = self._levels(batch.take(rows)).to(clean)  # (b, K)
            found = torch.stack([self._read(batch, clean, rows, level[:, draw], draw) for draw in range(self.draws)], 1)
            error = (found - wanted[rows].nan_to_num(0)[:, None]).square().mean(1)
            consume(rows, error * known[rows])

    def _judged(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Clean latents (B, ...) and their rewards (B,) on one device."""
        trajectory, samples = self.generator.rollout(batch)
        with torch.no_grad():
            wanted = self.reward(samples)
        if not isinstance(wanted, Tensor):
            raise ValueError(f"policy.reward gives {sorted(wanted)}; expected one number a sample")
        require_shape("policy.reward", wanted, len(batch))
        clean = self._finished(trajectory)
        return clean, wanted.to(clean)

    def _levels(self, batch: Batch) -> Tensor:
        """K levels of each row, spread evenly over [0, 1] from a random start; (b, K)."""
        starts = [torch.rand((), generator=self._generator(batch, sample)) for sample in batch.sample.tolist()]
        return (torch.arange(self.draws) + torch.stack(starts)[:, None]) / self.draws

    def _generator(self, batch: Batch, sample: int) -> torch.Generator:
        return torch.Generator().manual_seed(seeds.derive(batch.seed, sample, "level"))

    def _read(self, batch: Batch, clean: Tensor, rows: Tensor, level: Tensor, draw: int | str) -> Tensor:
        """The network's reward of some rows noised to levels (b,); -> (b,)."""
        ids = [seeds.derive(batch.seed, sample, "noise", draw) for sample in batch.sample[rows].tolist()]
        noise = seeds.normal(ids, clean.shape[1:]).to(clean)
        t = rowwise(level, noise)
        prompts = [batch.prompts[row] for row in rows.tolist()]
        return self.network((1 - t) * clean[rows] + t * noise, level, prompts)

    @torch.no_grad()
    def examined(self, batch: Batch) -> dict[str, Tensor]:
        """Rank correlation with the reward inside of each group, by noise level; (B,), NaN where the rewards of a group are equal."""
        clean, wanted = self._judged(batch)
        found = {}
        for level in LEVELS:
            scores = [
                self._read(batch, clean, rows, torch.full((len(rows),), level).to(clean), f"at {level:g}")
                for rows in torch.arange(len(batch)).split(self.rows)
            ]
            found[f"rank_correlation_at_{level:g}"] = rank_correlation(
                torch.cat(scores).cpu(), wanted.cpu(), batch.group
            )
        return found

    # -- what else an optimizer asks ----------------------------------------------------------------------------

    def generate(self, batch: Batch) -> Samples:
        """The generator's own samples."""
        return self.generator.generate(batch)

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        raise self._refusal()

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        raise self._refusal()

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        raise self._refusal()

    def adapters_off(self) -> AbstractContextManager[None]:
        raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError("a process reward model takes no decisions to align; expected train.stage = 'pretrain'")

    def trainable(self) -> dict[str, Parameter]:
        """The network's parameters by name."""
        return dict(self.network.named_parameters())

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What latents the network reads, and that the reward tells samples apart or at least has an opinion."""
        batch = probe_batch([prompts[row % len(prompts)] for row in range(4)], range(4))
        clean, wanted = self._judged(batch)
        count = sum(value.numel() for value in self.network.parameters())
        heard = wanted[~wanted.isnan()]
        told = (
            f"{len(heard)} of 4 samples judged, from {heard.min():.3g} to {heard.max():.3g}"
            if len(heard)
            else "none judged"
        )
        return [
            *(Finding(True, "generator", note) for note in self.generator.notes),
            Finding(True, "process reward model", f"{count:,} parameters read latents {tuple(clean.shape[1:])}"),
            Finding(len(heard) > 0, "reward", told),
        ]

    def save(self, folder: Path) -> None:
        """The model's folder, as `guide` reads it."""
        save(folder, self.network)


def learner(
    *,
    generator: DiffusionPolicy,
    reward: Reward,
    model: Path | None = None,
    network: Mapping[str, int] | None = None,
    draws: int = 8,
    rows: int = 64,
) -> Learner:
    """A process reward model to be trained with train.stage = "pretrain".

    generator: a table that builds the policy whose samples it learns from, pipelines.diffusion:load, with its own guide or without;
    reward: of those samples, one number each. model: a folder to go on from; network: options of a new one in its place
    (patch, width, blocks, heads, vocabulary, words). draws: noise levels of each sample; rows: samples of one forward.
    """
    if model is not None and network is not None:
        raise ValueError(f"policy.model is {str(model)!r} and policy.network is {dict(network)}; expected one of them")
    return Learner(generator, reward, load(model) if model is not None else (network or {}), draws, rows)


def guide(
    *,
    model: Path,
    beta: float | None = None,
    kappa: float | None = None,
    by_length: bool = True,
    normalised: bool = False,
    most: float = 1.0,
    first: int = 0,
    last: int | None = None,
    directions: int = 0,
    width: float = 0.01,
) -> Steering:
    """Euphonium's guide (arXiv 2602.04928): steps are moved by kappa D grad R, kappa = g^2 / (2 beta).

    model: folder of the process reward model. beta, or kappa itself; by_length: multiplied by the length D of the step;
    normalised: the gradient has norm 1. most: of a shift in stds of the step. first, last: steps of the window; the authors
    guide steps 12 to the end of 16 with beta 3.125. directions: above 0 the gradient is estimated from so many differences of
    the value of the predicted data, each `width` to both sides.
    """
    network = load(model)

    def value(state: Tensor, level: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return network.to(state.device)(state, level, prompts)

    found = by_differences(value, directions, width) if directions else by_gradient(value)
    return Steering(found, Strength(beta, kappa, by_length, normalised, most), first, last)
