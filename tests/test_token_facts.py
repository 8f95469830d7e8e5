"""What a language policy knows of its tokens, against the model's own logits."""

import pytest
import torch
from tiny_vlms import NAMED
from tiny_vlms.policy import batch_of, policy_of, prompts_of
from torch import Tensor

from mmgrpo.entropy_clip import discriminator, expected_discriminator
from mmgrpo.types import Trajectory
from pipelines.answers import Options
from pipelines.sampling import Sampling
from pipelines.token_facts import prefixes
from pipelines.vlm import LanguagePolicy

NAME = "Qwen3ForCausalLM"
TOLD = ("entropy", "log_prob at 1", "log_prob at 1.2", "expected_discriminator", "hidden", "residual")


@pytest.fixture(scope="module", params=[1.0, 0.7], ids=["temperature 1", "temperature 0.7"])
def known(request, tmp_path_factory) -> tuple[LanguagePolicy, Trajectory]:
    prompts = prompts_of(NAMED[NAME], tmp_path_factory.mktemp("none"))[:2]
    policy = policy_of(NAME, sampling=Sampling(6, temperature=request.param), options=Options(replay_tokens=64))
    policy.prepare(prompts)
    return policy, policy.rollout(batch_of(prompts))[0]


def logits(policy: LanguagePolicy, trajectory: Trajectory, row: int) -> Tensor:
    """Of the tokens of one answer, by the library on the whole sequence; (T, V)."""
    read = policy.answers.reader.read(trajectory.batch.prompts[row]).inputs
    token = trajectory.record["token"][row, : int(trajectory.record["length"][row])]
    ids = torch.cat([read["input_ids"], token[None]], dim=1)
    with torch.no_grad():
        found = policy.model(input_ids=ids, use_cache=False).logits[0, -len(token) - 1 : -1]
    return found.index_fill(1, policy.answers.never, -torch.inf) / policy.answers.sampling.temperature


def test_every_fact_is_that_of_the_models_own_logits(known):
    policy, trajectory = known
    facts = policy.facts(trajectory, TOLD)
    occurring = trajectory.record["token"].unique()
    for row in range(len(trajectory)):
        z, length = logits(policy, trajectory, row), int(trajectory.record["length"][row])
        token, share = trajectory.record["token"][row, :length], z.softmax(1)

        def close(name: str, expected: Tensor, row: int = row, length: int = length) -> None:
            torch.testing.assert_close(facts[name][row, :length], expected.float(), rtol=1e-4, atol=1e-5)
            assert not facts[name][row, length:].any()

        close("entropy", torch.distributions.Categorical(share).entropy())
        close("log_prob at 1", z.log_softmax(1).gather(1, token[:, None])[:, 0])
        close("log_prob at 1.2", (z / 1.2).log_softmax(1).gather(1, token[:, None])[:, 0])
        close("expected_discriminator", expected_discriminator(share))
        close("residual", torch.eye(z.shape[1])[token][:, occurring] - share[:, occurring])
        head = policy.model.get_output_embeddings().weight
        torch.testing.assert_close(
            (facts["hidden"][row, :length] @ head.T / policy.answers.sampling.temperature).softmax(1),
            share,
            rtol=1e-3,
            atol=1e-5,
        )
    assert facts["hidden"].shape[:2] == trajectory.mask.shape


def test_the_recorded_log_prob_and_the_entropy_make_the_discriminator(known):
    policy, trajectory = known
    facts = policy.facts(trajectory, ("entropy", "log_prob at 1"))
    torch.testing.assert_close(trajectory.record["log_prob"], facts["log_prob at 1"], rtol=1e-3, atol=1e-4)
    assert discriminator(facts["log_prob at 1"], facts["entropy"]).isfinite().all()


def test_equal_beginnings_of_a_group_are_equal_states_and_no_others(known):
    policy, trajectory = known
    token = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 3], [1, 2, 3], [2, 1, 1], [1, 2, 3]])
    record = {**trajectory.record, "token": token}
    small = Trajectory(trajectory.batch, trajectory.mask[:, :3], trajectory.kind[:, :3], record)
    states, edges = prefixes(small)
    for keys, further in ((states, 0), (edges, 1)):
        for i in range(6):
            for j in range(6):
                for s in range(3):
                    for t in range(3):
                        same = s == t and trajectory.group[i] == trajectory.group[j]
                        same = bool(same and torch.equal(token[i, : s + further], token[j, : t + further]))
                        assert bool(keys[i, s] == keys[j, t]) == same
    assert set(policy.facts(small, ("state",))) == {"state"}


def test_an_unknown_fact_is_told_what_there_is(known):
    policy, trajectory = known
    with pytest.raises(ValueError, match="needs 'present' of every decision; a language policy knows entropy, hidden"):
        policy.facts(trajectory, ("present",))
