"""A guide moves what is sampled and nothing else: replays stay exact, scores are those of the states before the steps."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines.policy import NAMED, batch_of, policy_of

from mmgrpo.comparing import facts_of
from mmgrpo.improve import evaluate
from mmgrpo.steering import Strength
from mmgrpo.transitions import dance_sde, ddim, flow_sde
from pipelines.decisions import from_levels
from pipelines.guides import Steering, by_differences, by_gradient
from pipelines.selftest import findings


def towards_one(state, level, prompts):
    """A value whose gradient is (1 - x) / (number of elements)."""
    return -(state - 1).square().flatten(1).mean(1) / 2


SAMPLERS = {"StableDiffusion3": flow_sde, "Flux": dance_sde, "StableDiffusion": ddim, "Wan": flow_sde}
STRONG = Strength(beta=1e-3)


def opened(name, folder, guide=None, **options):
    policy, prompts = policy_of(NAMED[name], folder, kernel=from_levels(SAMPLERS.get(name, ddim)), **options)
    policy.engine.options = replace(policy.engine.options, guide=guide)
    return policy, prompts


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_guided_rollout_goes_where_the_guide_points_and_is_replayed_exactly(name, tmp_path):
    plain, prompts = opened(name, tmp_path)
    guided, _ = opened(name, tmp_path, Steering(by_gradient(towards_one), STRONG))
    trajectory, samples = guided.rollout(batch_of(prompts))
    without, others = plain.rollout(batch_of(prompts))
    assert evaluate(guided, trajectory).log_ratio.abs().max() == 0
    assert torch.equal(trajectory.record["output.0.0"], without.record["output.0.0"])
    ahead = [towards_one(one.record["next.1.0"].float(), None, None) for one in (trajectory, without)]
    assert (ahead[0] > ahead[1]).all()
    assert {*trajectory.record} - {*without.record} == {"process_scores", "guide_shift"}


def test_a_score_is_that_of_the_state_before_its_step(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path, Steering(by_gradient(towards_one), STRONG, first=1))
    trajectory, _ = policy.rollout(batch_of(prompts))
    scores = facts_of(policy, trajectory, ["process_scores"])["process_scores"]
    assert scores.shape == trajectory.mask.shape
    guided = trajectory.mask.clone()
    guided[:, 0] = False
    assert torch.equal(~scores.isnan(), guided)
    assert torch.allclose(scores[:, 1], towards_one(trajectory.record["next.0.0"], None, None))
    assert torch.equal(~trajectory.record["guide_shift"].isnan(), guided)


def test_steps_before_the_window_and_samples_without_noise_are_those_of_no_guide(tmp_path):
    plain, prompts = opened("StableDiffusion3", tmp_path)
    guided, _ = opened("StableDiffusion3", tmp_path, Steering(by_gradient(towards_one), STRONG, first=1))
    batch = batch_of(prompts)
    assert torch.equal(guided.generate(batch).image, plain.generate(batch).image)
    one, other = guided.rollout(batch)[0], plain.rollout(batch)[0]
    assert torch.equal(one.record["next.0.0"], other.record["next.0.0"])
    assert not torch.equal(one.record["next.1.0"], other.record["next.1.0"])


@pytest.mark.parametrize("beta", [float("inf"), 1e-3])
def test_a_guide_without_force_or_without_a_direction_changes_no_bit(beta, tmp_path):
    def flat(state, level, prompts):
        return (0 * state).flatten(1).sum(1) + level

    value = flat if beta < 1 else towards_one
    plain, prompts = opened("StableDiffusion3", tmp_path)
    guided, _ = opened("StableDiffusion3", tmp_path, Steering(by_gradient(value), Strength(beta=beta)))
    one, other = guided.rollout(batch_of(prompts))[0], plain.rollout(batch_of(prompts))[0]
    for name, recorded in other.record.items():
        assert torch.equal(recorded, one.record[name]), name


@pytest.mark.parametrize("guide", [by_gradient(towards_one), by_differences(towards_one, 2, 1.0)])
def test_a_sample_is_guided_by_its_own_state_and_prompt_whatever_is_beside_it(guide, tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path, Steering(guide, STRONG))
    batch = batch_of(prompts)
    whole = policy.rollout(batch)[1].image
    part = policy.rollout(batch.take(torch.tensor([4, 2])))[1].image
    assert torch.allclose(part, whole[[4, 2]], atol=1e-5)


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "StableVideoDiffusion", "WanTokenTimesteps"])
def test_what_a_guide_is_shown_lies_between_data_and_noise(name, tmp_path):
    shown = []

    def guide(seen):
        shown.append(seen)
        return seen.level * 0, torch.zeros_like(seen.state)

    policy, prompts = opened(name, tmp_path, Steering(guide, STRONG))
    policy.rollout(batch_of(prompts))
    for seen in shown:
        assert seen.level.shape == (3,) and len(seen.prompts) == len(seen.seeds) == 3
        assert 0 < float(seen.level[0]) <= 1
        assert seen.state.shape == seen.clean.shape and seen.state.dtype == seen.clean.dtype == torch.float32
        assert float(seen.state.abs().amax()) < 10


def test_the_check_tells_how_far_steps_are_moved(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path, Steering(by_gradient(towards_one), STRONG, first=1))
    found = {finding.name: finding for finding in findings(policy.engine, prompts)}
    assert all(finding.ok for finding in found.values())
    assert "moves steps [1" in found["guide"].detail


@pytest.mark.parametrize(
    "first, last, message",
    [(50, None, "first is 50 and last is"), (2, 1, "first is 2 and last is 1; expected 0 <= first <= last < ")],
)
def test_a_window_outside_of_the_run_is_refused(first, last, message):
    with pytest.raises(ValueError, match=message):
        Steering(by_gradient(towards_one), STRONG, first, last).require_usable(5, {})


def test_decisions_of_several_steps_are_refused():
    with pytest.raises(ValueError, match="policy.guide: decision 1 has 2 steps; expected 1"):
        Steering(by_gradient(towards_one), STRONG).require_usable(5, {0: 1, 1: 2})
