"""The images of answers as decisions of the forward process: sampled without noise, then noised again at any times of the flow's path.

A draw is predicted as a denoising step is: behind the answer, from what came before its image. The images of an answer share its
times; each has noise of its own. Axes: B samples, b rows, J images at most, K draws of each, M draws of a call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mmgrpo.draws import Draws, all_noise_seeds, all_shares
from mmgrpo.matching import OUTPUTS
from mmgrpo.seeds import derive
from mmgrpo.types import Batch, Evaluation, Kind
from pipelines import flow_draws
from pipelines.hybrid_layout import Pair
from pipelines.hybrid_reading import Noisy, versions
from pipelines.matching import shared_noise

if TYPE_CHECKING:
    from pipelines.hybrid_evaluation import Outputs
    from pipelines.hybrid_writing import Written


@dataclass(frozen=True)
class ImageDraws:
    """Images decided by draws of them."""

    steps: int  # of a rollout, none of them stochastic
    draws: Draws
    kind: ClassVar[Kind] = "draw"
    fields: ClassVar[tuple[str, ...]] = (
        "entropy",
        "sampler_gap",
        "drift",
        "error",
        "old_error",
        "clean_scale",
        *OUTPUTS,
    )
    referring: ClassVar[tuple[str, ...]] = ("kl", "to_reference", "reference_error")

    @property
    def count(self) -> int:
        """K."""
        return self.draws.count

    def planned(self, batch: Batch) -> Tensor:
        """No step of a rollout is stochastic; (steps,) bool."""
        return self.probed()

    def probed(self) -> Tensor:
        """No step is; (steps,) bool."""
        return torch.zeros(self.steps, dtype=torch.bool)

    def trained(self, planned: Tensor) -> Tensor:
        """Every draw of an image; (K,) bool."""
        return torch.ones(self.count, dtype=torch.bool)

    def record(self, batch: Batch, written: "Written") -> dict[str, Tensor]:
        """The finished images, the times of their draws (B, K) and the seeds of the noises (B, K)."""
        times, noises = all_shares(self.draws, batch), all_noise_seeds(self.draws, batch)
        return {"clean": written.answers.clean.clone(), "time": times, "noise": noises}

    def clean(self, record: Mapping[str, Tensor]) -> Tensor:
        """The finished images; (b, J, C, H, W)."""
        return record["clean"]

    def noisy(self, record: Mapping[str, Tensor], pairs: Sequence[Pair], clean: Tensor) -> Noisy:
        """(1 - t) image + t noise; clean (b, J, C, H, W) -> M versions."""
        states = []
        for image, draw in pairs:
            t = record["time"][:, draw].to(clean.device, torch.float32)
            along = t.to(clean)[:, None, None, None]
            states.append(((1 - along) * clean[:, image] + along * noise_of(record, image, draw).to(clean), t))
        return versions(pairs, states, clean)

    def evaluated(self, record: Mapping[str, Tensor], pair: Pair, outputs: "Outputs") -> Evaluation:
        """One draw under the given velocities, beside noise - image; -> (b, 1), three fields (b, 1, D)."""
        image, draw = pair
        target = noise_of(record, image, draw) - record["clean"][:, image]
        return flow_draws.evaluated(outputs.new, target, record["time"][:, draw], outputs.old, outputs.reference)


def noise_of(record: Mapping[str, Tensor], image: int, draw: int) -> Tensor:
    """The noise of a draw of an image; (b, C, H, W) on the CPU."""
    row_seeds = [derive(seed, image) for seed in record["noise"][:, draw].tolist()]
    return shared_noise(row_seeds, record["clean"].shape[2:])
