"""What a guide does becomes the pipeline's own output."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines.policy import NAMED, batch_of, policy_of

from mmgrpo.steering import Strength
from mmgrpo.teaching import losses
from mmgrpo.transitions import dance_sde, ddim
from pipelines.decisions import from_levels
from pipelines.distilling import Student, student
from pipelines.guides import Steering, by_gradient

BRIGHT = Steering(by_gradient(lambda state, level, prompts: state.flatten(1).sum(1)), Strength(kappa=0.05), first=1)
SAMPLERS = {"StableDiffusion3": dance_sde, "StableDiffusion": ddim}


def taught(name, folder, teacher="start") -> tuple[Student, list]:
    generator, prompts = policy_of(NAMED[name], folder, kernel=from_levels(SAMPLERS[name]))
    generator.engine.options = replace(generator.engine.options, guide=BRIGHT)
    policy = student(generator=generator, teacher=teacher)
    policy.prepare(prompts)
    return policy, prompts


def test_the_loss_at_the_start_is_the_square_of_the_velocitys_shift(tmp_path):
    policy, prompts = taught("StableDiffusion3", tmp_path)
    assert losses(policy, batch_of(prompts)).tolist() == pytest.approx([0.05**2] * 6, rel=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_lessons_make_the_unguided_pipeline_go_where_the_guide_points(name, tmp_path):
    policy, prompts = taught(name, tmp_path)
    batch = batch_of(prompts)
    finished = lambda: policy.generator.process.noise_off_states(batch.take(torch.arange(3)))[-1].mean()  # noqa: E731
    before, start = finished(), losses(policy, batch)
    optimizer = torch.optim.Adam(policy.trainable().values(), lr=1e-4)
    for _ in range(20):
        policy.teach(batch, lambda rows, values: values.sum().backward())
        optimizer.step()
        optimizer.zero_grad()
    assert losses(policy, batch).mean() < 0.5 * start.mean()
    assert finished() > before


def test_the_teacher_of_the_start_stays_and_that_of_today_moves_along(tmp_path):
    found = {}
    for teacher in ("start", "today"):
        policy, prompts = taught("StableDiffusion3", tmp_path, teacher)
        with torch.no_grad():
            for value in policy.trainable().values():
                value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
        found[teacher] = losses(policy, batch_of(prompts))
    assert found["today"].tolist() == pytest.approx([0.05**2] * 6, rel=1e-3)
    assert (found["start"] - found["today"]).abs().min() > 1e-5


def test_there_is_nothing_to_learn_without_a_guide(tmp_path):
    generator, _ = policy_of(NAMED["StableDiffusion3"], tmp_path)
    with pytest.raises(ValueError, match="policy.generator.guide is not set; expected the guide that is to be learned"):
        student(generator=generator)
