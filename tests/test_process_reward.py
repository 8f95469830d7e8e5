"""The process reward model: latents of any shape, its folder, what it learns from a generator, and what it does as a guide."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from tiny_pipelines.policy import NAMED, batch_of, policy_of
from torch.nn import functional

from mmgrpo.groups import group_ranks, rank_correlation
from mmgrpo.improve import evaluate
from mmgrpo.teaching import losses
from mmgrpo.transitions import flow_sde
from mmgrpo.types import Prompt
from pipelines.decisions import from_levels
from pipelines.process_reward import Learner, guide, learner
from pipelines.process_reward_network import ProcessReward, Sizes, cut, hashed, load, save

PROMPTS = [Prompt(0, "three red circles"), Prompt(1, "a dog, asleep")]
SHAPES = {"image": (2, 4, 5, 6), "tokens": (2, 7, 12), "video": (2, 4, 3, 5, 4)}
LEVEL = torch.tensor([0.3, 0.8])


def network_for(shape, seed: int = 0) -> ProcessReward:
    torch.manual_seed(seed)
    channels, axes = (shape[2], 1) if len(shape) == 3 else (shape[1], len(shape) - 2)
    return ProcessReward(Sizes(channels, axes, width=16, blocks=2, heads=2, vocabulary=50)).eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_latents_of_any_shape_get_a_score_each_that_every_latent_and_the_level_and_the_prompt_move(shape):
    network, state = network_for(shape), torch.randn(shape).requires_grad_()
    scores = network(state, LEVEL, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), state)
    assert scores.shape == (2,)
    assert (gradient != 0).all()
    assert (network(state, LEVEL / 2, PROMPTS) != scores).all()
    assert (network(state, LEVEL, PROMPTS[::-1]) != scores).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_score_does_not_depend_on_the_samples_beside_it_nor_on_their_longer_prompts(shape):
    network, state = network_for(shape), torch.randn(shape)
    together = network(state, LEVEL, PROMPTS)
    alone = [network(state[row : row + 1], LEVEL[row : row + 1], PROMPTS[row : row + 1]) for row in range(2)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_patches_are_those_of_unfold():
    image = torch.randn(2, 3, 4, 6)
    found = cut(cut(image, 2, 2), 3, 2).flatten(2, 3).transpose(1, 2).flatten(2)
    assert torch.equal(found, functional.unfold(image, 2, stride=2).transpose(1, 2))
    assert cut(torch.ones(1, 1, 5), 2, 2).tolist() == [[[[1, 1], [1, 1], [1, 0]]]]


def test_words_keep_their_entries_whatever_their_case_and_have_an_end():
    sizes = Sizes(1, 1, vocabulary=4096, words=3)
    numbers = hashed(["Red circles", "red circles, two of them", ""], sizes)
    assert numbers[0, :2].tolist() == numbers[1, :2].tolist()
    assert numbers.shape == (3, 3) and numbers[0, 2] == 0 and numbers[2].tolist() == [0, 0, 0]
    assert (numbers[1] > 0).all() and (numbers < 4096).all()


def test_a_folder_brings_the_model_back_bit_for_bit(tmp_path):
    network, state = network_for(SHAPES["image"]), torch.randn(SHAPES["image"])
    save(tmp_path, network)
    assert torch.equal(load(tmp_path)(state, LEVEL, PROMPTS), network(state, LEVEL, PROMPTS))


def test_latents_and_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5, 6\) have 3 channels along 2 axes; the .* reads 4 along 2"):
        network_for(SHAPES["image"])(torch.zeros(2, 3, 5, 6), LEVEL, PROMPTS)
    with pytest.raises(ValueError, match="no config.json; expected a process reward model written by mmgrpo"):
        load(tmp_path)
    with pytest.raises(ValueError, match="width is 10 with 4 heads; expected a multiple of twice the heads"):
        Sizes(4, 2, width=10)


def test_ranks_and_their_correlation_are_those_of_scipy_in_each_group():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(5, (2, 24), generator=generator).double()
    group = torch.arange(24) % 3
    found = rank_correlation(first, second, group)
    for number in range(3):
        rows = group == number
        assert float(found[rows][0]) == pytest.approx(spearmanr(first[rows], second[rows]).statistic)
    assert group_ranks(torch.tensor([2.0, 5.0, 2.0, math.nan]), torch.zeros(4, dtype=torch.int64)).tolist()[:3] == [
        1.5,
        3,
        1.5,
    ]
    assert rank_correlation(torch.ones(4), second[:4], torch.zeros(4, dtype=torch.int64)).isnan().all()


# -- lessons


def brightness(samples):
    return samples.image.flatten(1).mean(1)


def learning(folder, reward=brightness, **options) -> tuple[Learner, list[Prompt]]:
    torch.manual_seed(0)
    generator, prompts = policy_of(NAMED["StableDiffusion3"], folder, kernel=from_levels(flow_sde))
    table = {"width": 16, "blocks": 1, "heads": 2, "vocabulary": 50}
    policy = learner(generator=generator, reward=reward, network=table, **options)
    policy.prepare(prompts)
    return policy, prompts


def test_a_lesson_is_the_squared_error_at_random_levels_the_same_each_time_and_in_parts_of_any_size(tmp_path):
    policy, prompts = learning(tmp_path, draws=3, rows=2)
    batch = batch_of(prompts)
    first = losses(policy, batch)
    assert torch.equal(first, losses(policy, batch))
    policy.rows = 6
    assert torch.allclose(losses(policy, batch), first, atol=1e-6)
    with torch.no_grad():
        for value in policy.network.leave.parameters():
            value.zero_()
    wanted = brightness(policy.generator.rollout(batch)[1])
    assert torch.allclose(losses(policy, batch), wanted.square(), atol=1e-6)


def test_only_the_model_learns_and_a_sample_without_an_opinion_teaches_nothing(tmp_path):
    def silent(samples):
        return torch.where(torch.arange(len(samples)) % 2 == 0, torch.nan, brightness(samples))

    policy, prompts = learning(tmp_path, silent, draws=2)
    seen = {}

    def consume(rows, values):
        values.sum().backward()
        seen.update(zip(rows.tolist(), values.tolist(), strict=True))

    policy.teach(batch_of(prompts), consume)
    assert [row for row, value in seen.items() if value == 0] == [0, 2, 4]
    assert all(value.grad.isfinite().all() for value in policy.trainable().values() if value.grad is not None)
    assert all(value.grad is None for value in policy.generator.engine.pipeline.transformer.parameters())


def test_levels_are_spread_over_all_of_the_path(tmp_path):
    policy, prompts = learning(tmp_path, draws=4)
    levels = policy._levels(batch_of(prompts))
    assert levels.shape == (6, 4)
    assert torch.equal((levels * 4).long(), torch.arange(4).expand(6, 4))


def test_what_was_learned_is_examined_by_level_and_decisions_are_refused(tmp_path):
    policy, prompts = learning(tmp_path)
    batch = batch_of(prompts)
    found = policy.examined(batch)
    assert {*found} == {f"rank_correlation_at_{level}" for level in (0.1, 0.3, 0.5, 0.7, 0.9)}
    assert all(value.shape == (6,) and (value.abs() <= 1).all() for value in found.values())
    assert all(finding.ok for finding in policy.self_test(prompts))
    assert torch.equal(policy.generate(batch).image, policy.generator.generate(batch).image)
    for refused in (lambda: policy.rollout(batch), lambda: policy.anchor(None, []), policy.adapters_off):
        with pytest.raises(ValueError, match="takes no decisions to align; expected train.stage = 'pretrain'"):
            refused()


def test_a_reward_of_several_numbers_is_refused(tmp_path):
    policy, prompts = learning(tmp_path, lambda samples: {"soft": brightness(samples)})
    with pytest.raises(ValueError, match=r"policy.reward gives \['soft'\]; expected one number a sample"):
        losses(policy, batch_of(prompts))


@pytest.mark.parametrize("directions", [0, 2])
def test_a_saved_model_guides_and_the_replay_stays_exact(directions, tmp_path):
    policy, prompts = learning(tmp_path)
    policy.save(tmp_path / "model")
    generator = policy.generator
    generator.engine.trainable()
    for value in generator.engine.pipeline.transformer.parameters():
        value.requires_grad_(True)
    options = {"guide": guide(model=tmp_path / "model", kappa=3.0, directions=directions), "keep_states": False}
    generator.engine.options = type(generator.engine.options)(**{**vars(generator.engine.options), **options})
    trajectory, _ = generator.rollout(batch_of(prompts))
    state = trajectory.record["next.0.0"]
    expected = policy.network(
        state, torch.full((6,), float(generator.engine.pipeline.scheduler.sigmas[1])), batch_of(prompts).prompts
    )
    assert torch.allclose(trajectory.record["process_scores"][:, 1], expected, atol=1e-5)
    assert (trajectory.record["guide_shift"][trajectory.mask] > 0).all()
    assert evaluate(generator, trajectory).log_ratio.abs().max() == 0
