"""The denoising steps of images inside an answer: noise levels and the distribution of a step, and planned steps as decisions.

Axes: B samples, b rows, J images at most, K steps, M of them evaluated in one call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mmgrpo.schedules import Plan
from mmgrpo.transitions import Gaussian, Level, Step, from_velocity, log_ratio, ode
from mmgrpo.types import Batch, Evaluation, Kind
from pipelines import decisions
from pipelines.decisions import Sampler
from pipelines.hybrid_layout import Pair
from pipelines.hybrid_reading import Noisy, versions

if TYPE_CHECKING:
    from pipelines.hybrid_evaluation import Outputs
    from pipelines.hybrid_writing import Written


@dataclass(frozen=True)
class Steps:
    """K steps from noise (time 1) to an image (time 0)."""

    count: int  # K
    sampler: Sampler  # of the planned steps; the others are deterministic
    shift: float = 1.0  # above 1 the steps lie closer near the noise: t -> shift t / (1 + (shift - 1) t)
    reduction: Literal["mean", "sum"] = "mean"  # of log-ratios over the latent elements of a step

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"policy.steps is {self.count}; expected at least 2")

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """K + 1 of them; float64 scalars on the CPU."""
        t = torch.linspace(1, 0, self.count + 1, dtype=torch.float64)
        shifted = self.shift * t / (1 + (self.shift - 1) * t)
        return tuple(Level(1 - one, one) for one in shifted)

    def time(self, step: int, like: Tensor) -> Tensor:
        """The time in which a step starts, for every row; -> (b,) float32."""
        return self.levels[step].sigma.to(like.device, torch.float32).expand(len(like))

    def dt(self, step: int) -> Tensor:
        """The positive length of a step; ()."""
        return self.levels[step].sigma - self.levels[step + 1].sigma

    def gaussian(self, x: Tensor, velocity: Tensor, step: int, planned: bool = True) -> Gaussian:
        """The distribution of the next state under a velocity; (b, C, H, W) each."""
        now, following = self.levels[step], self.levels[step + 1]
        clean, noise = from_velocity(x.to(velocity), velocity, now)
        sampler = self.sampler if planned else ode
        return sampler(Step(x.to(velocity), clean, noise, now, following, self.levels[1]))

    def noisy(self, state: Tensor, pairs: Sequence[Pair], clean: Tensor) -> Noisy:
        """The states in which steps start; (b, J, K + 1, C, H, W), clean (b, J, C, H, W) -> M versions."""
        states = [(state[:, image, step], self.time(step, clean)) for image, step in pairs]
        return versions(pairs, states, clean)


@dataclass(frozen=True)
class ImageSteps:
    """Images decided by the planned ones of their denoising steps."""

    steps: Steps
    plan: Plan
    kind: ClassVar[Kind] = "step"
    fields: ClassVar[tuple[str, ...]] = ("entropy", "sampler_gap", "drift", "step_std", "dt")
    referring: ClassVar[tuple[str, ...]] = ("kl", "to_reference")

    @property
    def count(self) -> int:
        """K."""
        return self.steps.count

    def planned(self, batch: Batch) -> Tensor:
        """The steps of a rollout that are stochastic; (K,) bool."""
        return self.plan(self.count, batch.iteration, batch.seed)

    def probed(self) -> Tensor:
        """All but the last step, which has no noise; (K,) bool."""
        return torch.arange(self.count) < self.count - 1

    def trained(self, planned: Tensor) -> Tensor:
        """The decisions of an image that are trained; (K,) bool."""
        return planned

    def record(self, batch: Batch, written: "Written") -> dict[str, Tensor]:
        """Every state, and the velocities there."""
        return {"state": written.state, "velocity": written.velocity}

    def clean(self, record: Mapping[str, Tensor]) -> Tensor:
        """The finished images; (b, J, C, H, W)."""
        return record["state"][:, :, -1]

    def noisy(self, record: Mapping[str, Tensor], pairs: Sequence[Pair], clean: Tensor) -> Noisy:
        """The states in which the steps start."""
        return self.steps.noisy(record["state"], pairs, clean)

    def evaluated(self, record: Mapping[str, Tensor], pair: Pair, outputs: "Outputs") -> Evaluation:
        """One step under the distributions of the given velocities; -> (b, 1)."""
        new, image, step = outputs.new, *pair

        def recorded(name: str, at: int) -> Tensor:
            return record[name][:, image, at].to(new)

        x, following, steps = recorded("state", step), recorded("state", step + 1), self.steps
        new_one, old_one, sampled = (
            steps.gaussian(x, one, step) for one in (new, outputs.old, recorded("velocity", step))
        )
        reference = None if outputs.reference is None else steps.gaussian(x, outputs.reference, step)
        part = decisions.Part(following, new_one, old_one, reference, steps.dt(step).to(new.device))
        gap = log_ratio(following, old_one, sampled, steps.reduction).unsqueeze(1)
        found = decisions.evaluate([part], steps.reduction)
        return Evaluation(**{**found.tensors(), "sampler_gap": gap})
