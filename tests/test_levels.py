"""Levels of every scheduler class of diffusers, against the stock samplers, `add_noise` and an exact Gaussian denoiser."""

import inspect
import math
import sys

import diffusers
import pytest
import torch
from diffusers import schedulers

from mmgrpo.transitions import Level
from pipelines import schedulers as ours_by_kind
from pipelines.first_order import NoFirstOrder, first_order
from pipelines.levels import Unsupported, clean_and_noise, read
from pipelines.schedulers import (
    REASONS,
    advance,
    is_scheduler,
    position,
    quiet,
    require_supported,
    state_dtype,
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
        dict(
            timestep_type="continuous",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            sigma_min=0.02,
            sigma_max=700.0,
        ),
    ],
    "EulerAncestralDiscreteScheduler": [*PREDICTIONS[:2], *SPACINGS, ZERO_SNR],
    "LMSDiscreteScheduler": [*PREDICTIONS, *SPACINGS, *TABLES[:2]],
    "HeunDiscreteScheduler": [*PREDICTIONS, *SPACINGS, *TABLES[:2], dict(clip_sample=True)],
    "KDPM2DiscreteScheduler": [dict(num_train_timesteps=200), dict(num_train_timesteps=200, **TABLES[0])],
    "KDPM2AncestralDiscreteScheduler": [dict(num_train_timesteps=200, prediction_type="v_prediction", **SPACINGS[0])],
    "DPMSolverSDEScheduler": [*PREDICTIONS[:2], *SPACINGS, *TABLES[:2]],
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
    return scheduler.scale_model_input(x, timestep) if "scale_model_input" in dir(scheduler) else x


def initial(scheduler, dtype):
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x if isinstance(scheduler, ours_by_kind.FLOW) else (x * scheduler.init_noise_sigma).to(dtype)


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


def test_every_scheduler_class_is_supported_or_refused_with_a_reason():
    names = {name for group in schedulers._import_structure.values() for name in group if name.endswith("Scheduler")}
    supported = {kind.__name__ for kind in ours_by_kind.SUPPORTED}
    assert supported == set(VARIANTS)
    assert names <= supported | set(REASONS) and not supported & set(REASONS)  # some need torchsde to be listed


def test_a_refused_class_is_named_with_its_reason():
    token, inverse = diffusers.AmusedScheduler(mask_token_id=7), diffusers.DDIMInverseScheduler()
    for scheduler, words in ((token, "AmusedScheduler decides discrete tokens"), (inverse, "runs from data to noise")):
        with pytest.raises(Unsupported, match=words):
            require_supported(scheduler)
        with pytest.raises(Unsupported, match=type(scheduler).__name__):
            read(scheduler, torch.tensor(0))
        with pytest.raises(Unsupported, match=words):
            first_order(scheduler)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_counters_move_as_in_the_stock_class(name):
    def counts(stepper):
        scheduler = build(name, VARIANTS[name][0])
        timesteps = start(scheduler)
        x = initial(scheduler, torch.float32)
        for timestep in timesteps:
            output = model(scaled(scheduler, x, timestep), timestep)
            x = stepper(scheduler, output, for_step(scheduler, timestep), x)
            yield vars(scheduler).get("_step_index"), vars(scheduler).get("counter")

    ours, stock = list(counts(deterministic_step)), list(counts(stock_step))
    assert ours == stock
    assert (ours[-1][0] is None) == (name in {kind.__name__ for kind in ours_by_kind.WITHOUT_INDEX})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_the_next_sample_has_the_dtype_of_the_stock_class(name, kinds):
    scheduler = build(name, VARIANTS[name][0])
    timestep = start(scheduler)[0]
    x = initial(scheduler, torch.float32).to(kinds[0])
    output = model(scaled(scheduler, x, timestep), timestep).to(kinds[1])
    found = state_dtype(scheduler, x, output)
    assert found == stock_step(scheduler, output, for_step(scheduler, timestep), x).dtype


STRIDED = {kind.__name__ for kind in ours_by_kind.STRIDED}
LEAPS = ("trailing", "linspace")  # where t - T // N is not the next timestep


