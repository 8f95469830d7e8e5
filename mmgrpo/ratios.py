"""What objectives read of an evaluation: its trained decisions, and the log-ratio at the level that they trust.

A level is (evaluation) -> (B, S) log-ratio in nats, with gradient. Axes: B samples, S decisions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmgrpo.facts import Facts
from mmgrpo.types import Evaluation, same_shape

Level = Callable[[Evaluation], Tensor]
SMALLEST = math.log(1e-8)  # the least log-ratio to a sampler that counts


def decision(evaluation: Evaluation) -> Tensor:
    """Each decision's own log-ratio."""
    return evaluation.log_ratio


def sample_mean(evaluation: Evaluation) -> Tensor:
    """The mean log-ratio of a sample's trained decisions, at each of its decisions (GSPO, arXiv 2507.18071, eq. 7)."""
    return sample_sum(evaluation) / trained(evaluation).sum(1, keepdim=True).clamp(min=1)


def sample_mean_token(evaluation: Evaluation) -> Tensor:
    """The value of `sample_mean`, the gradient through each decision's own log-prob (GSPO-token, arXiv 2507.18071, eq. 14)."""
    own = evaluation.log_ratio
    return sample_mean(evaluation).detach() + own - own.detach()


def sample_sum(evaluation: Evaluation) -> Tensor:
    """The log-ratio of the sample as a whole, the sum over its trained decisions, at each of its decisions."""
    there = trained(evaluation)
    return torch.where(there, evaluation.log_ratio, 0).sum(1, keepdim=True).expand_as(there)


def sample_mean_from_sampler(evaluation: Evaluation) -> Tensor:
    """`sample_mean` against what the sampler itself computed, not against the replay of its weights."""
    return sample_mean(from_sampler(evaluation))


def sample_sum_from_sampler(evaluation: Evaluation) -> Tensor:
    """`sample_sum` against what the sampler itself computed, each decision's gap limited to [log 1e-8, 20]."""
    gap = required(evaluation, "sampler_gap").clamp(SMALLEST, 20)
    return sample_sum(from_sampler(replace(evaluation, sampler_gap=gap)))


def from_sampler(evaluation: Evaluation) -> Evaluation:
    """The evaluation with log new - log sampler in the place of log new - log old."""
    return replace(evaluation, log_ratio=evaluation.log_ratio + required(evaluation, "sampler_gap"))


FACTS: Mapping[Callable[..., Tensor], Facts] = {
    sample_mean: Facts(couples="sample"),
    sample_mean_token: Facts(couples="sample"),
    sample_sum: Facts(couples="sample"),
    sample_mean_from_sampler: Facts(("sampler_gap",), "sample"),
    sample_sum_from_sampler: Facts(("sampler_gap",), "sample"),
}


TOKENS = "a policy of tokens, such as pipelines.vlm:load"
STEPS = "a policy of denoising steps, such as pipelines.diffusion:load"
DRAWS = "a policy with policy.draws, such as pipelines.diffusion:load"
KNOWN = {  # who has a field
    **dict.fromkeys(("entropy", "log_prob", "sampler_gap"), TOKENS),
    **dict.fromkeys(("drift", "step_std", "dt"), STEPS),
    **dict.fromkeys(("error", "old_error", "clean_scale", "prediction", "old_prediction", "target"), DRAWS),
    "reference_error": f"{DRAWS}, and reference.kind to say which",
    "to_reference": "reference.kind to say which",
}


def masked(evaluation: Evaluation, mask: Tensor) -> Evaluation:
    """The evaluation with 0 in the decisions that are not trained, without gradient to them; mask (B, S) bool."""
    values = {name: value for name, value in evaluation.tensors().items() if name != "mask"}
    same_shape(mask=mask, **{name: value[..., 0] if value.dim() == 3 else value for name, value in values.items()})
    kept = {
        name: torch.where(mask[..., None] if value.dim() == 3 else mask, value, 0) for name, value in values.items()
    }
    return Evaluation(**kept, mask=mask)


def trained(evaluation: Evaluation) -> Tensor:
    """(B, S) bool; everything where no mask was set."""
    return torch.ones_like(evaluation.log_ratio, dtype=torch.bool) if evaluation.mask is None else evaluation.mask


def required(evaluation: Evaluation, name: str) -> Tensor:
    """A field of the evaluation; raises ValueError if the policy does not compute it."""
    found = evaluation.tensors()
    if name not in found:
        told = f"the objective needs {name!r} of every decision; the policy evaluates {sorted(found)}"
        raise ValueError(f"{told}; expected {KNOWN[name]}" if name in KNOWN else told)
    return found[name]


def of_samples(evaluation: Evaluation, name: str) -> Tensor:
    """A field that is the same at all trained decisions of a sample, (B,); of a sample without any it means nothing."""
    first = trained(evaluation).int().argmax(1, keepdim=True)
    return required(evaluation, name).gather(1, first).squeeze(1)
