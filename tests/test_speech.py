"""A speech policy hears its recordings, denoises, and evaluates its steps again, exactly and at any length."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from sounds import BANDS, MODELS, RATE, Linear, recordings, saved, tiny
from torch import Tensor

from mmgrpo import seeds
from mmgrpo.data import requests
from mmgrpo.gathering import joined_trajectory
from mmgrpo.improve import small
from mmgrpo.schedules import all_but_last, listed
from mmgrpo.shadow import Reference
from mmgrpo.transitions import cps, dance_sde, ddim, flow_sde
from mmgrpo.types import Batch, Chunk, Prompt, Trajectory
from pipelines import replays
from pipelines.recordings import Mixing
from pipelines.speech import SpeechPolicy, load
from pipelines.speech_flow import enhance, matching_loss
from pipelines.speech_models import Model
from pipelines.speech_steps import Options

S = 4
EVERY = partial(all_but_last)
SAMPLERS = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps, "ddim": partial(ddim, eta=0.5)}
each_model = pytest.mark.parametrize("name", MODELS)
each_precision = pytest.mark.parametrize(
    ("name", "autocast"),
    [
        *((name, None) for name in MODELS),
        ("band gains", torch.bfloat16),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in ("unet", "transformer")),
    ],
    ids=str,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sounds")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[Prompt]:
    return recordings(folder)


def policy_of(model: Model, folder: Path, plan=EVERY, train: tuple[str, ...] = (), **options) -> SpeechPolicy:
    mixing = Mixing(RATE, noise=folder / "noise", snr=(0, 5))
    return SpeechPolicy(model, Options(**{"steps": S, "sampler": flow_sde, **options}), plan, mixing, train=train)


def linear() -> Model:
    return Model(Linear(), BANDS)


def batch_of(prompts: list[Prompt], size: int = 3, iteration: int = 0) -> Batch:
    return requests(prompts, range(len(prompts)), group_size=size, seed=4, iteration=iteration)


def evaluations(policy: SpeechPolicy, trajectory: Trajectory, reference=None) -> dict[str, Tensor]:
    """Every field of a replay of one number a decision, (B, S); NaN where nothing was evaluated."""
    found: dict[str, Tensor] = {}

    def consume(chunk: Chunk) -> None:
        for name, value in small(chunk.evaluation).items():
            whole = found.setdefault(name, torch.full(trajectory.mask.shape, math.nan, dtype=value.dtype))
            whole[chunk.rows.unsqueeze(1), chunk.steps] = value.detach()

    policy.replay(trajectory, consume, reference)
    return found


def shaken(policy: SpeechPolicy, by: float) -> None:
    generator = torch.Generator().manual_seed(9)
    for value in policy.trainable().values():
        value.data += by * torch.randn(value.shape, generator=generator).to(value)


def whole(trajectory: Trajectory) -> list[Tensor]:
    return [torch.arange(len(trajectory))]


@each_precision
def test_on_policy_log_ratios_are_exactly_0_for_recordings_of_any_lengths(name, autocast, prompts, folder) -> None:
    policy = policy_of(tiny(name), folder, rollout_rows=3, replay_rows=2, autocast=autocast)
    policy.prepare(prompts)
    trajectory, samples = policy.rollout(batch_of(prompts, size=2))
    assert samples.audio.shape == (8, 1, 1000)
    assert samples.audio_length.tolist() == [800, 800, 1000, 1000, 800, 800, 550, 550]
    fresh = evaluations(policy, trajectory)
    assert fresh["log_ratio"][trajectory.mask].abs().max() == 0
    assert fresh["log_ratio"][:, -1].isnan().all() and not trajectory.mask[:, -1].any()
    parts = [torch.tensor([5, 3, 1, 4, 7]), torch.tensor([0, 2])]
    anchored = policy.anchor(trajectory, parts)
    for part in parts:
        found = evaluations(policy, anchored.take(part))
        assert found["log_ratio"][:, :-1].abs().max() == 0 and found["drift"][:, :-1].abs().max() == 0
    assert found["sampler_gap"][:, :-1].abs().max() < (1e-5 if autocast is None else 1e-1)
    shaken(policy, 1e-2)
    assert (evaluations(policy, anchored.take(parts[0]))["log_ratio"][:, :-1].abs() > 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_is_replayed_exactly_and_follows_the_weights(sampler, prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder, plan=partial(listed, indices=[0, 2]), sampler=sampler)
    trajectory, _ = policy.rollout(batch_of(prompts[:2]))
    assert trajectory.mask.tolist() == [[True, False, True, False]] * 6
    assert {name for name in trajectory.record if name.startswith("state")} == {f"state.{n}" for n in range(4)}
    anchored = policy.anchor(trajectory, whole(trajectory))
    assert replays.largest(policy, anchored) == 0
    shaken(policy, 1e-2)
    assert 0 < replays.largest(policy, anchored) < 10


def flow_sde_by_hand(x: Tensor, velocity: Tensor, centre: Tensor, t: float, t_next: float, second: float) -> tuple:
    """Mean and std of methods/flow.md S.0 around a centre, noise level 0.7; float64."""
    g2 = 0.49 * t / (1 - t if t < 1 else 1 - second)
    length = t - t_next
    y, v = x - t * centre, velocity - centre
    mean = y - length * v - g2 * length / (2 * t) * (y + (1 - t) * v)
    return mean + t_next * centre, math.sqrt(g2 * length)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_with_a_linear_network_every_field_is_that_of_the_gaussians_by_hand(reduction, prompts, folder) -> None:
    model = linear()
    model.network.double()
    policy = policy_of(model, folder, reduction=reduction)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    trajectory = policy.anchor(trajectory, whole(trajectory))
    reference = Reference("frozen", policy.trainable())
    old = model.network.weight.detach().clone()
    with torch.no_grad():
        model.network.weight += torch.tensor([0.05, -0.1, 0.07])
    new = model.network.weight.detach()
    found = evaluations(policy, trajectory, reference)
    moments = torch.linspace(1, 0, S + 1).double().tolist()
    for row in range(len(trajectory)):
        length = int(trajectory.record["length"][row])
        noisy = trajectory.record["noisy"][row : row + 1, :length]
        condition, centre = BANDS.condition(noisy).double(), BANDS.centre(noisy).double()
        frames = condition.shape[-1]
        for step in range(S - 1):
            t, t_next = moments[step : step + 2]
            x, following = (trajectory.record[f"state.{n}"][row, ..., :frames].double() for n in (step, step + 1))
            said = [a * x + b * t + c * condition.mean(1) for a, b, c in (new, old)]
            (mean, std), (before, _) = (flow_sde_by_hand(x, v, centre[0], t, t_next, moments[1]) for v in said)
            ratio = ((following - before).square() - (following - mean).square()) / (2 * std**2)
            distance = (mean - before).square() / (2 * std**2)
            expected = {"log_ratio": ratio, "to_reference": ratio, "kl": distance, "drift": distance}
            for field, elements in expected.items():
                value = elements.mean() if reduction == "mean" else elements.sum()
                assert torch.allclose(found[field][row, step], value, rtol=1e-5, atol=1e-9), (field, row, step)
            assert abs(float(found["step_std"][row, step]) - std) < 1e-6
            assert abs(float(found["dt"][row, step]) - (t - t_next)) < 1e-6


def test_the_noise_of_a_step_has_the_std_that_is_evaluated(prompts, folder) -> None:
    policy = policy_of(linear(), folder)
    trajectory, _ = policy.rollout(batch_of(prompts[:1], size=64))
    fresh = []
    for step in range(S - 1):
        x, following = trajectory.record[f"state.{step}"], trajectory.record[f"state.{step + 1}"]
        given = policy.steps.given(trajectory.record["noisy"])
        mean, std = policy.steps.gaussian(x, trajectory.record[f"velocity.{step}"], step, given.centre)
        fresh.append((following - mean) / std)
    z = torch.stack(fresh)
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel()) and abs(float(z.std()) - 1) < 4 / math.sqrt(2 * z.numel())
    first = trajectory.record["state.0"] - policy.steps.given(trajectory.record["noisy"]).centre
    assert abs(float(first.std()) - 1) < 4 / math.sqrt(2 * first.numel())


@each_model
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_without_noise_a_recording_is_that_of_the_euler_sampler(name, power, prompts, folder) -> None:
    policy = policy_of(tiny(name), folder, power=power)
    batch = batch_of(prompts, size=1)
    samples, (trajectory, noisy_walk) = policy.generate(batch), policy.rollout(batch)
    for row, sample in enumerate(batch.sample.tolist()):
        length = int(samples.audio_length[row])
        noisy = trajectory.record["noisy"][row : row + 1, :length]
        expected = enhance(policy.model, noisy, S, [seeds.derive(batch.seed, sample, "start")], power).clamp(-1, 1)
        assert (samples.audio[row, :, :length] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.allclose(samples.audio, noisy_walk.audio, atol=1e-3)


def test_samples_of_a_group_may_start_from_one_noise(prompts, folder) -> None:
    policy = policy_of(linear(), folder, same_noise=True)
    trajectory, _ = policy.rollout(requests(prompts, [0, 2, 0], group_size=3, seed=4, iteration=0))
    first, second = trajectory.record["state.0"].split([3, 6])
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert not torch.equal(first[0], second[3])  # the same prompt again is another group
    assert not torch.equal(trajectory.record["state.1"][0], trajectory.record["state.1"][1])


def test_samples_of_a_group_hear_one_mixture_and_evaluations_the_same_each_time(prompts, folder) -> None:
    policy = policy_of(linear(), folder)
    batch = requests(prompts, [0, 2, 0], group_size=3, seed=4, iteration=0)
    trajectory, samples = policy.rollout(batch)
    noisy = trajectory.record["noisy"].unflatten(0, (3, 3))
    assert (noisy == noisy[:, :1]).all() and not torch.equal(noisy[0, 0], noisy[2, 0])
    assert torch.equal(samples.reference_audio[0], samples.reference_audio[6])  # the same recording in another noise
    assert len(samples.audio[:3].unique(dim=0)) == 3
    again, other = policy.generate(batch), policy.generate(replace(batch, seed=5))
    assert torch.equal(again.audio, policy.generate(batch).audio) and not torch.equal(again.audio, other.audio)
    assert samples.rate == RATE and samples.audio.abs().max() <= 1


@each_model
def test_permuted_rows_give_permuted_results(name, prompts, folder) -> None:
    policy = policy_of(tiny(name), folder)
    batch = batch_of(prompts[1:3], size=2)
    order = torch.tensor([2, 1, 3, 0])
    (trajectory, samples), (moved, others) = policy.rollout(batch), policy.rollout(batch.take(order))
    assert torch.allclose(samples.audio[order], others.audio, atol=1e-4)
    assert torch.equal(samples.reference_audio[order], others.reference_audio)
    trajectory, moved = (policy.anchor(one, whole(one)) for one in (trajectory, moved))
    shaken(policy, 1e-2)
    ours, theirs = evaluations(policy, trajectory.take(order)), evaluations(policy, moved)
    assert torch.allclose(ours["log_ratio"], theirs["log_ratio"], rtol=1e-2, atol=1e-4, equal_nan=True)


def test_what_is_padded_counts_nowhere(prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts, size=2))
    trajectory = policy.anchor(trajectory, whole(trajectory))
    shaken(policy, 1e-2)
    plain, spoilt = evaluations(policy, trajectory), dict(trajectory.record)
    for name, value in spoilt.items():
        spoilt[name] = value.clone()
        for row, length in enumerate(trajectory.record["length"].tolist() if name != "length" else []):
            spoilt[name][row, ..., length if name == "noisy" else policy.steps.latent(length)[-1] :] = 1e6
    found = evaluations(policy, replace(trajectory, record=spoilt))
    for name, value in plain.items():
        assert torch.equal(value.nan_to_num(7), found[name].nan_to_num(7)), name


def test_gradients_are_those_of_finite_differences(prompts, folder) -> None:
    model = tiny("band gains")
    model.network.double()
    policy = policy_of(model, folder)
    trajectory, _ = policy.rollout(batch_of(prompts[:2], size=2))
    anchored = policy.anchor(trajectory, whole(trajectory))
    slope = replays.gradient(policy, anchored)
    assert slope.keys() == dict(model.network.named_parameters()).keys()
    by = 1e-6
    above, below = (replays.difference(policy, anchored, slope, sign * by) for sign in (1, -1))
    size = float(replays.norm(slope))
    assert abs((above - below) / (2 * by) / size**2 - 1) < 1e-5


def test_rollouts_of_one_iteration_can_be_joined_whatever_their_lengths(prompts, folder) -> None:
    policy = policy_of(linear(), folder)
    policy.prepare(prompts)
    parts = [
        policy.rollout(requests(prompts, [row], group_size=2, seed=4, iteration=0, first_group=row))[0]
        for row in (3, 1)
    ]
    joined = joined_trajectory(parts)
    anchored = policy.anchor(joined, whole(joined))
    shaken(policy, 1e-2)
    ours = evaluations(policy, anchored)["log_ratio"]
    alone = torch.cat([evaluations(policy, anchored.take(rows))["log_ratio"] for rows in torch.arange(4).split(2)])
    assert torch.allclose(ours, alone, rtol=1e-3, atol=1e-6, equal_nan=True)


def taught(policy: SpeechPolicy, batch: Batch) -> Tensor:
    """The losses of all rows, the graphs of their chunks kept."""
    parts: dict[int, Tensor] = {}
    policy.teach(batch, lambda rows, losses: parts.update(zip(rows.tolist(), losses, strict=True)))
    return torch.stack([parts[row] for row in range(len(batch))])


def test_a_taught_row_has_the_matching_loss_of_its_own_time_and_noise(prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder)
    batch = batch_of(prompts, size=1)
    losses = taught(policy, batch.take(torch.tensor([3, 0, 2])))
    assert losses.shape == (3,) and losses.requires_grad
    assert torch.equal(losses, taught(policy, batch.take(torch.tensor([3, 0, 2]))))
    trajectory, samples = policy.rollout(batch)
    for place, row in enumerate((3, 0, 2)):
        length, sample = int(samples.audio_length[row]), int(batch.sample[row])
        clean, noisy = samples.reference_audio[row, :, :length], trajectory.record["noisy"][row : row + 1, :length]
        t = torch.rand((), generator=torch.Generator().manual_seed(seeds.derive(batch.seed, sample, "teach", "time")))
        eps = seeds.normal([seeds.derive(batch.seed, sample, "teach")], policy.steps.latent(length))
        expected = matching_loss(policy.model, clean, noisy, t[None], eps)
        assert torch.allclose(losses[place], expected[0], rtol=1e-4)
    losses.sum().backward()
    assert all(value.grad is not None for value in policy.trainable().values())


def test_teaching_lowers_the_loss(prompts, folder) -> None:
    policy = policy_of(tiny("band gains"), folder)
    optimizer = torch.optim.Adam(policy.trainable().values(), 3e-3)
    found = []
    for iteration in range(25):
        batch = requests(prompts, [0, 1, 2, 3], group_size=1, seed=0, iteration=iteration)
        losses = taught(policy, batch)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        found.append(float(losses.mean().detach()))
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


@each_precision
def test_the_self_test_passes_for_shipped_networks(name, autocast, prompts, folder) -> None:
    policy = policy_of(tiny(name), folder, autocast=autocast)
    policy.prepare(prompts)
    found = policy.self_test(prompts)
    assert all(finding.ok for finding in found), found
    assert {finding.name for finding in found} == {
        "model", "replay", "gradient", "noise off", "other rows", "finite difference", "ratio"
    }  # fmt: skip


class Neighbours(Linear):
    """A network whose rows look at each other."""

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        return super().forward(x - x.mean(0), t, noisy)


class Forgetful(Linear):
    """A network that says something else each time."""

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x), t, noisy)


class Detached(Linear):
    """A network half of whose output has no gradient."""

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        velocity = super().forward(x, t, noisy)
        return (velocity + velocity.detach()) / 2


@pytest.mark.parametrize(
    ("network", "name"), [(Neighbours, "other rows"), (Forgetful, "replay"), (Detached, "finite difference")]
)
def test_the_self_test_finds_what_is_wrong_with_a_network(network, name, prompts, folder) -> None:
    policy = policy_of(Model(network(), BANDS), folder)
    assert name in {finding.name for finding in policy.self_test(prompts) if not finding.ok}


def test_patterns_choose_what_is_trained_and_a_saved_policy_is_read_back(prompts, folder, tmp_path) -> None:
    path = saved(tmp_path / "model", lambda: tiny("band gains"))
    options = {"model": str(path), "plan": all_but_last, "noise": folder / "noise", "device": "cpu"}
    policy = load(**options, train=("blocks.*.wide.*", "leave.weight"))
    assert sorted(policy.trainable()) == [
        *(f"blocks.{n}.wide.{part}" for n in range(2) for part in ("bias", "weight")), "leave.weight"
    ]  # fmt: skip
    shaken(policy, 0.1)
    policy.save(tmp_path / "trained")
    batch = batch_of(prompts, size=1)
    again = load(**{**options, "model": str(tmp_path / "trained")})
    assert torch.equal(again.generate(batch).audio, policy.generate(batch).audio)
    assert not torch.equal(again.generate(batch).audio, load(**options).generate(batch).audio)
    with pytest.raises(ValueError, match=r"policy.train: no parameter matches 'blocs\.\*'"):
        load(**options, train=("blocs.*",))


def test_a_network_of_ones_own_is_named_by_the_user(folder, prompts, tmp_path) -> None:
    path = saved(tmp_path / "model", linear)
    options = {"model": str(path), "plan": all_but_last, "noise": folder / "noise", "device": "cpu"}
    with pytest.raises(ValueError, match="policy.network"):
        load(**options)
    policy = load(**options, network="sounds:Linear")
    assert (
        isinstance(policy.model.network, Linear) and replays.largest(policy, policy.rollout(batch_of(prompts))[0]) == 0
    )


def test_options_that_cannot_be_are_refused(folder, prompts, tmp_path) -> None:
    with pytest.raises(ValueError, match="replay_rows is 0; expected at least 1"):
        policy_of(linear(), folder, replay_rows=0)
    with pytest.raises(ValueError, match="expected 'frozen'"):
        policy_of(linear(), folder).adapters_off()
    with pytest.raises(ValueError, match="recordings come at 16000 Hz; expected 8000"):
        SpeechPolicy(linear(), Options(S, flow_sde), all_but_last, Mixing(16000))
    silent = SpeechPolicy(linear(), Options(S, flow_sde), all_but_last, Mixing(RATE))
    with pytest.raises(ValueError, match="problems: 4\n  prompt 0 has no noisy recording"):
        silent.prepare(prompts)


def test_half_precision_weights_are_replayed_exactly(folder, prompts) -> None:
    model = tiny("band gains")
    model.network.to(torch.bfloat16)
    policy = policy_of(model, folder)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert replays.largest(policy, policy.anchor(trajectory, whole(trajectory))) == 0
    assert taught(policy, batch_of(prompts)).isfinite().all()


def test_cut_recordings_are_of_one_length_and_other_groups_hear_other_stretches(folder, prompts, tmp_path) -> None:
    path = saved(tmp_path / "model", lambda: tiny("band gains"))
    policy = load(model=str(path), plan=all_but_last, noise=folder / "noise", seconds=0.05, device="cpu")
    policy.prepare(prompts)
    assert policy.notes[-1] == "4 recordings of 400 to 400 samples at 8000 Hz"
    _, samples = policy.rollout(requests(prompts, [1, 1], group_size=2, seed=0, iteration=0))
    assert samples.audio.shape == (4, 1, 400) and (samples.audio_length == 400).all()
    reference = samples.reference_audio
    assert torch.equal(reference[0], reference[1]) and not torch.equal(reference[0], reference[2])