@each
def test_the_current_level_is_what_the_scheduler_adds_noise_with(name, options):
    scheduler = build(name, options)
    adding = {method for method in ("add_noise", "scale_noise") if method in dir(scheduler)}
    inverted = options.get("invert_sigmas")  # stock scale_noise then mixes the wrong way round
    # SASolver adds noise by the VP timestep, whatever its table says.
    unlike = name == "SASolverScheduler" and (options in TABLES or options == FLOW)
    if not adding or inverted or unlike or "LTX" in name:
        pytest.skip("this class cannot add noise at its steps' levels")
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    for timestep in start(scheduler):
        step = read(scheduler, timestep, position(scheduler, timestep))
        if step.now != step.next and (scheduler.timesteps == timestep).sum() == 1:
            place = timestep.reshape(1)
            if "add_noise" in adding:
                alpha, sigma = scheduler.add_noise(one, zero, place), scheduler.add_noise(zero, one, place)
            else:
                alpha, sigma = scheduler.scale_noise(one, place, zero), scheduler.scale_noise(zero, place, one)
            assert alpha.item() == pytest.approx(float(step.now.alpha), rel=2e-5, abs=1e-6)
            assert sigma.item() == pytest.approx(float(step.now.sigma), rel=2e-5, abs=1e-6)
        advance(scheduler, timestep)


@each
def test_a_step_ends_where_the_next_one_begins(name, options):
    scheduler = build(name, options)
    steps = []
    for timestep in start(scheduler):
        steps.append(read(scheduler, timestep, position(scheduler, timestep)))
        advance(scheduler, timestep)
    assert all(step.second == steps[0].next for step in steps)
    moves = [step for step in steps if step.now != step.next]
    gaps = [
        abs(float(p - q)) for a, b in zip(moves, moves[1:], strict=False) for p, q in zip(a.next, b.now, strict=True)
    ]
    if name in STRIDED and options.get("timestep_spacing") in LEAPS:
        assert max(gaps) > 1e-5
    else:  # consistency models add less noise than the model is told, by sigma_min
        assert max(gaps) < (2e-3 if name == "CMStochasticIterativeScheduler" else 1e-12)


def output_of(kind, x, clean, noise, level, scheduler):
    """The output of a perfect model, written out for each parameterisation."""
    a, s = level
    if kind == "velocity":
        return noise - clean
    if kind == "negative_velocity":
        return clean - noise
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return (a * noise - s * clean) / (a**2 + s**2) ** 0.5
    sigma_data = scheduler.config.sigma_data
    if kind == "trigflow":
        return a * sigma_data * noise - s / sigma_data * clean
    assert kind == "edm"
    sign = -1 if scheduler.config.prediction_type == "v_prediction" else 1
    skip = sigma_data**2 / (s**2 + sigma_data**2)
    return (clean - skip * x) / (sign * s * sigma_data / (s**2 + sigma_data**2) ** 0.5)


def transported(name, options, count, variance=0.25):
    """Final standard deviation over the true one, for data N(0, variance) and its exact denoiser."""
    scheduler = build(name, options)
    ratio, x = None, None
    for timestep in start(scheduler, count):
        step = read(scheduler, timestep, position(scheduler, timestep))
        advance(scheduler, timestep)
        a, s = step.now
        total = a**2 * variance + s**2
        x = total.sqrt().reshape(1, 1) if x is None else x
        clean, noise = a * variance / total * x, s / total * x
        output = output_of(step.prediction.name, x, clean, noise, Level(a, s), scheduler)
        mine = clean_and_noise(step, output, x)
        assert mine[0].item() == pytest.approx(clean.item(), rel=1e-6, abs=1e-9)
        assert mine[1].item() == pytest.approx(noise.item(), rel=1e-6, abs=1e-9)
        x = step.next.alpha * mine[0] + step.next.sigma * mine[1]
        ratio = (x / (step.next.alpha**2 * variance + step.next.sigma**2).sqrt()).item()
    return ratio


EXACT = {  # what each class's model predicts by default, known from its paper and not from our reader
    "FlowMatchEulerDiscreteScheduler": "velocity",
    "MiniMaxH3Scheduler": "negative_velocity",
    "SCMScheduler": "trigflow",
    "IPNDMScheduler": "v_prediction",
    "EDMEulerScheduler": "edm",
    "CosineDPMSolverMultistepScheduler": "edm",
    "DDIMScheduler": "epsilon",
    "EulerDiscreteScheduler": "epsilon",
    "DDPMWuerstchenScheduler": "epsilon",
}


