"""Noise levels of any diffusers scheduler at any of its steps.

Readers: a flow table, sigma space (also preconditioned), classes that convert their sigmas, `alphas_cumprod`, and the few
with a schedule of their own. All read the tables that the sampler reads: its configuration may say otherwise.
Solvers that evaluate the model twice per step (Heun, KDPM2, PNDM, DPM-Solver SDE) become first-order: the second call is
a step from a level to itself. Axes: B samples, T tokens, C channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.transitions import Level
from pipelines import predictions, schedulers
from pipelines.predictions import Prediction
from pipelines.schedulers import Unsupported


class Levels(NamedTuple):
    """One step; scalars are float64 on the CPU, per-token levels (B, T, 1) float32 on the timesteps' device."""

    now: Level
    next: Level
    second: Level  # after the first step of the whole schedule: what replaces t = 1 in the Flow-SDE (flow.md S.2)
    prediction: Prediction


def read(
    scheduler: SchedulerMixin,
    timestep: Tensor | float,
    index: int | None = None,
    per_token_timesteps: Tensor | None = None,
) -> Levels:
    """Levels of the step that stock `step(..., timestep, ...)` would take now.

    `index` is `schedulers.position(scheduler, timestep)`; None for classes that go by the timestep alone.
    `per_token_timesteps` (B, T) is the argument of that name of FlowMatchEulerDiscreteScheduler.step. Raises Unsupported for
    a class without a reader, ValueError for a configuration without a meaning or an index outside the schedule.
    """
    if per_token_timesteps is not None:
        return _flow_per_token(scheduler, per_token_timesteps)
    for classes, reader in READERS:
        if isinstance(scheduler, classes):
            return reader(scheduler, index if isinstance(scheduler, schedulers.INDEXED) else timestep)
    raise Unsupported(f"{type(scheduler).__name__} has no noise levels that can be read")


