"""What an advantage declares beside its arithmetic: facts, the groups that teach it, a memory."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from mmgrpo.advantages import standardized
from mmgrpo.comparing import Comparison, Remembering, needed, teaching, told, with_spread
from mmgrpo.data import requests
from mmgrpo.gathering import first_that_teach, joined_feedback, take_feedback
from mmgrpo.types import Advantage, Feedback, Prompt, Samples, Trajectory


def batch():
    return requests([Prompt(0, "a", columns={"task": "x"}), Prompt(1, "b")], [0, 1], group_size=2, seed=0, iteration=0)


def rollout() -> tuple[Trajectory, Samples]:
    record = {"log_prob": torch.arange(12.0).view(4, 3)}
    mask = torch.ones(4, 3, dtype=torch.bool)
    return Trajectory(batch(), mask, torch.zeros(4, 3, dtype=torch.int64), record), Samples(batch(), text=tuple("wxyz"))


def feedback(*scores: float) -> Feedback:
    return Feedback({"r": torch.tensor(scores)}, {"r": 1.0}, batch().group)


@dataclass
class Knowing:
    """Knows the row number of every decision, and counts how often it is asked."""

    asked: list[str] = field(default_factory=list)

    def facts(self, trajectory: Trajectory, names) -> dict[str, Tensor]:
        self.asked += names
        return {name: torch.arange(4.0).unsqueeze(1).expand(4, 3) for name in names}


def test_facts_come_from_the_record_or_else_from_the_policy_and_only_those_asked_for():
    policy, (trajectory, samples) = Knowing(), rollout()
    compare = Comparison(standardized, needs=("log_prob", "entropy"))
    found = told(compare, policy, feedback(1, 2, 3, 4), trajectory, samples)
    assert policy.asked == ["entropy"] and set(found.facts) == {"log_prob", "entropy"}
    assert torch.equal(found.facts["log_prob"], trajectory.record["log_prob"])
    assert found.prompts[0].columns == {"task": "x"} and found.mask is trajectory.mask
    assert told(standardized, policy, feedback(1, 2, 3, 4), trajectory, samples).facts == {}


def test_a_policy_that_cannot_tell_is_named():
    trajectory, samples = rollout()
    with pytest.raises(ValueError, match="needs 'entropy' of every decision, which a object does not know"):
        told(Comparison(standardized, needs=("entropy",)), object(), feedback(1, 2, 3, 4), trajectory, samples)


def test_groups_teach_if_they_differ_unless_the_advantage_says_otherwise():
    scores = feedback(0, 0, 1, 0)
    assert teaching(standardized, scores).tolist() == [False, False, True, True]
    all_wrong = Comparison(standardized, teaches=lambda heard: with_spread(heard) | (heard.total() == 0))
    assert teaching(all_wrong, scores).tolist() == [True] * 4
    assert first_that_teach(teaching(standardized, scores), scores.group, 1).tolist() == [2, 3]
    assert needed(standardized) == () and needed(all_wrong) == ()


def test_a_memory_goes_from_call_to_call():
    def counted(heard: Feedback, memory) -> tuple[Advantage, dict[str, Tensor]]:
        advantage = standardized(heard)
        return advantage._replace(metrics={"calls": float(memory["calls"])}), {"calls": memory["calls"] + 1}

    compare = Remembering(counted, {"calls": torch.zeros(())})
    assert [compare(feedback(0, 1, 0, 1)).metrics["calls"] for _ in range(3)] == [0, 1, 2]


def test_what_was_told_is_joined_and_taken_by_rows():
    trajectory, samples = rollout()
    part = told(Comparison(standardized, ("log_prob",)), object(), feedback(1, 2, 3, 4), trajectory, samples)
    whole = joined_feedback([part, replace(part, group=part.group + 2)])
    assert len(whole.prompts) == 8 and whole.mask.shape == (8, 3) and whole.facts["log_prob"].shape == (8, 3)
    rows = take_feedback(whole, torch.tensor([5, 0]))
    assert rows.facts["log_prob"][:, 0].tolist() == [3, 0] and [p.text for p in rows.prompts] == ["a", "a"]