@pytest.mark.parametrize("name", EXACT)
def test_the_default_prediction_is_the_one_of_the_paper(name):
    scheduler = build(name, VARIANTS[name][0])
    timestep = start(scheduler)[0]
    assert read(scheduler, timestep, position(scheduler, timestep)).prediction.name == EXACT[name]


UNLIKE = ("LCMScheduler", "CMStochasticIterativeScheduler")  # their model is not the denoiser
GAUSSIAN = [(name, options) for name in VARIANTS if name not in UNLIKE for options in VARIANTS[name][:2]]
GAUSSIAN += [
    row for row in ROWS if row[1].get("use_flow_sigmas") or row[1].get("invert_sigmas") or "snr" in str(row[1])
]


@pytest.mark.parametrize(("name", "options"), GAUSSIAN, ids=named)
def test_an_exact_denoiser_transports_the_spread_of_the_data(name, options):
    if name == "CosineDPMSolverMultistepScheduler":
        options = dict(options, **SIGMA_MIN)  # a last step from 0.3 to 0 has the same error at any number of steps
    # Divisors of T: elsewhere t - T // N leaves gaps between the steps.
    counts = (8, 25) if "KDPM2" in name else (10, 50)
    coarse, fine = (abs(transported(name, options, count) - 1) for count in counts)
    assert fine < 0.5 * coarse + 2e-3


def one_draw(scheduler, monkeypatch, value):
    """Let the stock step draw `value` everywhere."""
    module = sys.modules[type(scheduler).__module__]
    if isinstance(scheduler, diffusers.CosineDPMSolverMultistepScheduler):
        scheduler.noise_sampler = lambda *_: torch.tensor(value)
    elif "randn_tensor" in vars(module):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.full(tuple(shape), value))


POSTERIOR = ("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler", "DDPMWuerstchenScheduler")
POSTERIOR += ("CosineDPMSolverMultistepScheduler",)
REPEATED = dict(
    final_sigmas_type="sigma_min"
)  # Cosine's last level then lies above the one before, and stock gives NaN
FRESH = ("LCMScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler", "SCMScheduler")
NOISY = [row for row in ROWS if row[0] in (*POSTERIOR, *FRESH, "IPNDMScheduler") and row[1] != REPEATED]


@pytest.mark.parametrize(("name", "options"), NOISY, ids=named)
def test_a_noisy_stock_step_is_the_kernel_of_its_family_at_our_levels(name, options, monkeypatch):
    """Ancestral steps: mean alpha' data + alpha / alpha' sigma'^2 / sigma noise; consistency steps: alpha' data + sigma' z."""
    scheduler = build(name, options)
    quiet(scheduler)
    timesteps = start(scheduler)
    precise(scheduler)
    if name == "UnCLIPScheduler":  # its float32 betas differ from its cumulative products by 1e-3 where beta is small
        before = torch.cat([torch.ones(1), scheduler.alphas_cumprod[:-1]])
        scheduler.alphas, scheduler.betas = scheduler.alphas_cumprod / before, 1 - scheduler.alphas_cumprod / before
    x = initial(scheduler, torch.float64)
    for number, timestep in enumerate(timesteps):
        output = model(scaled(scheduler, x, timestep), timestep)
        step = read(scheduler, for_step(scheduler, timestep), position(scheduler, timestep))
        clean, noise = clean_and_noise(step, output, x)
        extra = {"generator": None} if "generator" in inspect.signature(scheduler.step).parameters else {}
        if name == "UnCLIPScheduler":  # by default stock steps to t - 1, and pipelines name the next timestep
            extra["prev_timestep"] = timesteps[number + 1] if number + 1 < len(timesteps) else None
        if options.get("variance_type") == "learned_range":
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
            assert torch.equal(clean_and_noise(step, output, x)[0], clean)
        if name == "IPNDMScheduler":
            scheduler.ets, kept = [], step.next.sigma  # without a history it is first-order
            # At alpha 0, the first step, stock divides 0 by 1e-8 and takes 0 for the data.
            clean = clean if number else torch.zeros_like(x)
        elif name in POSTERIOR:
            kept = step.now.alpha / step.next.alpha * step.next.sigma**2 / step.now.sigma
            scheduler.lower_order_nums = 0
        else:
            kept = torch.zeros(())
        expected, index = step.next.alpha * clean + kept * noise, vars(scheduler).get("_step_index")
        arguments = (output, for_step(scheduler, timestep), x)
        one_draw(scheduler, monkeypatch, 0.0)
        mean = scheduler.step(*arguments, **extra, return_dict=False)[0]
        assert (mean - expected).abs().max() < 3e-6 * max(expected.abs().max(), x.abs().max())
        if name in FRESH:
            scheduler._step_index = index
            one_draw(scheduler, monkeypatch, 1.0)
            std = scheduler.step(*arguments, **extra, return_dict=False)[0] - mean
            assert (std - step.next.sigma).abs().max() < 3e-6 * x.abs().max()
        x = mean


