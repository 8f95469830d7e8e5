"""Routes of samples through a pipeline's schedule: branches, merged steps, fast tails, and the trunk that a group shares.

Axes: B samples, S steps of the schedule.
"""

from functools import partial

import pytest
import torch
from tiny_pipelines.policy import NAMED, batch_of, policy_of

from mmgrpo.improve import evaluate
from mmgrpo.routes import Route, branched, flash, merged
from mmgrpo.schedules import listed
from mmgrpo.transitions import flow_sde
from pipelines.decisions import from_levels
from pipelines.reverse_process import ReverseProcess

SDE = from_levels(flow_sde)


def opened(name, folder, routes=None, same_noise=True, steps=None):
    policy, prompts = policy_of(NAMED[name], folder, kernel=SDE, rows=6)
    engine = policy.engine
    options = {"same_noise": same_noise}
    if steps is not None:
        options["call"] = {**engine.options.call, "num_inference_steps": steps}
    engine.options = type(engine.options)(**{**vars(engine.options), **options})
    engine.measure(prompts[0])
    policy.process = ReverseProcess(engine, routes=routes)
    policy.process.settle(prompts)
    return policy, prompts


def fixed(*routes):
    return lambda sigma, iteration, seed: routes


class Counted:
    """Rows that went through a transformer's last layer: a call that is answered for does not reach it."""

    def __init__(self, transformer):
        self.rows = 0
        transformer.proj_out.register_forward_pre_hook(self.note)

    def note(self, layer, inputs):
        self.rows += len(inputs[0])


@pytest.mark.parametrize("name", ["StableDiffusion3", "Flux", "Wan"])
def test_branches_leave_one_trunk_each_at_its_own_step_and_replay_exactly(name, tmp_path):
    policy, prompts = opened(name, tmp_path, partial(branched, plan=partial(listed, indices=(0, 1, 2))), steps=4)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert (
        trajectory.mask.tolist()
        == [[True, False, False, False], [False, True, False, False], [False, False, True, False]] * 2
    )
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
    assert evaluate(policy, trajectory.take(torch.tensor([5, 0, 1]))).log_ratio.abs().max() == 0
    states = trajectory.record[
        "next.0.0"
    ]  # behind the first step: deterministic for the second branch, not for the first
    plain, _ = opened(name, tmp_path, fixed(Route((0, 1, 2, 3), (1,))), steps=4)
    trunk = plain.rollout(batch_of(prompts))[0].record["next.0.0"]
    assert torch.allclose(states[1].float(), trunk[1].float(), atol=1e-5)
    assert not torch.allclose(states[0].float(), trunk[0].float(), atol=1e-2)


def test_a_trunk_is_computed_once_for_a_group_and_changes_nothing(tmp_path):
    window = fixed(Route((0, 1, 2, 3), (2,)))
    policy, prompts = opened("StableDiffusion3", tmp_path, window, steps=4)
    policy.rollout(batch_of(prompts))  # learns what the stubs of this call answer
    count = Counted(policy.engine.pipeline.transformer)
    trajectory, samples = policy.rollout(batch_of(prompts))
    assert count.rows == 2 * 2 + 2 * 6  # two steps of two groups, then two steps of six samples
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
    stub, policy.engine.stub.kind = policy.engine.stub.kind, "real"  # without the trunk
    count.rows = 0
    whole, others = policy.rollout(batch_of(prompts))
    policy.engine.stub.kind = stub
    assert count.rows == 4 * 6
    assert torch.allclose(samples.image, others.image, atol=1e-4)
    for name in ("next.1.0", "output.2.0"):
        assert torch.allclose(trajectory.record[name], whole.record[name], atol=1e-4)


def test_samples_that_start_from_noises_of_their_own_share_no_trunk(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path, fixed(Route((0, 1, 2, 3), (2,))), same_noise=False, steps=4)
    count = Counted(policy.engine.pipeline.transformer)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert count.rows == 4 * 6
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0


@pytest.mark.parametrize("name", ["StableDiffusion3", "Wan"])
def test_a_merged_step_is_as_long_as_the_steps_that_it_stands_for(name, tmp_path):
    """Its width is that of one Flow-SDE step to the level behind the merged ones, S = g sqrt(t - t')."""
    policy, prompts = opened(name, tmp_path, fixed(Route((0, 1, 4, 5), (1,))), steps=6)
    policy.rollout(batch_of(prompts))
    count = Counted(policy.engine.pipeline.transformer)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert count.rows == 2 * 1 + 6 * 3
    found, sigma = evaluate(policy, trajectory), policy.process.shares
    t, later = sigma[1], sigma[4]
    expected = 0.7 * (t / (1 - t)).sqrt() * (t - later).sqrt()
    assert found.step_std[:, 1].double().numpy() == pytest.approx(float(expected), rel=1e-4)
    assert found.dt[:, 1].double().numpy() == pytest.approx(float(t - later), rel=1e-4)
    assert found.log_ratio.abs().max() == 0


def test_routes_of_e_grpo_through_a_pipelines_own_schedule(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path, partial(merged, share=0.4), steps=8)
    routes = policy.process.routes(policy.process.shares, 0, 0)
    assert len(routes) == 3
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
    assert trajectory.mask.sum(1).tolist() == [1] * 6


def test_a_fast_tail_is_of_first_order_where_it_begins_and_where_it_ends_and_of_second_between(tmp_path):
    def ended(taken, fast_from=None):
        policy, prompts = opened("StableDiffusion3", tmp_path, fixed(Route(taken, (), fast_from)), steps=8)
        return policy.rollout(batch_of(prompts, 1))[1].image

    assert torch.equal(ended((0, 4), 0), ended((0, 4)))
    assert not torch.allclose(ended((0, 2, 4, 6), 0), ended((0, 2, 4, 6)), atol=1e-4)
    assert torch.equal(ended((0, 2, 4, 6), 3), ended((0, 2, 4, 6)))  # the last step alone


def test_a_flash_route_replays_exactly(tmp_path):
    policy, prompts = opened(
        "StableDiffusion3", tmp_path, partial(flash, plan=partial(listed, indices=(1, 2))), steps=8
    )
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert trajectory.mask.any(0).nonzero().flatten().tolist() == [1, 2]
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0


def test_a_group_that_does_not_divide_among_the_routes_is_refused(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path, branched, steps=5)
    with pytest.raises(ValueError, match="a group has 3 samples for 4 routes; expected a multiple in train.group_size"):
        policy.rollout(batch_of(prompts))
