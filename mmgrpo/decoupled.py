"""Accuracy and speed, each compared inside its group by itself, then added: LightningRL's advantage for parallel decoding.

Source: arXiv 2603.13319 and the release of its authors, reward/rl_reward.py. As in `mmgrpo/advantages.py` a NaN is no opinion: the
sample enters no statistic, has value 0 and is not kept. Axes: B samples, G samples of a prompt.
"""

from typing import Literal

import torch
from torch import Tensor

from mmgrpo.advantages import standardize
from mmgrpo.groups import group_centred, group_least, group_most, group_std, group_sum, spread
from mmgrpo.types import Advantage, Feedback

Speed = Literal["z_score", "minmax", "none"]
Accuracy = Literal["z_score", "signs"]
Compared = Literal["batch", "group", "group_centred"]
Imitated = Literal["correct", "positive"]


def lightning(
    feedback: Feedback,
    *,
    accuracy: str = "accuracy",
    speed: str = "speed",
    accuracy_form: Accuracy = "z_score",
    speed_form: Speed = "z_score",
    compared: Compared = "batch",
    imitated: Imitated = "correct",
    least_range: float = 0.01,
) -> Advantage:
    """R = w_a z_acc + w_s z_tpf of the rewards that `accuracy` and `speed` name, compared over the batch; -> values (B,).

    z-scores inside the group use the population's std and are 0 without spread (`accuracy_form` "signs": 1 and -1 for right and
    wrong; `speed_form` "minmax": from the slowest, 0, to the fastest, 1, and 0.5 without spread; "none": as it is). A sample is
    correct if its accuracy is above 0. Prompts of which no sample is correct, or whose speeds span less than `least_range`, are
    left out (0: kept whatever their speeds are). The rest is compared as (R - mean) / max(std, 1e-8) over the batch with n - 1, or
    inside the group ("group"; "group_centred" without the std). Imitated, where the loss has an anchor, are correct samples, or with
    "positive" those of R from 0 on, which is what the release falls back to.
    """
    right, pace = (named(feedback, name) for name in (accuracy, speed))
    group, heard = feedback.group, ~(right.isnan() | pace.isnan())
    right, pace = torch.where(heard, right, torch.nan), torch.where(heard, pace, torch.nan)
    score = feedback.weights[accuracy] * _accuracy(right, group, accuracy_form)
    score = score + feedback.weights[speed] * _speed(pace, group, speed_form)
    correct = heard & (right > 0)
    solved = group_sum(correct.double(), group) > 0
    span = group_most(pace, group) - group_least(pace, group)
    varied = span >= least_range
    keep = heard & solved & varied
    values = _compared(torch.where(keep, score, torch.nan), group, compared)
    match imitated:
        case "correct":
            imitate = keep & correct
        case "positive":
            imitate = keep & (score >= 0)
        case _:
            raise ValueError(f"imitated is {imitated!r}; expected 'correct' or 'positive'")
    metrics = {
        "unsolved": 1 - float(solved.double().mean()),
        "equally_fast": 1 - float(varied.double().mean()),
        "groups_without_spread": spread(torch.where(keep, score, torch.nan), group).none_share,
        "kept": float(keep.double().mean()),
    }
    return Advantage(values.nan_to_num(0).float(), keep, metrics, imitate)


def named(feedback: Feedback, name: str) -> Tensor:
    """A reward by its name, (B,) float64; raises ValueError if there is none, or if it is infinite."""
    if name not in feedback.rewards:
        raise ValueError(f"the advantage needs a reward named {name!r}; there are {sorted(feedback.rewards)}")
    values = feedback.rewards[name].double()
    if values.isinf().any():
        raise ValueError(f"reward {name!r} is infinite for {int(values.isinf().sum())} of {len(values)} samples")
    return values


def z_score(values: Tensor, group: Tensor) -> Tensor:
    """(value - mean) / std of its group with the population's std, 0 without spread; (B,), (B,) int64 -> (B,) float64."""
    return standardize(values.double(), group, ddof=0, eps=0)


def _accuracy(right: Tensor, group: Tensor, form: Accuracy) -> Tensor:
    match form:
        case "z_score":
            return z_score(right, group)
        case "signs":
            return torch.where(right.isnan(), torch.nan, torch.where(right > 0, 1.0, -1.0).double())
        case _:
            raise ValueError(f"accuracy_form is {form!r}; expected 'z_score' or 'signs'")


def _speed(pace: Tensor, group: Tensor, form: Speed) -> Tensor:
    match form:
        case "z_score":
            return z_score(pace, group)
        case "minmax":
            least = group_least(pace, group)
            span = group_most(pace, group) - least
            return torch.where(
                span > 0, (pace - least) / torch.where(span > 0, span, 1), torch.where(pace.isnan(), torch.nan, 0.5)
            )
        case "none":
            return pace
        case _:
            raise ValueError(f"speed_form is {form!r}; expected 'z_score', 'minmax' or 'none'")


def _compared(score: Tensor, group: Tensor, how: Compared) -> Tensor:
    match how:
        case "batch":
            every = torch.zeros_like(group)
            return group_centred(score, every) / group_std(score, every, ddof=1).clamp(min=1e-8)
        case "group":
            return group_centred(score, group) / group_std(score, group, ddof=1).clamp(min=1e-8)
        case "group_centred":
            return group_centred(score, group)
        case _:
            raise ValueError(f"compared is {how!r}; expected 'batch', 'group' or 'group_centred'")
