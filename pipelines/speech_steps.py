"""The denoising steps of a flow over speech: its noise levels, the distribution of a step, recordings in calls of bounded size.

Axes: B recordings, b those of one call (of equal length), N samples, C channels, K bands or frequencies, T frames, S steps.
x_1 = centre + noise, so y_t = x_t - t centre is a plain flow from unit noise, whose steps are those of `mmgrpo.transitions`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmgrpo import seeds
from mmgrpo.transitions import Gaussian, Level, Step, from_velocity, log_ratio, ode
from mmgrpo.types import Evaluation
from pipelines import decisions
from pipelines.speech_flow import times
from pipelines.speech_models import Model

Sampler = Callable[[Step], Gaussian]


class Given(NamedTuple):
    """What a call's recordings give to every one of their steps."""

    noisy: Tensor  # (b, N)
    condition: Tensor  # (b, Cc, K, T)
    centre: Tensor  # (b, C, K, T)


class Velocities(NamedTuple):
    """Of one step, under several weights; (b, C, K, T) each."""

    new: Tensor  # today's, with gradient
    old: Tensor  # before any update, in a replay
    sampled: Tensor  # in the rollout
    reference: Tensor | None


@dataclass(frozen=True)
class Options:
    """How a flow is run as a policy."""

    steps: int  # S
    sampler: Sampler  # of the planned steps; the others are deterministic
    reduction: Literal["mean", "sum"] = "mean"  # over the latent elements of a step
    rollout_rows: int = 16  # recordings in one call
    replay_rows: int = 16  # recordings whose graphs are held at once
    autocast: torch.dtype | None = None
    power: float = 1.0  # of the uniform times; above 1 the steps near the clean end are shorter
    same_noise: bool = False  # all samples of a group start from the same noise

    def __post_init__(self) -> None:
        for name, rows in (("rollout_rows", self.rollout_rows), ("replay_rows", self.replay_rows)):
            if rows < 1:
                raise ValueError(f"{name} is {rows}; expected at least 1")


class Precise(nn.Module):
    """A network computed in its weights' dtype, or under autocast, whose output is at least float32."""

    def __init__(self, network: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.autocast = network, autocast

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """(b, C, K, T), (b,), (b, Cc, K, T) -> (b, C, K, T)."""
        kind = next(self.network.parameters()).dtype
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            found: Tensor = self.network(x.to(kind), t.to(kind), condition.to(kind))
        return found.to(torch.promote_types(found.dtype, torch.float32))


@dataclass(frozen=True)
class Steps:
    """A flow with its noise levels."""

    model: Model
    options: Options

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """From noise to clean, S + 1 of them; float64 scalars on the CPU."""
        return tuple(Level(1 - t, t) for t in times(self.options.steps, self.options.power).double())

    @cached_property
    def precise(self) -> Model:
        """The model with its network in the precision of the options."""
        return Model(Precise(self.model.network, self.options.autocast), self.model.representation)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.network.parameters()).device

    @torch.no_grad()
    def given(self, noisy: Tensor) -> Given:
        """What the representation makes of noisy recordings, (b, N), on the network's device."""
        noisy = noisy.to(self.device)
        representation = self.model.representation
        return Given(noisy, representation.condition(noisy), representation.centre(noisy))

    def velocity(self, x: Tensor, step: int, given: Given) -> Tensor:
        """The network's output in a state, at least float32; (b, C, K, T) -> (b, C, K, T)."""
        return self.velocity_at(x, self.levels[step].sigma.expand(len(x)), given)

    def velocity_at(self, x: Tensor, t: Tensor, given: Given) -> Tensor:
        """The same at any times; (b, C, K, T), (b,) -> (b, C, K, T)."""
        found: Tensor = self.precise.network(x, t.to(self.device, torch.float32), given.condition)
        return found

    def gaussian(self, x: Tensor, velocity: Tensor, step: int, centre: Tensor, planned: bool = True) -> Gaussian:
        """The distribution of the next state under a velocity; of a step that is not planned the deterministic one."""
        sampler = self.options.sampler if planned else ode
        return transition(x, velocity, centre, self.levels, step, sampler)

    def evaluated(self, x: Tensor, following: Tensor, velocities: Velocities, step: int, centre: Tensor) -> Evaluation:
        """A planned step from a state to the one that followed; (b, C, K, T) each -> (b, 1)."""

        def gaussian(of: Tensor) -> Gaussian:
            return self.gaussian(x, of, step, centre)

        new, old, sampled, reference = velocities
        held = None if reference is None else gaussian(reference)
        dt = (self.levels[step].sigma - self.levels[step + 1].sigma).to(new.device)
        decision = decisions.Part(following, gaussian(new), gaussian(old), held, dt)
        gap = log_ratio(following, decision.old, gaussian(sampled), self.options.reduction)
        return replace(decisions.evaluate([decision], self.options.reduction), sampler_gap=gap.unsqueeze(1))

    def decode(self, latent: Tensor, given: Given) -> Tensor:
        """The recordings of latents, within [-1, 1]; (b, C, K, T) -> (b, N) on the CPU."""
        return self.model.representation.decode(latent, given.noisy).clamp(-1, 1).cpu()

    def latent(self, length: int) -> torch.Size:
        """The shape of one latent of a recording of N samples: (C, K, T)."""
        noisy = torch.zeros(1, length, device=self.device)
        return self.model.representation.centre(noisy).shape[1:]


def transition(
    x: Tensor, velocity: Tensor, centre: Tensor, levels: tuple[Level, ...], step: int, sampler: Sampler
) -> Gaussian:
    """The distribution of the next state; computed in y_t = x_t - t centre, whose noise has mean 0; (b, C, K, T)."""
    now, following = levels[step], levels[step + 1]
    centre = centre.to(velocity)
    y = x.to(velocity) - now.sigma.to(velocity) * centre
    clean, noise = from_velocity(y, velocity - centre, now)
    mean, std = sampler(Step(y, clean, noise, now, following, levels[1]))
    return Gaussian(mean + following.sigma.to(velocity) * centre, std)


def calls(length: Tensor, most: int) -> list[Tensor]:
    """Rows of each call, (b,) int64: of equal length, at most so many, in their order; (B,) int64."""
    return [part for size in length.unique() for part in (length == size).nonzero().flatten().split(most)]


def fresh_noise(seed: int, ids: Sequence[int], what: int | str, shape: Sequence[int]) -> Tensor:
    """Standard-normal noise of each sample id for a step or another purpose; -> (b, *shape) on the CPU."""
    return seeds.normal([seeds.derive(seed, one, what) for one in ids], shape)


def uniform(seed: int) -> Tensor:
    """A number in [0, 1); ()."""
    return torch.rand((), generator=torch.Generator().manual_seed(seed))
