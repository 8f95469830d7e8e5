"""What an advantage function declares beside its arithmetic: what it asks for, which groups teach it, what it remembers.

A plain function of the feedback needs none of this. Axes: B samples, S decisions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmgrpo.groups import group_std, spread
from mmgrpo.types import Advantage, AdvantageFunction, Feedback, Informative, Policy, Samples, Trajectory

Memory = Mapping[str, Tensor]


def with_spread(feedback: Feedback) -> Tensor:
    """Whether the total rewards of a sample's group differ, (B,) bool: else its advantages are 0."""
    return group_std(feedback.total(), feedback.group) > 0


@dataclass(frozen=True)
class Comparison:
    """An advantage function that asks for more than rewards, or learns from groups without spread."""

    function: AdvantageFunction
    needs: tuple[str, ...] = ()  # names of facts of the decisions
    teaches: Callable[[Feedback], Tensor] = with_spread  # (B,) bool: the sample's group carries signal

    def __call__(self, feedback: Feedback) -> Advantage:
        return self.function(feedback)


@dataclass
class Remembering:
    """An advantage function with a memory that goes on from one iteration to the next and is part of a checkpoint."""

    function: Callable[[Feedback, Memory], tuple[Advantage, Memory]]
    memory: Memory
    needs: tuple[str, ...] = ()
    teaches: Callable[[Feedback], Tensor] = with_spread

    def __call__(self, feedback: Feedback) -> Advantage:
        advantage, self.memory = self.function(feedback, self.memory)
        return advantage


def needed(compare: AdvantageFunction) -> tuple[str, ...]:
    """Names of the facts that an advantage function asks for."""
    return compare.needs if isinstance(compare, Comparison | Remembering) else ()


def teaching(compare: AdvantageFunction, feedback: Feedback) -> Tensor:
    """Whether a sample's group carries signal for an advantage function, (B,) bool."""
    return (compare.teaches if isinstance(compare, Comparison | Remembering) else with_spread)(feedback)


def told(
    compare: AdvantageFunction, policy: Policy, feedback: Feedback, trajectory: Trajectory, samples: Samples
) -> Feedback:
    """The feedback with the prompts, the mask and the facts that an advantage function asks for; raises ValueError."""
    facts = facts_of(policy, trajectory, needed(compare))
    return replace(feedback, prompts=samples.prompts, mask=trajectory.mask, facts=facts)


def facts_of(policy: Policy, trajectory: Trajectory, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Facts of the recorded decisions under the weights that sampled, from the record or else from the policy."""
    found = {name: trajectory.record[name] for name in names if name in trajectory.record}
    missing = [name for name in names if name not in found]
    if missing and not isinstance(policy, Informative):
        raise ValueError(
            f"the advantage needs {missing[0]!r} of every decision, which a {type(policy).__name__} does not know; "
            "expected a policy that does, such as pipelines.vlm:load, or another advantage"
        )
    return found | (dict(policy.facts(trajectory, missing)) if missing and isinstance(policy, Informative) else {})


# what every advantage function begins and ends with


def scores_of(feedback: Feedback) -> Tensor:
    """The weighted sum (B,); raises ValueError naming the reward that is infinite."""
    for name, values in feedback.rewards.items():
        if values.isinf().any():
            raise ValueError(f"reward {name!r} is infinite for {int(values.isinf().sum())} of {len(values)} samples")
    return feedback.total()


def as_scores(values: Tensor, scores: Tensor) -> Tensor:
    return values.to(torch.promote_types(scores.dtype, torch.float32))


def compared(values: Tensor, scores: Tensor, group: Tensor) -> Advantage:
    keep, (none_share, mean_std) = ~values.isnan(), spread(scores, group)
    metrics = {
        "groups_without_spread": none_share,
        "group_std": mean_std,
        "without_opinion": 1 - float(keep.double().mean()),
    }
    return Advantage(torch.where(keep, values, 0), keep, metrics)


def column_of(feedback: Feedback, name: str) -> Tensor:
    """A number of every prompt, (B,) float64; raises ValueError naming the column."""
    found = [prompt.columns.get(name) for prompt in feedback.prompts]
    odd = [value for value in found if isinstance(value, bool) or not isinstance(value, int | float)]
    if odd or not found:
        raise ValueError(
            f"the advantage needs a number in the column {name!r} of every prompt; got {odd[:1] or 'no prompts'}"
        )
    return torch.tensor(found, dtype=torch.float64)


def fact_of(feedback: Feedback, name: str) -> tuple[Tensor, Tensor]:
    """The mask, everything where none was told, and a fact; raises ValueError if it was not told."""
    if name not in feedback.facts:
        raise ValueError(f"the advantage needs the fact {name!r}; got {sorted(feedback.facts)}")
    fact = feedback.facts[name]
    return torch.ones(fact.shape[:2], dtype=torch.bool) if feedback.mask is None else feedback.mask, fact
