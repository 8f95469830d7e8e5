"""What a rollout predicts behind its steps, against decodings written out by hand, and the rewards that it gets."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines.policy import NAMED, batch_of, policy_of
from torch import Tensor

from mmgrpo.advantages import standardized
from mmgrpo.comparing import told
from mmgrpo.credit import anchored_values
from mmgrpo.draws import Draws
from mmgrpo.improve import evaluate
from mmgrpo.previewing import expect, previewed
from mmgrpo.routes import Route, branched
from mmgrpo.scoring import score
from mmgrpo.transitions import ddim, flow_sde
from mmgrpo.types import Samples
from pipelines import previews
from pipelines.decisions import from_levels
from pipelines.diffusion import DiffusionPolicy
from pipelines.forward_process import ForwardProcess
from pipelines.reverse_process import ReverseProcess
from pipelines.travel import schedule_shares

VGPO = anchored_values(predicted=True)


def plain(pipeline, latents: Tensor) -> Tensor:
    config = pipeline.vae.config
    image = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    return image / 2 + 0.5


def packed(pipeline, latents: Tensor) -> Tensor:
    """Tokens of 2x2 latents, as in Flux, into a square picture of them."""
    size = round(latents.shape[1] ** 0.5)
    tokens = latents.unflatten(1, (size, size)).unflatten(3, (-1, 2, 2))
    return plain(pipeline, tokens.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))


def moving(pipeline, latents: Tensor) -> Tensor:
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return pipeline.vae.decode(latents * std + mean).sample.movedim(1, 2) / 2 + 0.5


DECODED = {"StableDiffusion3": (plain, "image"), "Flux": (packed, "image"), "Wan": (moving, "video")}


def opened(name: str, folder, keep: bool = True):
    policy, prompts = policy_of(NAMED[name], folder, kernel=from_levels(flow_sde if name in DECODED else ddim))
    if keep:
        policy.keep_predictions()
    return policy, prompts


def brightness(samples: Samples) -> Tensor:
    media = samples.image if samples.video is None else samples.video
    return media.flatten(1).mean(1)


@pytest.mark.parametrize("name", DECODED)
def test_a_preview_is_the_decoded_prediction_of_the_step_that_follows(name, tmp_path):
    policy, prompts = opened(name, tmp_path)
    trajectory, samples = policy.rollout(batch_of(prompts))
    shown = list(policy.previews(trajectory))
    assert [preview.step for preview in shown] == [0, 1, 2]
    decode, medium = DECODED[name]
    pipeline, record = policy.engine.pipeline, trajectory.record
    for step in (0, 1):
        level = pipeline.scheduler.sigmas[step + 1]
        clean = record[f"next.{step}.0"] - level * record[f"output.{step + 1}.0"]
        with torch.no_grad():
            expected = decode(pipeline, clean).clamp(0, 1)
        torch.testing.assert_close(getattr(shown[step].samples, medium), expected, rtol=0, atol=1e-5)
    assert (getattr(shown[0].samples, medium) - getattr(samples, medium)).abs().max() > 0.01
    torch.testing.assert_close(getattr(shown[2].samples, medium), getattr(samples, medium), rtol=0, atol=1e-5)
    assert all(preview.samples.batch.sample.equal(samples.batch.sample) for preview in shown)


@pytest.mark.parametrize("name", [*DECODED, "StableDiffusion", "LTX2", "StableAudio", "WanTokenTimestepsImage"])
def test_the_last_states_of_a_run_become_its_own_output(name, tmp_path):
    policy, prompts = opened(name, tmp_path)
    assert previews.measure(policy.engine, prompts).endswith(" 0.0e+00")


def test_other_last_states_would_be_noticed(tmp_path, monkeypatch):
    policy, prompts = opened("StableDiffusion3", tmp_path)
    straight = previews.require_alike
    monkeypatch.setattr(
        previews, "require_alike", lambda *known: {part: x + 0.5 for part, x in straight(*known).items()}
    )
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline cannot show its predictions: the last states"):
        previews.measure(policy.engine, prompts)


@pytest.mark.parametrize("name", ["SkyReelsDiffusionForcing", "StableCascadeCombined"])
def test_a_pipeline_whose_steps_make_other_things_than_its_last_is_refused(name, tmp_path):
    policy, prompts = opened(name, tmp_path)
    with pytest.raises(ValueError, match="cannot show its predictions: step 1 predicts .*; expected .* last states"):
        policy.prepare(prompts)


@pytest.mark.parametrize("name", DECODED)
def test_predictions_are_kept_beside_an_unchanged_record_and_replays_stay_exact(name, tmp_path):
    policy, prompts = opened(name, tmp_path, keep=False)
    without, _ = policy.rollout(batch_of(prompts))
    policy.keep_predictions()
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert {*trajectory.record} - {*without.record} == {"clean.1.0", "clean.2.0", "clean.3.0"}
    assert all(torch.equal(trajectory.record[key], value) for key, value in without.record.items())
    list(policy.previews(trajectory))
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0


def judged(policy, batch, rewards, weights):
    trajectory, samples = policy.rollout(batch)
    feedback = score(rewards, weights, samples)
    trajectory = previewed(VGPO, policy, rewards, weights, trajectory, feedback)
    return trajectory, feedback, trajectory.record["predicted_rewards"]


@pytest.mark.parametrize("name", DECODED)
def test_each_step_has_the_weighted_rewards_of_its_preview_and_the_last_those_of_the_sample(name, tmp_path):
    policy, prompts = opened(name, tmp_path)
    asked = []

    def noted(samples: Samples) -> Tensor:
        asked.append(len(samples))
        return brightness(samples)

    rewards = {"bright": brightness, "dark": lambda samples: 1 - brightness(samples), "watched": noted}
    weights = {"bright": 2.0, "dark": 0.5, "watched": 0.0}
    trajectory, feedback, found = judged(policy, batch_of(prompts), rewards, weights)
    assert torch.equal(found[:, -1], feedback.total()) and asked == [6]
    for step, rows, samples in policy.previews(trajectory):
        bright = brightness(samples)
        torch.testing.assert_close(found[rows, step], 2 * bright + 0.5 * (1 - bright))
    known = told(VGPO, policy, feedback, trajectory, policy.generate(trajectory.batch))
    values = VGPO(known).values
    assert values.shape == trajectory.mask.shape and values.isfinite().all() and values.any()


def test_a_reward_without_an_opinion_of_a_preview_is_nan_there(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path)

    def silent(samples: Samples) -> Tensor:
        return brightness(samples).where(samples.batch.sample % 2 == 0, torch.nan)

    _, _, found = judged(policy, batch_of(prompts), {"r": silent}, {"r": 1.0})
    assert torch.equal(found.isnan(), (torch.arange(6) % 2 == 1).unsqueeze(1).expand(-1, 4))


def routed(policy, prompts, routes) -> DiffusionPolicy:
    policy.process = ReverseProcess(policy.engine, routes=routes)
    policy.process.shares = schedule_shares(policy.engine, prompts[0])
    return policy


def test_a_shorter_route_ends_earlier_and_has_its_samples_reward_there(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path)
    routed(policy, prompts, lambda *_: (Route((0, 1, 3), (0, 1)), Route((0, 1, 2, 3), (0, 1, 2))))
    trajectory, feedback, found = judged(policy, batch_of(prompts, 2), {"r": brightness}, {"r": 1.0})
    short = torch.tensor([True, False] * 2)
    assert torch.equal(found[short, 2], feedback.total()[short]) and found[short, 3].isnan().all()
    assert torch.equal(found[~short, 3], feedback.total()[~short]) and found[:, :3].isfinite().all()
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0


def test_a_shared_trunk_predicts_nothing_before_its_branch(tmp_path):
    policy, prompts = opened("StableDiffusion3", tmp_path)
    policy.engine.options = replace(policy.engine.options, same_noise=True)
    routed(policy, prompts, branched)
    _, feedback, found = judged(policy, batch_of(prompts), {"r": brightness}, {"r": 1.0})
    first = torch.tensor([0, 0, 1] * 2).unsqueeze(
        1
    )  # routes branch at steps 0, 1, 2: the step before is the trunk's last
    assert torch.equal(found.isnan(), torch.arange(4) < first)
    assert torch.equal(found[:, -1], feedback.total())


def test_who_cannot_show_predictions_is_told_so_when_it_is_built(tmp_path):
    policy, _ = opened("StableDiffusion3", tmp_path, keep=False)
    expect(standardized, policy)
    assert not policy.engine.predictions
    expect(VGPO, policy)
    assert policy.engine.predictions
    with pytest.raises(ValueError, match="needs what is predicted behind each step, and the rollouts of policy.draws"):
        expect(VGPO, DiffusionPolicy(ForwardProcess(policy.engine, Draws())))
    with pytest.raises(ValueError, match="needs 'predicted_rewards', and a object predicts no clean samples"):
        expect(VGPO, object())
