"""What a hybrid policy must show before it is trained, on a few of the run's prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmgrpo.types import Finding, Prompt

if TYPE_CHECKING:
    from pipelines.interleaved_hybrid import HybridPolicy


def findings(policy: "HybridPolicy", prompts: Sequence[Prompt]) -> list[Finding]:
    return []
