"""Enhanced recordings noised again: their errors are the matching loss, their replays exact, an update moves them the right way."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from sounds import MODELS, RATE, Linear, recordings, saved, tiny
from test_speech import batch_of, evaluations, shaken, whole

from mmgrpo.components import build
from mmgrpo.data import requests
from mmgrpo.draws import Draws
from mmgrpo.gathering import joined_trajectory
from mmgrpo.improve import Given, Loss, accumulate
from mmgrpo.matching import advantage_weighted, nft
from mmgrpo.seeds import normal
from mmgrpo.shadow import Reference
from mmgrpo.transitions import flow_sde
from mmgrpo.types import KINDS, Prompt, Trajectory
from mmgrpo.weighting import by_kind
from pipelines import replays
from pipelines.recordings import Mixing, hear
from pipelines.speech import SpeechPolicy, load
from pipelines.speech_flow import matching_loss
from pipelines.speech_models import Model
from pipelines.speech_steps import Options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sounds")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[Prompt]:
    return recordings(folder)


def policy_of(model: Model, folder: Path, draws: Draws | None = None, **options) -> SpeechPolicy:
    mixing = Mixing(RATE, noise=folder / "noise", snr=(0, 5))
    return SpeechPolicy(model, Options(**{"steps": 4, "sampler": flow_sde, **options}), draws or Draws(), mixing)


@pytest.mark.parametrize("name", MODELS)
def test_the_error_of_a_draw_is_the_matching_loss_at_its_time_and_noise(name, prompts, folder) -> None:
    policy = policy_of(tiny(name), folder, Draws(count=3))
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    heard = hear(trajectory.batch, policy.mixing)
    record = {**trajectory.record, "clean": torch.zeros_like(trajectory.record["clean"])}
    for row, length in enumerate(heard.length.tolist()):  # of the clean recordings themselves, which the loss encodes
        sounds = heard.clean[[row], :length], heard.noisy[[row], :length]
        latent = policy.model.representation.encode(*sounds)[0]
        record["clean"][row, ..., : latent.shape[-1]] = latent
    found = evaluations(policy, replace(trajectory, record=record))
    for row, length in enumerate(heard.length.tolist()):
        for draw in range(3):
            t = record["time"][row, [draw]].float()
            eps = normal([int(record["noise"][row, draw])], policy.steps.latent(length))
            expected = matching_loss(policy.model, heard.clean[[row], :length], heard.noisy[[row], :length], t, eps)
            assert found["error"][row, draw] == pytest.approx(float(expected.detach()), rel=1e-4)
            assert found["clean_scale"][row, draw] == t


def test_with_a_linear_network_every_field_is_that_by_hand(prompts, folder) -> None:
    model = Model(Linear(), MODELS["band gains"][0])
    model.network.double()
    policy = policy_of(model, folder)
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    trajectory = policy.anchor(trajectory, whole(trajectory))
    reference = Reference("frozen", policy.trainable())
    old = model.network.weight.detach().clone()
    with torch.no_grad():
        model.network.weight += torch.tensor([0.05, -0.1, 0.07])
    found = evaluations(policy, trajectory, reference)
    assert found.keys() == {"log_ratio", "kl", "drift", "error", "old_error", "reference_error", "clean_scale"}
    for row, length in enumerate(trajectory.record["length"].tolist()):
        given = policy.steps.given(trajectory.record["noisy"][[row], :length])
        clean = trajectory.record["clean"][[row], ..., : given.centre.shape[-1]]
        for draw, time in enumerate(trajectory.record["time"][row].tolist()):
            noise = normal([int(trajectory.record["noise"][row, draw])], clean.shape[1:])
            x1 = given.centre + noise
            x = (1 - time) * clean + time * x1

            def velocity(weight, x=x, time=time, given=given):
                return weight[0] * x + weight[1] * time + weight[2] * given.condition.mean(1, keepdim=True)

            new, before = velocity(model.network.weight.detach()), velocity(old)
            errors = [float((value - (x1 - clean)).square().mean()) for value in (new, before)]
            moved = float((new - before).square().mean())
            expected = {
                "error": errors[0], "old_error": errors[1], "reference_error": errors[1],
                "log_ratio": errors[1] - errors[0], "drift": moved, "kl": moved, "clean_scale": time,
            }  # fmt: skip
            for name, value in expected.items():
                assert float(found[name][row, draw]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("share", ["group", "sample"])
def test_a_rollout_is_the_deterministic_sampler_and_records_its_ends_times_and_noises(share, prompts, folder) -> None:
    draws = Draws(count=3, share=share, sets=2)
    policy = policy_of(tiny("band gains"), folder, draws)
    policy.prepare(prompts)
    batch = batch_of(prompts, size=2)
    trajectory, samples = policy.rollout(batch)
    assert torch.equal(samples.audio, policy.generate(batch).audio)
    assert trajectory.mask.all() and (trajectory.kind == KINDS["draw"]).all() and trajectory.mask.shape == (8, 3)
    assert trajectory.record.keys() == {"length", "noisy", "clean", "time", "noise"}
    time, noise = (trajectory.record[name].unflatten(0, (4, 2)) for name in ("time", "noise"))
    assert torch.equal(time[:, 0], time[:, 1]) and len(time[:, 0].unique(dim=0)) == 2
    assert time.min() >= draws.low and time.max() <= draws.high
    assert torch.equal(noise[:, 0], noise[:, 1]) == (share == "group")
    for row, length in enumerate(samples.audio_length.tolist()):
        given = policy.steps.given(trajectory.record["noisy"][[row], :length])
        end = trajectory.record["clean"][[row], ..., : given.centre.shape[-1]]
        torch.testing.assert_close(policy.steps.decode(end, given)[0], samples.audio[row, 0, :length])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_after_an_anchor_log_ratios_are_exactly_0_until_the_weights_move(autocast, prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder, rollout_rows=3, replay_rows=2, autocast=autocast)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    assert evaluations(policy, trajectory)["log_ratio"].abs().max() == 0
    parts = [torch.tensor([5, 3, 1, 4, 7]), torch.tensor([0, 2])]
    anchored = policy.anchor(trajectory, parts)
    for part in parts:
        found = evaluations(policy, anchored.take(part))
        assert found["log_ratio"].abs().max() == 0 and found["drift"].abs().max() == 0
    shaken(policy, 1e-2)
    assert (evaluations(policy, anchored.take(parts[0]))["log_ratio"].abs() > 0).all()


def test_what_is_padded_counts_nowhere_and_rollouts_of_any_lengths_can_be_joined(prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder)
    policy.prepare(prompts)
    parts = [
        policy.rollout(requests(prompts, [row], group_size=2, seed=4, iteration=0, first_group=row))[0]
        for row in (3, 1)
    ]
    joined = joined_trajectory(parts)
    trajectory = policy.anchor(joined, whole(joined))
    shaken(policy, 1e-2)
    plain, spoilt = evaluations(policy, trajectory), dict(trajectory.record)
    for name in ("noisy", "clean", "anchor.0", "anchor.1"):
        spoilt[name] = spoilt[name].clone()
        for row, length in enumerate(trajectory.record["length"].tolist()):
            spoilt[name][row, ..., length if name == "noisy" else policy.steps.latent(length)[-1] :] = 1e6
    found = evaluations(policy, replace(trajectory, record=spoilt))
    for name, value in plain.items():
        assert torch.equal(value, found[name]), name


def gradient(policy: SpeechPolicy, trajectory: Trajectory, loss: Loss) -> torch.Tensor:
    better = torch.tensor([1.0, -1.0] * (len(trajectory) // 2)).unsqueeze(1).expand(trajectory.mask.shape)
    accumulate(policy, trajectory, Given(better, torch.full(better.shape, 1 / better.numel())), loss)
    found = torch.cat([value.grad.flatten() for value in policy.trainable().values()])
    for value in policy.trainable().values():
        value.grad = None
    return found


@pytest.mark.parametrize("objective", [nft, advantage_weighted])
def test_the_gradient_does_not_depend_on_the_rows_of_a_call(objective, prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder)
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    together = gradient(policy, trajectory, Loss(objective))
    policy.steps = replace(policy.steps, options=replace(policy.options, replay_rows=1))
    alone = gradient(policy, trajectory, Loss(objective))
    assert together.norm() > 0
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-5 * float(together.abs().max()))


def test_by_kind_draws_have_an_objective_of_their_own_and_need_one(prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder)
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    table = {"build": "mmgrpo.weighting:by_kind", "draw": {"build": "mmgrpo.matching:nft"}, "draw_weight": 0.5}
    found = gradient(policy, trajectory, Loss(build(table, "objective")))
    torch.testing.assert_close(found, 0.5 * gradient(policy, trajectory, Loss(nft)))
    with pytest.raises(ValueError, match="no objective for decisions of kind 'draw'; expected objective.draw"):
        gradient(policy, trajectory, Loss(by_kind()))


def test_a_step_of_nft_brings_good_samples_nearer_and_bad_ones_further(prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder, Draws(count=4))
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    anchored = policy.anchor(trajectory, whole(trajectory))
    slope = gradient(policy, trajectory, Loss(partial(nft, strength=1.0)))
    by = 1e-3 / float(slope.norm())
    with torch.no_grad():
        sizes = [value.numel() for value in policy.trainable().values()]
        for value, part in zip(policy.trainable().values(), slope.split(sizes), strict=True):
            value -= by * part.view_as(value)
    fallen = evaluations(policy, anchored)["log_ratio"].mean(1)
    assert fallen[::2].mean() > fallen[1::2].mean()
    assert float((fallen[::2] - fallen[1::2]).gt(0).float().mean()) >= 0.75


def test_the_self_test_passes(prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder)
    policy.prepare(prompts)
    findings = {finding.name: finding for finding in policy.self_test(prompts)}
    assert all(finding.ok for finding in findings.values()), findings
    assert {"replay", "gradient", "finite difference", "ratio", "noise off", "other rows"} <= findings.keys()


def test_gradients_are_those_of_finite_differences(prompts, folder) -> None:
    model = tiny("band gains")
    model.network.double()
    policy = policy_of(model, folder)
    trajectory, _ = policy.rollout(batch_of(prompts[:2], size=2))
    anchored = policy.anchor(trajectory, whole(trajectory))
    slope = replays.gradient(policy, anchored)
    above, below = (replays.difference(policy, anchored, slope, sign * 1e-6) for sign in (1, -1))
    assert abs((above - below) / 2e-6 / float(replays.norm(slope)) ** 2 - 1) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "none of them arrived; expected policy.plan, or policy.draws alone"),
        ({"draws": Draws(), "sampler": flow_sde}, "policy.sampler, policy.draws arrived; expected policy.plan, or"),
        (
            {"draws": Draws(call={"guidance_scale": 1.0})},
            r"policy\.draws\.call is {'guidance_scale': 1.0}; this policy",
        ),
    ],
    ids=["none", "two", "call"],
)
def test_options_that_name_no_decisions_are_refused(options, message, folder, tmp_path) -> None:
    model = saved(tmp_path / "model", lambda: tiny("band gains"))
    with pytest.raises(ValueError, match=message):
        load(model=str(model), device="cpu", **options)