def clean_and_noise(
    levels: Levels, model_output: Tensor, sample: Tensor, clean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Predicted data and noise in the sample's units, at least float32, differentiable; (B, C, ...) each.

    An output of 2C channels carries a learned variance in its second half, which is left out. `clean` is a prediction that
    the pipeline formed itself (`pred_original_sample` of EDMEulerScheduler.step). Raises ValueError if the shapes disagree.
    """
    dtype = torch.promote_types(torch.promote_types(sample.dtype, model_output.dtype), torch.float32)
    x, output = sample.to(dtype), (model_output if clean is None else clean).to(dtype)
    if output.shape != x.shape and output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if output.shape != x.shape:
        raise ValueError(f"model_output has shape {tuple(model_output.shape)}: expected the sample's {tuple(x.shape)}")
    prediction = levels.prediction if clean is None else predictions.data(levels.now)
    return _weighted(prediction.clean, x, output), _weighted(prediction.noise, x, output)


def _weighted(weights: predictions.Weights, x: Tensor, output: Tensor) -> Tensor:
    return weights[0].to(x) * x + weights[1].to(x) * output


def _table(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _along(
    table: Tensor, level: Callable[[Tensor], Level], index: int | None, meaning: Callable[[Level], Prediction]
) -> Levels:
    """The step from entry `index` of a table of sigmas to the next one."""
    if index is None or not 0 <= index < len(table) - 1:
        raise ValueError(f"step index {index} is outside the schedule's {len(table) - 1} steps")
    here, there = table[index], table[index + 1]
    same = torch.isclose(here, there, rtol=1e-6, atol=0)  # a last level repeated with other rounding could lie above
    now = level(here)
    return Levels(now, now if same else level(there), level(table[1]), meaning(now))


def _flow(scheduler: SchedulerMixin, index: int) -> Levels:
    """x = (1 - sigma) data + sigma noise; the direction of the table, not `invert_sigmas`, says which way time runs."""
    sigmas = _table(scheduler.sigmas)
    if isinstance(scheduler, diffusers.LTXEulerAncestralRFScheduler):
        sigmas = torch.cat([sigmas, sigmas[-1:]])  # explicit sigmas come with a call at the last level: nothing changes
    if sigmas[-1] > sigmas[0]:  # time runs from 0 (noise) to 1 (data)
        return _along(sigmas, lambda s: Level(s, 1 - s), index, predictions.negative_velocity)
    if sigmas.max() > 1 + 1e-3:  # a variance-exploding process that borrows the Euler step: its slope is the noise
        return _along(sigmas, _exploding, index, predictions.epsilon)
    against = isinstance(scheduler, diffusers.MiniMaxH3Scheduler)
    return _along(sigmas, _straight, index, predictions.negative_velocity if against else predictions.velocity)


def _straight(sigma: Tensor) -> Level:
    return Level(1 - sigma, sigma)


def _exploding(sigma: Tensor) -> Level:
    return Level(torch.ones_like(sigma), sigma)


def _flow_per_token(scheduler: SchedulerMixin, timesteps: Tensor) -> Levels:
    """Each token steps from its own level to the table's next lower one; the stock step adds, so F = data - noise."""
    if not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        raise Unsupported(f"{type(scheduler).__name__} has no per-token timesteps")
    if timesteps.ndim != 2:
        raise ValueError(f"per_token_timesteps has shape {tuple(timesteps.shape)}: expected (batch, tokens)")
    now = timesteps.detach().float() / scheduler.config.num_train_timesteps  # (B, T)
    table = scheduler.sigmas.detach().to(now)[:, None, None]
    lower = torch.where(table < now - 1e-6, table, 0).amax(0)  # (B, T)
    level = _straight(now[..., None])
    second = _straight(_table(scheduler.sigmas)[1])
    return Levels(level, _straight(lower[..., None]), second, predictions.negative_velocity(level))


def _sigma_space(scheduler: SchedulerMixin, index: int) -> Levels:
    """x = data + sigma noise."""
    kind = scheduler.config.prediction_type
    return _along(_table(scheduler.sigmas), _exploding, index, lambda now: predictions.named(kind, now))


def _edm(scheduler: SchedulerMixin, index: int) -> Levels:
    """x = data + sigma noise behind EDM's preconditioning."""
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    kind, sigma_data = scheduler.config.prediction_type, scheduler.config.sigma_data
    if kind not in signs:
        raise ValueError(
            f"prediction_type {kind!r} has no meaning behind EDM's preconditioning: expected {list(signs)}"
        )
    sigmas = _table(scheduler.sigmas)
    return _along(sigmas, _exploding, index, lambda now: predictions.edm(now, sigma_data, signs[kind]))


def _converting(scheduler: SchedulerMixin, index: int) -> Levels:
    """sigma / alpha is in the table; the class itself says what alpha is (1 - sigma if `use_flow_sigmas`)."""
    kind = scheduler.config.prediction_type
    if kind == "flow_prediction" and not scheduler.config.use_flow_sigmas:
        raise ValueError(
            "prediction_type 'flow_prediction' needs use_flow_sigmas=True: the levels are not those of a flow"
        )
    level = lambda sigma: Level(*scheduler._sigma_to_alpha_sigma_t(sigma))  # noqa: E731
    return _along(_table(scheduler.sigmas), level, index, lambda now: predictions.named(kind, now))


def _preserving(alpha_cumprod: Tensor) -> Level:
    value = _table(alpha_cumprod)
    return Level(value.sqrt(), (1 - value).sqrt())


def _strided(scheduler: SchedulerMixin, timestep: Tensor | float) -> Levels:
    """DDIM's arithmetic: from t to t - T // N, and below 0 to `final_alpha_cumprod`."""
    stride, t = scheduler.config.num_train_timesteps // scheduler.num_inference_steps, int(timestep)
    repeats = isinstance(scheduler, diffusers.PNDMScheduler) and _pndm_repeats(scheduler)
    now = _preserving(scheduler.alphas_cumprod[t])
    after = now if repeats else _cumulative(scheduler, t - stride, scheduler.final_alpha_cumprod)
    second = _cumulative(scheduler, int(scheduler.timesteps[0]) - stride, scheduler.final_alpha_cumprod)
    return Levels(now, after, second, predictions.named(scheduler.config.prediction_type, now))


def _cumulative(scheduler: SchedulerMixin, timestep: int, final: Tensor) -> Level:
    return _preserving(scheduler.alphas_cumprod[timestep] if timestep >= 0 else final)


def _pndm_repeats(scheduler: SchedulerMixin) -> bool:
    """Three of four Runge-Kutta calls, and the second linear-multistep call, correct a step that was already taken."""
    return scheduler.counter % 4 != 0 if scheduler.counter < len(scheduler.prk_timesteps) else scheduler.counter == 1


def _listed(scheduler: SchedulerMixin, timestep: Tensor | float) -> Levels:
    """DDPM: from a timestep to the next of the list, and from the last one to data."""
    t, timesteps = int(timestep), scheduler.timesteps.tolist()
    one = torch.ones(())
    now, after, second = (
        _cumulative(scheduler, (timesteps + [-1])[place], one)
        for place in (timesteps.index(t), timesteps.index(t) + 1, 1)
    )
    return Levels(now, after, second, predictions.named(scheduler.config.prediction_type, now))


def _wuerstchen(scheduler: SchedulerMixin, timestep: Tensor | float) -> Levels:
    """Continuous cosine schedule; `timestep` (B,) in [0, 1], equal in a batch; it ends at alphas_cumprod 0.9999."""
    ratios = _table(scheduler.timesteps)
    index = int((ratios - float(torch.as_tensor(timestep).flatten()[0])).abs().argmin())
    cumulative = scheduler._alpha_cumprod(ratios, ratios.device)
    return _along(cumulative, _preserving, index, predictions.epsilon)


def _latent_consistency(scheduler: SchedulerMixin, index: int) -> Levels:
    """LCM: to the next timestep of the list, and from the last one to data."""
    levels = [_preserving(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps.tolist()]
    levels.append(_preserving(torch.ones(())))
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(int(scheduler.timesteps[index]))
    inner = predictions.named(scheduler.config.prediction_type, levels[index])
    return Levels(levels[index], levels[index + 1], levels[1], predictions.boundary(inner, levels[index], skip, out))


def _trajectory_consistency(scheduler: SchedulerMixin, index: int) -> Levels:
    """TCD: to the next timestep of the list, and from the last one to timestep 0, which is not yet data."""
    cumulative = scheduler.alphas_cumprod[scheduler.timesteps.tolist() + [0]]
    return _along(cumulative, _preserving, index, lambda now: predictions.named(scheduler.config.prediction_type, now))


def _consistency(scheduler: SchedulerMixin, index: int) -> Levels:
    """x = data + sigma noise; a step adds noise of variance sigma'^2 - sigma_min^2 to the predicted data."""
    config, sigmas = scheduler.config, _table(scheduler.sigmas)
    added = (sigmas.clamp(config.sigma_min, config.sigma_max) ** 2 - config.sigma_min**2).clamp(min=0).sqrt()
    now = _exploding(sigmas[index])
    meaning = predictions.consistency(now, config.sigma_data, config.sigma_min)
    return Levels(now, _exploding(added[index + 1]), _exploding(added[1]), meaning)


def _ipndm(scheduler: SchedulerMixin, index: int) -> Levels:
    """The class keeps (alpha, sigma) as `alphas` and `betas`, and its model predicts v."""
    level = lambda sigma: Level((1 - sigma**2).sqrt(), sigma)  # noqa: E731
    return _along(_table(scheduler.betas), level, index, predictions.v_prediction)


def _trigonometric(scheduler: SchedulerMixin, index: int) -> Levels:
    """x = cos(t) data + sin(t) sigma_data noise."""
    angles, sigma_data = _table(scheduler.timesteps), scheduler.config.sigma_data
    level = lambda angle: Level(angle.cos(), angle.sin() * sigma_data)  # noqa: E731
    return _along(angles, level, index, lambda _: predictions.trigflow(angles[index], sigma_data))


READERS: tuple[tuple[tuple[type, ...], Callable[..., Levels]], ...] = (
    (schedulers.FLOW, _flow),
    (schedulers.SIGMA_SPACE, _sigma_space),
    (schedulers.EDM, _edm),
    (schedulers.CONVERTING, _converting),
    (schedulers.STRIDED, _strided),
    (schedulers.LISTED, _listed),
    ((diffusers.DDPMWuerstchenScheduler,), _wuerstchen),
    ((diffusers.LCMScheduler,), _latent_consistency),
    ((diffusers.TCDScheduler,), _trajectory_consistency),
    ((diffusers.CMStochasticIterativeScheduler,), _consistency),
    ((diffusers.IPNDMScheduler,), _ipndm),
    ((diffusers.SCMScheduler,), _trigonometric),
)
