"""Which held-out scores moved since the start of a run, and by how many standard errors: those trained on, and the others.

One score is often gained by losing others; the others are the ones to read. Differences are paired: the same prompts, from
the same noise. Axes: P held-out prompts.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

START, NOW = "held_out_start.json", "held_out_now.json"
SEEN = 3.0  # standard errors from which on a change counts as seen


class Moved(NamedTuple):
    """One held-out score, before and now, over the prompts that have both."""

    name: str
    before: float
    now: float
    errors: float  # mean paired change over its standard error; NaN of fewer than 2 prompts, or without any spread
    prompts: int
    trained: bool  # its weight is not 0

    def said(self) -> str:
        seen = "no change seen" if not abs(self.errors) >= SEEN else "rose" if self.errors > 0 else "fell"
        whose = "trained on" if self.trained else "not trained on"
        change = f"{self.before:.4g} -> {self.now:.4g}, {self.errors:+.1f} standard errors"
        return f"{self.name} ({whose}): {change} over {self.prompts} prompts, {seen}"


def compared(before: Mapping[str, Tensor], now: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[Moved]:
    """Every score of both, those that were not trained on first; scores are (P,), NaN where there is no opinion."""
    found = []
    for name in now.keys() & before.keys():
        both = ~(before[name].isnan() | now[name].isnan())
        old, new = before[name][both].double(), now[name][both].double()
        change, count = new - old, len(old)
        error = float(change.std() / math.sqrt(count)) if count > 1 else math.nan
        errors = float(change.mean()) / error if error else (0.0 if count and not change.any() else math.nan)
        trained = weights.get(name, weights.get(name.partition(".")[0], 0.0)) != 0
        found.append(Moved(name, float(old.mean()), float(new.mean()), errors, count, trained))
    return sorted(found, key=lambda one: (one.trained, one.name))


def keep(folder: Path, scores: Mapping[str, Tensor], name: str = START) -> None:
    """Write the scores of the start, which later ones are compared with, or the newest."""
    plain = {name: [None if math.isnan(value) else value for value in found.tolist()] for name, found in scores.items()}
    (folder / name).write_text(json.dumps(plain) + "\n", encoding="utf-8")


def kept(folder: Path, name: str = START) -> dict[str, Tensor]:
    """The scores of the start, or the newest; none if they were not measured."""
    path = folder / name
    if not path.exists():
        return {}
    plain = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: torch.tensor([math.nan if value is None else value for value in found], dtype=torch.float32)
        for name, found in plain.items()
    }
