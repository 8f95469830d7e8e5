"""The noise that schedulers bring themselves: the distribution found by asking equals that of their draws, and replays."""

import diffusers
import pytest
import torch
from tiny_pipelines.policy import NAMED, batch_of, policy_of

from mmgrpo.improve import evaluate
from pipelines.native import native
from pipelines.schedulers import INDEXED

F64 = torch.float64
STEPS = 6
SCHEDULERS = {
    "DDPM": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "DDPM, learned variance": lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"),
    "UnCLIP": lambda: diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample=False),
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "LCM": lambda: diffusers.LCMScheduler(),
    "TCD": lambda: diffusers.TCDScheduler(),
    "SDE-DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "flow, stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}
NOISY = ("StableDiffusionXLImg2Img", "LatentConsistency", "DDPM", "DDIM")


def step_of(scheduler, place: int, channels: int = 1):
    """The scheduler at a step of its schedule, and the arguments of that step."""
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps[:place]:
        if isinstance(scheduler, INDEXED):
            scheduler.step(torch.zeros(2, channels, 3, 3), timestep, torch.zeros(2, 1, 3, 3))
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):  # the first-order form has no history
        scheduler.model_outputs, scheduler.lower_order_nums = [None] * scheduler.config.solver_order, 0
    generator = torch.Generator().manual_seed(place)
    sample = torch.randn(2, 1, 3, 3, generator=generator, dtype=F64)
    output = torch.randn(2, channels, 3, 3, generator=generator, dtype=F64) / 2
    arguments = {"self": scheduler, "model_output": output, "timestep": scheduler.timesteps[place], "sample": sample}
    return arguments | (
        {"eta": 0.7} if isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.TCDScheduler)) else {}
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_distribution_found_is_that_of_the_stock_steps_draws(name):
    scheduler = SCHEDULERS[name]()
    arguments = step_of(scheduler, 2, channels=2 if "learned" in name else 1)
    gaussian = native(scheduler, arguments)(arguments["model_output"]).gaussian
    count = 4000
    wide = {"sample": arguments["sample"].repeat(count, 1, 1, 1), "return_dict": False}
    wide["model_output"] = arguments["model_output"].repeat(count, 1, 1, 1)
    torch.manual_seed(0)
    stock = dict(arguments) | wide
    state, *_ = type(stock.pop("self")).step(scheduler, **stock)
    drawn = state.double().reshape(count, *arguments["sample"].shape)
    error = (drawn.mean(0) - gaussian.mean) / gaussian.std * count**0.5
    assert (gaussian.std > 0).all()
    assert error.abs().max() < 4.5
    torch.testing.assert_close(drawn.std(0), gaussian.std.expand_as(drawn[0]), rtol=0.06, atol=0)


def test_a_learned_variance_keeps_its_gradient():
    scheduler = SCHEDULERS["DDPM, learned variance"]()
    arguments = step_of(scheduler, 2, channels=2)
    output = arguments["model_output"].requires_grad_()
    (slope,) = torch.autograd.grad(native(scheduler, arguments)(output).gaussian.std.sum(), output)
    assert (slope[:, 0] == 0).all() and (slope[:, 1] > 0).all()


def test_asking_leaves_the_scheduler_as_it_was():
    scheduler = SCHEDULERS["SDE-DPM-Solver++"]()
    arguments = step_of(scheduler, 2)
    before = {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
    native(scheduler, arguments)(arguments["model_output"])
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[name] is value or vars(scheduler)[name] == value for name, value in before.items())


@pytest.mark.parametrize("name", NOISY)
def test_a_pipeline_with_its_schedulers_own_noise_passes_the_self_test(name, tmp_path):
    policy, prompts = policy_of(NAMED[name], tmp_path, guided=True, kernel=native)
    assert [finding for finding in policy.self_test(prompts) if not finding.ok] == []
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
