"""How a pipeline's samples become decisions: what a policy of any process can do."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mmgrpo.types import Batch, Consumer, Finding, Prompt, Reference, Samples, Trajectory
from pipelines.engine import Engine


class Process(Protocol):
    """The reverse process, whose denoising steps are decisions, or the forward one, whose draws are."""

    engine: Engine

    def settle(self, prompts: Sequence[Prompt]) -> list[str]:
        """Find a way to evaluate the pipeline exactly as it sampled; -> notes; raises ValueError if there is none."""
        ...

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]: ...

    def generate(self, batch: Batch) -> Samples: ...

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory: ...

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None: ...

    def findings(self, prompts: Sequence[Prompt]) -> list[Finding]:
        """What must hold before training."""
        ...