def test_tokens_with_their_own_timesteps_step_as_in_the_stock_class():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for t in start(scheduler):
        caps = torch.tensor([[0.0, 1000.0, 700.0, 333.0, 1.0], [500.0, 1000.0, 1000.0, 0.0, 20.0]])
        tokens = torch.minimum(t.expand(2, 5), caps)  # (B, T): conditioning tokens are held at lower noise
        output = model(x, t)
        step = read(scheduler, t, position(scheduler, t), per_token_timesteps=tokens)
        clean, noise = clean_and_noise(step, output, x)
        ours = step.next.alpha * clean + step.next.sigma * noise
        stock = scheduler.step(output, t, x, per_token_timesteps=tokens, return_dict=False)[0]
        assert step.now.sigma.shape == (2, 5, 1)
        assert (ours - stock).abs().max() < 3e-6
        assert torch.equal(step.now.sigma[0, 0], step.next.sigma[0, 0])  # timestep 0: the token stays
        assert float(step.second.sigma) == float(scheduler.sigmas[1])
        x = stock
    with pytest.raises(Unsupported, match="UniPCMultistepScheduler has no per-token timesteps"):
        read(diffusers.UniPCMultistepScheduler(), t, 0, per_token_timesteps=tokens)


def test_sigmas_above_one_in_a_flow_class_are_a_variance_exploding_process():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[80.0, 20.0, 3.0, 0.6, 0.1])
    x = 80 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        step = read(scheduler, t, position(scheduler, t))
        assert float(step.now.alpha) == 1 and step.prediction.name == "epsilon"
        clean, noise = clean_and_noise(step, model(x / (1 + step.now.sigma), t), x)
        stock = scheduler.step(noise, t, x, return_dict=False)[0]
        assert (step.next.alpha * clean + step.next.sigma * noise - stock).abs().max() < 3e-6 * 80
        x = stock


@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_a_last_level_repeated_with_other_rounding_is_the_same_level(name):
    scheduler = build(name, dict(sigma_schedule="exponential", **SIGMA_MIN))
    last = start(scheduler)[-1]
    step = read(scheduler, last, STEPS - 1)
    assert step.next is step.now
    assert read(scheduler, last, STEPS - 2).now.sigma > step.now.sigma


def test_explicit_sigmas_of_ltx_end_with_a_call_that_changes_nothing():
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3, 0.0])
    steps = []
    for t in scheduler.timesteps:
        steps.append(read(scheduler, t, position(scheduler, t)))
        advance(scheduler, t)
    assert len(steps) == 4 and steps[3].now == steps[3].next == steps[2].next
    assert scheduler._step_index == 3


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_a_schedule_begun_in_the_middle_is_read_from_there(name):
    scheduler = build(name, {})
    timesteps = start(scheduler)
    begin = 2 * scheduler.order
    scheduler.set_begin_index(begin)
    step = read(scheduler, timesteps[begin], position(scheduler, timesteps[begin]))
    assert scheduler.step_index == begin
    fresh = build(name, {})
    start(fresh)
    assert step.now == read(fresh, timesteps[begin], begin).now
    assert step.second == read(fresh, timesteps[0], 0).next


