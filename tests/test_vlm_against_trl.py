"""A language policy's loss and gradient against those of TRL's trainer, an independent implementation of GRPO."""

from pathlib import Path

import pytest
from benchmarks import random_vlms, two_trainers

ASKED = two_trainers.Asked(new_tokens=7, group_size=4)


@pytest.mark.parametrize("stale", [0.0, 0.3], ids=["on-policy", "stale"])
@pytest.mark.parametrize("build", [random_vlms.seeing, random_vlms.reading], ids=["pictures", "text"])
def test_the_same_samples_give_the_advantages_loss_and_gradient_of_trl(tmp_path: Path, build, stale: float) -> None:
    built = build(random_vlms.SMALLEST)
    prompts = random_vlms.prompts(built, random_vlms.SMALLEST, 60, 2, tmp_path)
    found = two_trainers.agreement(built, prompts, ASKED, stale, tmp_path)
    assert found["advantages"] < 1e-5
    assert found["loss"] < 1e-5
    assert found["loss_itself"] > 1e-3 or stale == 0
    assert found["gradient"] < 1e-4
