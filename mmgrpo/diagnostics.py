"""What is worth watching in an update, computed without gradient. Axes: B samples, S decisions.

A mean over nothing is 0: a rank may hold no trained decision.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmgrpo.groups import spread
from mmgrpo.types import Feedback, same_shape


@torch.no_grad()
def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is True; any equal shapes -> ()."""
    same_shape(values=values, mask=mask)
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def share_below_clip(log_ratio: Tensor, mask: Tensor, low: float) -> Tensor:
    """Share of trained decisions whose ratio is under 1 - low; (B, S), (B, S) bool -> () in [0, 1]."""
    floor = math.log1p(-low) if low < 1 else -math.inf
    return masked_mean((log_ratio < floor).to(log_ratio.dtype), mask)


@torch.no_grad()
def share_above_clip(log_ratio: Tensor, mask: Tensor, high: float) -> Tensor:
    """Share of trained decisions whose ratio is over 1 + high; (B, S), (B, S) bool -> () in [0, 1]."""
    return masked_mean((log_ratio > math.log1p(high)).to(log_ratio.dtype), mask)


@torch.no_grad()
def ratio_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Mean ratio of trained decisions, 1 in expectation; (B, S), (B, S) bool -> ()."""
    return masked_mean(log_ratio.exp(), mask)


@torch.no_grad()
def ratio_std(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation (ddof 0) of the ratio over trained decisions; (B, S), (B, S) bool -> ()."""
    away = torch.expm1(torch.where(mask, log_ratio, 0))  # about 1, so that spreads of 1e-6 keep their digits
    return masked_mean((away - masked_mean(away, mask)).square(), mask).sqrt()


@torch.no_grad()
def absolute_log_ratio_per_step(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Mean |log-ratio| over the trained samples of each step, 0 where none; at the first update it is the replay's error.

    (B, S), (B, S) bool -> (S,) nats.
    """
    same_shape(log_ratio=log_ratio, mask=mask)
    return torch.where(mask, log_ratio.abs(), 0).sum(0) / mask.sum(0).clamp(min=1)


MOST_STEPS = 64  # whose ratios are told apart: denoising steps, not tokens


@torch.no_grad()
def decisions(values: Mapping[str, Tensor], slope: Tensor | None, mask: Tensor) -> dict[str, float]:
    """How far the evaluated decisions moved, and the share on which the objective no longer pulls, by direction.

    `values` are fields of `Evaluation` and `slope` d loss / d log_ratio, (B, S) each, NaN where nothing was evaluated.
    """
    log_ratio = torch.where(mask, values["log_ratio"], 0)
    found = {
        "ratio/mean": ratio_mean(log_ratio, mask),
        "ratio/std": ratio_std(log_ratio, mask),
        "ratio/max_abs_log": log_ratio.abs().max(),
    }
    if mask.shape[1] <= MOST_STEPS:
        for step, value in enumerate(absolute_log_ratio_per_step(log_ratio, mask)):
            if mask[:, step].any():
                found[f"ratio/abs_log_step_{step}"] = value
    for name in ("kl", "to_reference", "drift", "entropy"):
        if name in values:
            found[f"decisions/{name}"] = masked_mean(values[name], mask)
    if "sampler_gap" in values:
        gap = torch.where(mask, values["sampler_gap"], 0)
        found["sampler/mean_abs_gap"], found["sampler/max_abs_gap"] = masked_mean(gap.abs(), mask), gap.abs().max()
        found["sampler/mean_ratio"] = masked_mean(gap.exp(), mask)
    if slope is not None:
        still = mask & (slope == 0)
        found["ratio/clipped_high"] = masked_mean((still & (log_ratio > 0)).float(), mask)
        found["ratio/clipped_low"] = masked_mean((still & (log_ratio < 0)).float(), mask)
    return {name: float(value) for name, value in found.items()}


def lengths(masks: Sequence[Tensor]) -> dict[str, float]:
    """Trained decisions per sample over several rollouts, (B, S) bool each: their mean, least and most."""
    counts = torch.cat([mask.sum(1) for mask in masks]).double()
    return {
        "decisions/mean": float(counts.mean()),
        "decisions/min": float(counts.min()),
        "decisions/max": float(counts.max()),
    }


@torch.no_grad()
def share_without_spread(scores: Tensor, group: Tensor) -> float:
    """Share of groups whose scores are all equal and teach nothing; (B,), (B,) int64 -> [0, 1]."""
    return spread(scores, group).none_share


@torch.no_grad()
def reward_summary(feedback: Feedback) -> dict[str, float]:
    """Of each reward and of the total: mean and std (ddof 0) over opinions, mean std inside groups, shares; flat names."""
    summary = {}
    for name, values in {**feedback.rewards, "total": feedback.total()}.items():
        heard = values[~values.isnan()].double()
        inside = spread(values, feedback.group)
        summary[f"{name}/mean"] = float(heard.mean()) if len(heard) else 0.0
        summary[f"{name}/std"] = float(heard.std(correction=0)) if len(heard) else 0.0
        summary[f"{name}/group_std"] = inside.mean_std
        summary[f"{name}/groups_without_spread"] = inside.none_share
        summary[f"{name}/without_opinion"] = 1 - len(heard) / max(len(values), 1)
    return summary