def test_a_prediction_formed_by_the_pipeline_replaces_the_models():
    scheduler = diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min")
    x = 80 * torch.ones(SHAPE)
    t = start(scheduler)[0]
    scheduler.scale_model_input(x, t)
    step = read(scheduler, t, position(scheduler, t))
    mine, given = torch.full(SHAPE, 0.3), torch.full(SHAPE, -0.2)
    clean, noise = clean_and_noise(step, mine, x, clean=given)
    stock = scheduler.step(mine, t, x, return_dict=False, pred_original_sample=given)[0]
    assert torch.equal(clean, given)
    assert (step.next.alpha * clean + step.next.sigma * noise - stock).abs().max() < 3e-6 * 80


def test_predictions_are_float32_at_least_and_carry_gradient():
    scheduler = diffusers.DDIMScheduler()
    step = read(scheduler, start(scheduler)[1])
    output = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)
    clean, noise = clean_and_noise(step, output, torch.randn(SHAPE, dtype=torch.bfloat16))
    assert clean.dtype == noise.dtype == torch.float32
    (slope,) = torch.autograd.grad(clean.sum(), output)
    assert slope.float().mean().item() == pytest.approx(float(-step.now.sigma / step.now.alpha), rel=1e-2)


@pytest.mark.parametrize("shape", [(2, 4, 3, 1), (2, 12, 3, 3), (1, 4, 3, 3), (2,)])
def test_an_output_of_another_shape_is_refused_and_not_broadcast(shape):
    scheduler = diffusers.DDIMScheduler()
    step = read(scheduler, start(scheduler)[0])
    with pytest.raises(ValueError, match="model_output has shape"):
        clean_and_noise(step, torch.zeros(shape), torch.zeros(SHAPE))


def test_what_a_gaussian_step_must_not_have_is_switched_off_and_told():
    scheduler = diffusers.DDIMScheduler(thresholding=True)
    notes = quiet(scheduler)
    assert len(notes) == 2 and all("DDIMScheduler: " in note and "switched off" in note for note in notes)
    assert scheduler.config.clip_sample is False and scheduler.config.thresholding is False
    assert quiet(scheduler) == []
    assert quiet(diffusers.CogVideoXDDIMScheduler()) == []  # says clip_sample=True and never clips
    flow = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert "the policy draws the noise" in quiet(flow)[0] and flow.config.stochastic_sampling is False


def test_configurations_without_a_meaning_are_refused():
    silent = diffusers.DDIMScheduler(prediction_type="epsilon", **ZERO_SNR)
    with pytest.raises(ValueError, match="'epsilon' says nothing about the data at alpha 0"):
        read(silent, start(silent)[0])
    lying = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="needs use_flow_sigmas=True"):
        read(lying, start(lying)[0], 0)
    growing = diffusers.FlowMatchLCMScheduler(scale_factors=[0.5, 0.75], upscale_mode="bicubic")
    with pytest.raises(Unsupported, match="changes the sample's size"):
        require_supported(growing)
    past = diffusers.EulerDiscreteScheduler()
    start(past)
    with pytest.raises(ValueError, match="step index 7 is outside the schedule's 7 steps"):
        read(past, past.timesteps[0], 7)


def test_only_components_that_step_are_schedulers():
    assert is_scheduler(diffusers.DDIMScheduler()) and is_scheduler(diffusers.AmusedScheduler(mask_token_id=1))
    assert not is_scheduler(torch.optim.SGD([torch.zeros(1)])) and not is_scheduler(diffusers.ScoreSdeVeScheduler())


def test_the_first_order_scheduler_keeps_options_that_the_other_class_sets_otherwise():
    heun, pndm = diffusers.HeunDiscreteScheduler(), diffusers.PNDMScheduler()
    assert (
        first_order(heun).config.beta_start == heun.config.beta_start == 0.00085
    )  # EulerDiscrete's own default is 0.0001
    assert first_order(pndm).config.set_alpha_to_one is False  # DDIM's own default is True
    shifted = diffusers.FlowMatchEulerDiscreteScheduler()
    shifted.set_shift(4.0)
    assert first_order(shifted).shift == 4.0
