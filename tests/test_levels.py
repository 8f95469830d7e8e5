"""Levels of every scheduler class of diffusers, against the stock samplers, `add_noise` and an exact Gaussian denoiser."""

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import schedulers

from mmgrpo.transitions import Level
from pipelines import levels
from pipelines.levels import Unsupported, clean_and_noise, read
from pipelines.schedulers import (
    REASONS,
    NoFirstOrder,
    advance,
    first_order,
    is_scheduler,
    position,
    quiet,
    require_supported,
)

SHAPE = (2, 4, 3, 3)
STEPS = 7
FLOAT32 = (  # their step computes in float32 whatever it is given
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EDMEulerScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.HeliosScheduler,
)

PREDICTIONS = [dict(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")]
SPACINGS = [dict(timestep_spacing=kind) for kind in ("trailing", "leading", "linspace")]
TABLES = [dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True), dict(use_beta_sigmas=True)]
SIGMA_MIN = dict(final_sigmas_type="sigma_min")
ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SOLVER = [*PREDICTIONS, *TABLES, FLOW, dict(FLOW, flow_shift=3.0), dict(use_flow_sigmas=True), dict(solver_order=3)]
VARIANTS: dict[str, list[dict]] = {
    "FlowMatchEulerDiscreteScheduler": [
        {},
        dict(shift=3.0),
        dict(use_dynamic_shifting=True),
        dict(use_dynamic_shifting=True, time_shift_type="linear"),
        dict(shift_terminal=0.1),
        dict(invert_sigmas=True),
        dict(invert_sigmas=True, shift=2.0),
        dict(stochastic_sampling=True),
        *TABLES,
    ],
    "FlowMatchHeunDiscreteScheduler": [{}, dict(shift=3.0)],
    "FlowMatchLCMScheduler": [{}, dict(shift=3.0), dict(use_dynamic_shifting=True)],
    "FlowMapEulerDiscreteScheduler": [{}, dict(shift=5.0)],
    "LTXEulerAncestralRFScheduler": [{}, dict(eta=0.5)],
    "MiniMaxH3Scheduler": [{}, dict(shift=3.0)],
    "HeliosScheduler": [dict(stages=1), dict(stages=1, shift=3.0), dict(stages=1, scheduler_type="euler"), {}],
    "EulerDiscreteScheduler": [
        *PREDICTIONS,
        *SPACINGS,
        *TABLES,
        SIGMA_MIN,
        ZERO_SNR,
        dict(interpolation_type="log_linear"),
        dict(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.02, sigma_max=700.0),
    ],
    "EulerAncestralDiscreteScheduler": [*PREDICTIONS[:2], *SPACINGS, ZERO_SNR],
    "LMSDiscreteScheduler": [*PREDICTIONS, *SPACINGS, *TABLES],
    "HeunDiscreteScheduler": [*PREDICTIONS, *SPACINGS, *TABLES, dict(clip_sample=True)],
    "KDPM2DiscreteScheduler": [{}, dict(prediction_type="v_prediction", **SPACINGS[0]), *TABLES[:2]],
    "KDPM2AncestralDiscreteScheduler": [{}, dict(prediction_type="v_prediction", **SPACINGS[0]), TABLES[0]],
    "DPMSolverSDEScheduler": [*PREDICTIONS[:2], *SPACINGS, *TABLES],
    "EDMEulerScheduler": [{}, dict(prediction_type="v_prediction"), dict(sigma_schedule="exponential"), SIGMA_MIN],
    "EDMDPMSolverMultistepScheduler": [
        {},
        dict(prediction_type="v_prediction"),
        dict(sigma_schedule="exponential"),
        SIGMA_MIN,
        dict(algorithm_type="sde-dpmsolver++"),
        dict(thresholding=True),
    ],
    "CosineDPMSolverMultistepScheduler": [{}, dict(prediction_type="epsilon"), SIGMA_MIN],
    "DPMSolverMultistepScheduler": [
        *SOLVER,
        *SPACINGS,
        SIGMA_MIN,
        ZERO_SNR,
        dict(use_lu_lambdas=True),
        dict(algorithm_type="sde-dpmsolver++"),
        dict(thresholding=True),
        dict(FLOW, use_dynamic_shifting=True),
    ],
    "DPMSolverSinglestepScheduler": [*SOLVER, SIGMA_MIN, dict(algorithm_type="sde-dpmsolver++")],
    "UniPCMultistepScheduler": [
        *SOLVER,
        *SPACINGS,
        SIGMA_MIN,
        ZERO_SNR,
        dict(solver_type="bh1"),
        dict(FLOW, use_dynamic_shifting=True),
        dict(FLOW, use_karras_sigmas=True, sigma_min=0.01, sigma_max=200.0),
        dict(predict_x0=False, **SIGMA_MIN),
    ],
    "DEISMultistepScheduler": [*SOLVER, *SPACINGS],
    "SASolverScheduler": [*PREDICTIONS, *SPACINGS, *TABLES, FLOW],
    "DDIMScheduler": [
        *PREDICTIONS,
        *SPACINGS,
        dict(set_alpha_to_one=False, steps_offset=1, **SCALED),
        dict(prediction_type="v_prediction", **ZERO_SNR),
        dict(thresholding=True),
    ],
    "DDIMParallelScheduler": [*PREDICTIONS, *SPACINGS, dict(set_alpha_to_one=False)],
    "CogVideoXDDIMScheduler": [*PREDICTIONS, *SPACINGS, dict(prediction_type="v_prediction", **ZERO_SNR)],
    "CogVideoXDPMScheduler": [*PREDICTIONS, *SPACINGS, dict(prediction_type="v_prediction", **ZERO_SNR)],
    "PNDMScheduler": [
        *[dict(kind, skip_prk_steps=True) for kind in (*PREDICTIONS[:2], *SPACINGS)],
        dict(skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1, **SCALED),
        {},
        dict(set_alpha_to_one=True),
    ],
    "DDPMScheduler": [
        *PREDICTIONS,
        *SPACINGS,
        dict(steps_offset=1),
        dict(variance_type="learned_range"),
        dict(beta_schedule="sigmoid"),
    ],
    "DDPMParallelScheduler": [*PREDICTIONS, *SPACINGS],
    "UnCLIPScheduler": [{}, dict(prediction_type="sample"), dict(variance_type="learned_range")],
    "DDPMWuerstchenScheduler": [{}, dict(scaler=2.0)],
    "LCMScheduler": PREDICTIONS,
    "TCDScheduler": PREDICTIONS,
    "CMStochasticIterativeScheduler": [{}],
    "IPNDMScheduler": [{}],
    "SCMScheduler": [{}],
}
ROWS = [(name, options) for name, variants in VARIANTS.items() for options in variants]


def named(value):
    return value if isinstance(value, str) else ",".join(f"{key}={item}" for key, item in value.items()) or "default"


each = pytest.mark.parametrize(("name", "options"), ROWS, ids=named)


def build(name, options):
    if name in ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"):
        pytest.importorskip("torchsde")
    return getattr(diffusers, name)(**options)


def start(scheduler, steps=STEPS):
    """Set the timesteps as a pipeline would, with what this configuration asks for."""
    extra = {}
    if scheduler.config.get("use_dynamic_shifting"):
        extra["mu"] = 0.8
    if isinstance(scheduler, diffusers.HeliosScheduler):
        extra["stage_index"] = 0
    if isinstance(scheduler, diffusers.SCMScheduler):
        extra["intermediate_timesteps"] = None
    scheduler.set_timesteps(steps, **extra)
    whole = isinstance(scheduler, (diffusers.SCMScheduler, diffusers.DDPMWuerstchenScheduler))
    return scheduler.timesteps[:-1] if whole else scheduler.timesteps


def for_step(scheduler, timestep):
    return timestep.expand(SHAPE[0]) if isinstance(scheduler, diffusers.DDPMWuerstchenScheduler) else timestep


def model(x, timestep):
    """A smooth affine function of the sample, whose coefficients depend on the timestep."""
    t = float(timestep)
    grid = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return 0.3 * math.cos(0.01 * t) * x + 0.5 * torch.sin(3 * grid + 0.01 * t)


def scaled(scheduler, x, timestep):
    return x if isinstance(scheduler, levels.FLOW) else scheduler.scale_model_input(x, timestep)


def initial(scheduler, dtype):
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x if isinstance(scheduler, levels.FLOW) else (x * scheduler.init_noise_sigma).to(dtype)


def precise(scheduler):
    """Widen the scheduler's tables, so that its own arithmetic is in float64 too."""
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if name in vars(scheduler):
            setattr(scheduler, name, vars(scheduler)[name].double())


def stock_step(scheduler, output, timestep, x):
    """The scheduler's own step, with nothing random in it where it can be asked for."""
    parameters = inspect.signature(scheduler.step).parameters
    arguments = dict(model_output=output, timestep=timestep, sample=x, return_dict=False)
    if "generator" in parameters:
        arguments["generator"] = torch.Generator().manual_seed(1)
    if isinstance(scheduler, diffusers.TCDScheduler):
        arguments["eta"] = 0.0
    if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
        arguments |= dict(old_pred_original_sample=None, timestep_back=None)
    return scheduler.step(**arguments)[0]


def deterministic_step(scheduler, output, timestep, x):
    """Ours with the noise off."""
    step = read(scheduler, timestep, position(scheduler, timestep))
    clean, noise = clean_and_noise(step, output, x)
    advance(scheduler, timestep)
    return (step.next.alpha * clean + step.next.sigma * noise).to(x)


def run(scheduler, stepper, dtype):
    """States before the steps that change the sample, the model's inputs there, and the last state."""
    states, inputs, timesteps = [], [], start(scheduler)
    if dtype == torch.float64:
        precise(scheduler)
    x = initial(scheduler, dtype)
    for timestep in timesteps:
        x_in, before = scaled(scheduler, x, timestep), x
        x = stepper(scheduler, model(x_in, timestep), for_step(scheduler, timestep), x)
        if not torch.allclose(x, before, rtol=1e-5, atol=1e-6):
            states.append(before)
            inputs.append(x_in)
    return [*states, x], inputs


def relative_error(ours, stock):
    assert len(ours) == len(stock)
    scale = max(x.abs().max() for x in stock)
    return max((a - b).abs().max() for a, b in zip(ours, stock, strict=True)) / scale


@each
def test_noise_off_is_the_stock_first_order_sampler(name, options):
    scheduler = build(name, options)
    quiet(scheduler)
    try:
        stock = first_order(scheduler)
    except NoFirstOrder as reason:
        pytest.skip(str(reason))
    exact = 3e-6 if isinstance(stock, FLOAT32) else 1e-11
    cancels = isinstance(stock, diffusers.DEISMultistepScheduler) and options.get("use_flow_sigmas")
    for dtype, tolerance in ((torch.float32, 1e-4 if cancels else 3e-6), (torch.float64, exact)):
        expected, expected_inputs = run(stock, stock_step, dtype)
        states, inputs = run(scheduler, deterministic_step, dtype)
        assert all(x.isfinite().all() for x in expected)
        assert relative_error(states, expected) < tolerance
        assert relative_error(inputs, expected_inputs) < tolerance
