"""RiskPO: the lower tail and the middle of the scores of bundles of prompts, instead of a group's mean.

The j-th samples of the prompts of a bundle form a paper; its score is the sum of theirs. Official code of RTkenny/RiskPO (arXiv
2510.00911, number not confirmed). Axes: N papers of a bundle, L tracked levels.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmgrpo.comparing import Memory, Remembering, as_scores, compared, scores_of
from mmgrpo.types import Advantage, Feedback

LEVELS = torch.arange(1, 20, dtype=torch.float64) / 20  # (L,) 0.05 to 0.95
Source = Literal["track", "batch", "mix"]
Credit = Literal["std", "uniform"]
SMALL = 1e-6


class Risk(NamedTuple):
    """What counts as the tail and as the middle."""

    low: float = 0.2  # level below which scores are the tail
    high: float = 0.9  # level from which on they are good enough
    tail_weight: float = 1.5  # of the tail beside the middle's 1
    baseline: bool = True  # the middle is at most 0


def mixed_value_at_risk(papers: Tensor, low: Tensor, high: Tensor, risk: Risk) -> Tensor:
    """(w CVaR + RVaR) / (w + 1) of scores (N,) given the quantiles at `risk.low` and `risk.high`, (); -> (N,), non-decreasing."""
    above_low, above_high = (papers - low).clamp(min=0), (papers - high).clamp(min=0)
    middle = (above_low - above_high + (low - high) * risk.baseline) / (risk.high - risk.low + SMALL)
    tail = -(low - papers).clamp(min=0) / (risk.low + SMALL)
    return (risk.tail_weight * tail + middle) / (risk.tail_weight + 1)


def tracked(quantiles: Tensor, papers: Tensor, rate: float) -> Tensor:
    """One stochastic step of the pinball loss of each level; (L,), (N,) -> (L,)."""
    below = (papers < quantiles[:, None]).double().mean(1)
    return quantiles + rate * (LEVELS - below)


def quantiles_at(levels: tuple[float, float], memory: Memory, papers: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """The two quantiles: of the papers, of the tracker at its nearest levels, or the mean of both."""
    now = papers.quantile(torch.tensor(levels, dtype=torch.float64))
    if source != "batch" and "quantiles" in memory:
        nearest = torch.tensor([int((LEVELS - level).abs().argmin()) for level in levels])
        kept = memory["quantiles"].double()[nearest]
        now = kept if source == "track" else (kept + now) / 2
    return now[0], now[1]


def bundle_risk(
    *,
    size: int = 5,
    low: float = 0.2,
    high: float = 0.9,
    tail_weight: float = 1.5,
    baseline: bool = True,
    source: Source = "track",
    credit: Credit = "std",
    scale: bool = True,
    rate: float = 0.1,
) -> Remembering:
    """RiskPO: `size` prompts, in the order of their groups, are a bundle; quantiles of its papers are tracked over the run.

    With `baseline` every value is at most 0: the lower part is pushed down, nothing up. `scale` divides by the std of the
    bundle's papers, `credit` "std" by that of the prompt's own rewards (1 if at most 1e-3). Samples without a paper have value
    0. Defaults are those of the launch script. train.prompts should be a multiple of `size`. Every group teaches.
    """
    if size < 1 or not 0 < low < high < 1 or tail_weight < 0:
        raise ValueError(
            f"size, low, high, tail_weight are {size}, {low}, {high}, {tail_weight}; expected 0 < low < high < 1"
        )
    risk = Risk(low, high, tail_weight, baseline)

    def function(feedback: Feedback, memory: Memory) -> tuple[Advantage, Memory]:
        scores, group = scores_of(feedback).double(), feedback.group
        values, seen = torch.where(scores.isnan(), scores, 0), []
        for bundle in group.unique().split(size):
            rows = [((group == number) & ~scores.isnan()).nonzero().flatten() for number in bundle]
            count = min(len(part) for part in rows)
            if not count:
                continue
            papers = torch.stack([scores[part[:count]] for part in rows]).sum(0)  # (N,)
            seen.append(papers)
            paper = mixed_value_at_risk(papers, *quantiles_at((low, high), memory, papers, source), risk)
            paper = paper / (spread_of(papers) + SMALL) if scale else paper
            for part in rows:
                values[part[:count]] = paper / (spread_of(scores[part], 1e-3) + SMALL) if credit == "std" else paper
        return compared(as_scores(values, scores_of(feedback)), scores, group), remembered(memory, seen, rate)

    return Remembering(function, {}, teaches=lambda feedback: ~feedback.total().isnan())


def remembered(memory: Memory, seen: list[Tensor], rate: float) -> Memory:
    """The tracker after the papers of a batch; the first ones set it."""
    if not seen:
        return memory
    papers = torch.cat(seen)
    if "quantiles" not in memory:
        return {"quantiles": papers.quantile(LEVELS)}
    return {"quantiles": tracked(memory["quantiles"].double(), papers, rate)}


def spread_of(values: Tensor, least: float = 0.0) -> Tensor:
    """Standard deviation (ddof 1), 1 if it is at most `least` or there is a single value; ()."""
    std = values.std(correction=1) if len(values) > 1 else torch.zeros(())
    return std if std > least else torch.ones((), dtype=torch.float64)
