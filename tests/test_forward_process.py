"""Pipelines as policies of the forward process: clean samples noised again, predicted by the pipeline's own call.

Axes: B samples, K draws.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import TINY_PIPELINES
from tiny_pipelines.policy import NAMED, batch_of, policy_of

from mmgrpo.aggregations import seq_mean
from mmgrpo.draws import Draws, noise_seeds, shares, which_set
from mmgrpo.improve import Given, Loss, accumulate, evaluate
from mmgrpo.matching import nft, nft_plain
from mmgrpo.seeds import derive, normal
from mmgrpo.types import KINDS, Batch, Chunk, Evaluation, Prompt
from pipelines.diffusion import load
from pipelines.forward_check import Witness

REFUSED = {  # whose loop begins in the middle of its schedule, remembers earlier steps, or follows no table of levels
    "WanVideoToVideo", "StableDiffusionImg2Img", "StableDiffusionXLImg2Img", "StableDiffusion3Img2Img", "FluxImg2Img",
    "QwenImageImg2Img", "ZImageImg2Img", "FluxInpaint", "StableDiffusion3Inpaint", "QwenImageInpaint", "StableDiffusionXLInpaint",
    "LatentConsistency", "ConsistencyModel", "KandinskyV22Combined", "SkyReelsDiffusionForcing", "SanaSprint",
    "StableCascadeDecoder", "StableCascadeCombined", "HunyuanImage", "LTXCondition", "AnyFlow",
}  # fmt: skip
DRAWS = Draws(count=2, sets=2)
CHOSEN = ("StableDiffusion3", "Flux", "StableDiffusion", "StableDiffusionVPrediction", "Wan")


def evaluations(policy, trajectory) -> list[Chunk]:
    chunks: list[Chunk] = []
    with torch.no_grad():
        policy.replay(trajectory, chunks.append)
    return chunks


def whole(chunks: list[Chunk], name: str, rows: int) -> torch.Tensor:
    found = torch.full((rows, DRAWS.count), torch.nan)
    for chunk in chunks:
        found[chunk.rows.unsqueeze(1), chunk.steps] = chunk.evaluation.tensors()[name].float()
    return found


def test_levels_of_an_iteration_cover_their_range_evenly_and_fall():
    draws = Draws(count=2, low=0.1, high=0.9, sets=4)
    drawn = torch.stack([shares(draws, which, 3, 7) for which in range(4)])  # (sets, K)
    assert (drawn.diff(dim=1) < 0).all()
    assert ((drawn.flatten().sort().values - 0.1) / 0.1).floor().tolist() == list(range(8))
    assert torch.equal(shares(draws, 2, 3, 7), shares(draws, 2, 3, 7))
    assert not torch.equal(shares(draws, 2, 3, 7), shares(draws, 2, 3, 8))


def test_noise_is_shared_by_whom_the_user_says():
    batch = Batch((Prompt(0, "a"),) * 4, torch.tensor([8, 8, 9, 9]), torch.arange(4), seed=1, iteration=0)
    shared, own = Draws(), Draws(share="sample")
    assert len(set(noise_seeds(shared, batch, 0))) == 2 and len(set(noise_seeds(own, batch, 0))) == 4
    assert noise_seeds(shared, batch, 0) != noise_seeds(shared, batch, 1)
    assert noise_seeds(Draws(one_noise=True), batch, 0) == noise_seeds(Draws(one_noise=True), batch, 1)
    assert which_set(Draws(sets=4), batch).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"low": 0.0}, "draws.low and draws.high are 0.0 and 0.98"),
        ({"low": 0.9, "high": 0.1}, "draws.low and draws.high are 0.9 and 0.1"),
        ({"count": 0}, "draws.count is 0; expected at least 1"),
    ],
)
def test_draws_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Draws(**options)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [row for row in TINY_PIPELINES if row.name not in REFUSED], ids=lambda row: row.name)
def test_a_draw_is_what_the_pipelines_own_loop_computes_there_to_the_last_bit(tiny, tmp_path):
    policy, prompts = policy_of(tiny, tmp_path, draws=DRAWS)
    findings = policy.self_test(prompts)
    assert [finding for finding in findings if not finding.ok] == []
    assert {"draws", "loop", "replay", "gradient", "finite difference"} <= {finding.name for finding in findings}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in sorted(REFUSED)])
def test_a_pipeline_that_goes_another_way_is_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ValueError, match="cannot evaluate draws: |policy.draws: .* has no schedule"):
        policy_of(NAMED[name], tmp_path, draws=DRAWS)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_error_is_that_of_the_pretraining_loss_at_the_drawn_level_and_noise(name, tmp_path):
    """The clean sample that an output predicts, x0 = c x + s F, moves off the true one by s (F - target)."""
    policy, prompts = policy_of(NAMED[name], tmp_path, draws=DRAWS)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert (trajectory.kind == KINDS["draw"]).all() and trajectory.mask.all()
    record, process = trajectory.record, policy.process
    for chunk in evaluations(policy, trajectory):
        [draw] = chunk.steps.tolist()
        found: Evaluation = chunk.evaluation
        for place, row in enumerate(chunk.rows.tolist()):
            step = process.levels[int(record["entry"][row, draw])]
            clean = record["clean.0"][row : row + 1].float()
            eps = normal([derive(int(record["noise"][row, draw]), 0)], clean.shape[1:])
            x = step.now.alpha * clean + step.now.sigma * eps
            output, target = found.prediction[place, 0], found.target[place, 0]
            skip, scale = (float(weight) for weight in step.prediction.clean)
            predicted = skip * x.flatten() + scale * output
            assert torch.allclose(predicted - clean.flatten(), scale * (output - target), atol=2e-4)
            true = eps - clean if name in ("StableDiffusion3", "Flux", "Wan") else None
            true = eps if name == "StableDiffusion" else true
            if true is not None:
                assert torch.allclose(target, true.flatten().float(), atol=2e-3 if name == "StableDiffusion" else 1e-4)
            assert float(found.error[place, 0]) == pytest.approx(float((output - target).square().mean()), rel=1e-5)
            assert float(found.clean_scale[place, 0]) == pytest.approx(abs(scale), rel=1e-5)


@pytest.mark.parametrize("name", CHOSEN)
def test_an_anchored_replay_is_exact_and_the_old_errors_stay_when_the_weights_move(name, tmp_path):
    policy, prompts = policy_of(NAMED[name], tmp_path, draws=DRAWS)
    trajectory, _ = policy.rollout(batch_of(prompts))
    parts = [torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5])]
    anchored = policy.anchor(trajectory, parts)
    for part in parts:
        found = evaluate(policy, anchored.take(part))
        assert found.log_ratio.abs().max() == 0 and found.drift.abs().max() == 0
    before = whole(evaluations(policy, anchored.take(parts[1])), "old_error", 4)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.05)
    chunks = evaluations(policy, anchored.take(parts[1]))
    assert torch.equal(whole(chunks, "old_error", 4), before)
    assert (whole(chunks, "error", 4) != before).all() and (whole(chunks, "drift", 4) > 0).all()


@pytest.mark.parametrize("name", ["StableDiffusion3", "Wan"])
def test_rows_at_different_levels_share_a_forward_and_say_the_same_as_apart(name, tmp_path):
    policy, prompts = policy_of(NAMED[name], tmp_path, draws=DRAWS, rows=6)
    process = policy.process
    assert process.mixed
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert len(trajectory.record["entry"].unique(dim=0)) == 2  # two groups, two sets
    together = evaluations(policy, trajectory)
    process.mixed = False
    apart = evaluations(policy, trajectory)
    assert len(together) < len(apart)
    for field in ("error", "clean_scale"):
        assert torch.allclose(whole(together, field, 6), whole(apart, field, 6), rtol=1e-4)


@pytest.mark.parametrize("levels, uneven", [(None, False), (torch.tensor([[0.0, 750.0]]), True)])
def test_tokens_with_levels_of_their_own_are_noticed_and_share_no_forward(levels, uneven):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    witness, state = Witness(), torch.ones(1, 2, 3)
    given = {"timestep": scheduler.timesteps[0], "sample": state, "model_output": state, "per_token_timesteps": levels}
    witness(0, 0, scheduler, given)
    assert witness.uneven == uneven


@pytest.mark.parametrize("objective", [nft, nft_plain])
def test_the_gradient_does_not_depend_on_the_rows_of_a_call(objective, tmp_path):
    policy, prompts = policy_of(NAMED["StableDiffusion3"], tmp_path, draws=DRAWS)
    trajectory, _ = policy.rollout(batch_of(prompts))
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, -2.0, 0.0]).unsqueeze(1).expand(6, DRAWS.count)
    given, slopes = Given(advantages, seq_mean(trajectory.mask)), []
    for rows in (1, 4, 6):
        policy.engine.options = replace(policy.engine.options, replay_rows=rows)
        accumulate(policy, trajectory, given, Loss(partial(objective, bound=2.0)))
        slopes.append(torch.cat([value.grad.flatten() for value in policy.trainable().values()]))
        for value in policy.trainable().values():
            value.grad = None
    for slope in slopes[1:]:
        assert (slope - slopes[0]).norm() < 1e-4 * slopes[0].norm()


def test_a_rollout_is_the_pipelines_own_and_depends_on_no_neighbour(tmp_path):
    policy, prompts = policy_of(NAMED["StableDiffusion3"], tmp_path, draws=DRAWS)
    _, samples = policy.rollout(batch_of(prompts))
    assert torch.allclose(policy.generate(batch_of(prompts)).image, samples.image)
    part = policy.rollout(batch_of(prompts).take(torch.tensor([4, 2])))[1].image
    assert torch.allclose(part, samples.image[[4, 2]], atol=1e-5)


@pytest.mark.parametrize("name", ["StableDiffusion3", "Wan"])
def test_samples_are_drawn_anew_as_a_rollout_draws_them(name, tmp_path):
    policy, prompts = policy_of(NAMED[name], tmp_path, draws=DRAWS)
    batch = batch_of(prompts)
    trajectory, _ = policy.rollout(batch)
    same = policy.redrawn(policy.anchor(trajectory, [torch.arange(6)]), batch)
    assert same.record.keys() == trajectory.record.keys() and torch.equal(same.kind, trajectory.kind)
    assert all(torch.equal(value, trajectory.record[name]) for name, value in same.record.items())
    wanted = [shares(DRAWS, which, batch.seed, batch.iteration) for which in which_set(DRAWS, batch).tolist()]
    levels = policy.process.noise_shares[same.record["entry"]]
    assert (levels - torch.stack(wanted)).abs().max() < 0.01  # a fine schedule's
    later = policy.redrawn(trajectory, replace(batch, iteration=batch.iteration + 1))
    assert torch.equal(later.record["clean.0"], trajectory.record["clean.0"])
    assert (later.record["noise"] != trajectory.record["noise"]).all()
    assert (later.record["entry"] != trajectory.record["entry"]).any()


def test_held_out_samples_may_be_made_by_another_call(tmp_path):
    policy, prompts = policy_of(NAMED["StableDiffusion3"], tmp_path, draws=DRAWS)
    plain = policy.generate(batch_of(prompts)).image
    policy.engine.options = replace(policy.engine.options, evaluation_call={"num_inference_steps": 7})
    other = policy.generate(batch_of(prompts)).image
    assert not torch.allclose(plain, other)
    assert torch.allclose(policy.rollout(batch_of(prompts))[1].image, plain)


def test_a_policy_has_one_process():
    call = {"model": "nowhere", "call": {}}
    with pytest.raises(ValueError, match="expected policy.sampler with policy.plan or policy.routes, or policy.draws"):
        load(**call, draws=DRAWS, plan=lambda *_: torch.ones(1))
