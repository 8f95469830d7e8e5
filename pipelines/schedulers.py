"""diffusers schedulers as the policies handle them: which are supported, their bookkeeping, and their first-order form."""

from typing import Protocol, runtime_checkable

import diffusers
from diffusers import SchedulerMixin
from torch import Tensor

from pipelines import levels
from pipelines.levels import Unsupported

_TOKENS = "decides discrete tokens: it needs a categorical kernel, not a Gaussian one"
_INVERSE = "runs from data to noise: it inverts an image and generates nothing"
_NO_STEP = "has no `step`: its predictor and corrector are called apart"
REASONS = {  # why a class of diffusers has no reader
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "ConsistencyDecoderScheduler": "belongs to a decoder of latents, whose two steps always run to the end",
    "HeliosDMDScheduler": "takes the noise and the levels of a step as arguments of `step`, not from its schedule",
    "KarrasVeScheduler": "adds noise outside of `step`, which takes the two levels as arguments",
    "PiflowScheduler": "integrates a policy that the model's output describes: there is no prediction at the step's level",
    "RePaintScheduler": "mixes the known image into its step and jumps back in time",
    "RFD4ProteinaScheduler": "masks atoms and rescales the score inside its step",
    "ScoreSdeVeScheduler": _NO_STEP,
    "ScoreSdeVpScheduler": _NO_STEP,
}

_UNCLIPPED = (  # carry `clip_sample` and ignore it
    diffusers.CogVideoXDDIMScheduler,
    diffusers.CogVideoXDPMScheduler,
    diffusers.TCDScheduler,
)
_OFF = {  # options that a Gaussian step must not have, and why
    "clip_sample": "clipping the predicted data stops gradients where it saturates",
    "thresholding": "thresholding the predicted data stops gradients where it saturates",
    "clip_denoised": "clipping the predicted data stops gradients where it saturates",
    "stochastic_sampling": "the policy draws the noise",
}


class NoFirstOrder(ValueError):
    """diffusers has no deterministic first-order sampler with this scheduler's levels and timesteps, for the reason given."""


@runtime_checkable
class Stepping(Protocol):
    """What a pipeline calls on a scheduler."""

    def set_timesteps(self, num_inference_steps: int) -> None: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> object: ...


def is_scheduler(component: object) -> bool:
    """Whether a pipeline's component steps samples; a SchedulerMixin alone may be a config holder (the `Mel` of audio)."""
    return isinstance(component, SchedulerMixin) and isinstance(component, Stepping)


def require_supported(scheduler: SchedulerMixin) -> None:
    """Raise Unsupported with the reason if no policy can be made of this scheduler."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, levels.SUPPORTED):
        raise Unsupported(f"{name} {REASONS.get(name, 'is not a scheduler whose noise levels are known')}")
    if isinstance(scheduler, diffusers.FlowMatchLCMScheduler) and scheduler._scale_factors:
        raise Unsupported(f"{name} with scale_factors changes the sample's size inside a step: expected none")
    if isinstance(scheduler, diffusers.HeliosScheduler) and scheduler.config.scheduler_type == "dmd":
        raise Unsupported(f"{name} with scheduler_type 'dmd' has no step: expected 'euler' or 'unipc'")


def quiet(scheduler: SchedulerMixin) -> list[str]:
    """Switch off what a Gaussian step must not have, in the scheduler's config; one line for each thing switched off."""
    clips = not isinstance(scheduler, _UNCLIPPED)
    on = [name for name in _OFF if scheduler.config.get(name) and (clips or name != "clip_sample")]
    scheduler.register_to_config(**dict.fromkeys(on, False))
    return [f"{type(scheduler).__name__}: {name} switched off ({_OFF[name]})" for name in on]


def position(scheduler: SchedulerMixin, timestep: Tensor | float) -> int | None:
    """The index of the step that stock `step(..., timestep, ...)` takes now, set as it sets it; None for classes without."""
    if not isinstance(scheduler, levels.INDEXED):
        return None
    if scheduler._step_index is None:
        _start(scheduler, timestep)
    if isinstance(scheduler, diffusers.FlowMapEulerDiscreteScheduler):  # goes by the timestep and only counts the steps
        index: int | None = scheduler.index_for_timestep(timestep)
        if index is None:
            raise ValueError(f"timestep {float(timestep)} is not on the schedule of {type(scheduler).__name__}")
        return index
    return int(scheduler._step_index)


def _start(scheduler: SchedulerMixin, timestep: Tensor | float) -> None:
    if isinstance(scheduler, diffusers.HeliosScheduler):
        scheduler._step_index = 0
    elif isinstance(scheduler, diffusers.MiniMaxH3Scheduler):
        begin = scheduler._begin_index
        scheduler._step_index = scheduler.index_for_timestep(timestep) if begin is None else begin
    else:
        scheduler._init_step_index(timestep)


def advance(scheduler: SchedulerMixin, timestep: Tensor | float) -> None:
    """Count one step as stock `step` does.

    Two-stage solvers stay in their first stage, so that the model's second input is scaled like the first (it is not used),
    and multistep solvers keep no history.
    """
    if isinstance(scheduler, diffusers.PNDMScheduler):
        scheduler.counter += 1
    if position(scheduler, timestep) is None:
        return
    scheduler._step_index += 1
    if isinstance(scheduler, diffusers.LTXEulerAncestralRFScheduler):
        scheduler._step_index = min(scheduler._step_index, len(scheduler.sigmas) - 1)


def first_order(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A new stock scheduler: the deterministic first-order sampler over the same levels, without clipping.

    TCDScheduler is deterministic only with `eta=0` passed to `step`. Two-stage solvers make about twice as many calls as the
    scheduler returned. Raises NoFirstOrder where diffusers has none, Unsupported where there are no levels.
    """
    require_supported(scheduler)
    if isinstance(scheduler, levels.FLOW):
        return _first_order_flow(scheduler)
    if isinstance(scheduler, levels.SIGMA_SPACE):
        return _first_order_euler(scheduler)
    if isinstance(scheduler, (*levels.EDM, *levels.CONVERTING)):
        return _first_order_solver(scheduler)
    return _first_order_preserving(scheduler)


def _rebuilt(kind: type, scheduler: SchedulerMixin, **changes: object) -> SchedulerMixin:
    """`kind` with all options of `scheduler` that it has; `from_config` alone would give `kind` its own defaults back."""
    off = [name for name in _OFF if scheduler.config.get(name)]
    options = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    if type(scheduler) is not kind:
        options["_class_name"] = type(scheduler).__name__  # options that only the other class has are dropped in silence
    return kind.from_config({**options, **dict.fromkeys(off, False), **changes})  # type: ignore[attr-defined]


def _first_order_flow(scheduler: SchedulerMixin) -> SchedulerMixin:
    if isinstance(scheduler, diffusers.HeliosScheduler):
        return _rebuilt(diffusers.HeliosScheduler, scheduler, scheduler_type="euler")
    if isinstance(scheduler, (diffusers.FlowMapEulerDiscreteScheduler, diffusers.MiniMaxH3Scheduler)):
        return _rebuilt(type(scheduler), scheduler)
    euler = _rebuilt(diffusers.FlowMatchEulerDiscreteScheduler, scheduler)
    if isinstance(scheduler, (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchLCMScheduler)):
        euler.set_shift(scheduler.shift)
    return euler


def _first_order_euler(scheduler: SchedulerMixin) -> SchedulerMixin:
    rounding = isinstance(scheduler, (diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler))
    if rounding and scheduler.config.use_karras_sigmas:
        raise NoFirstOrder(f"{type(scheduler).__name__} with use_karras_sigmas rounds its timesteps and EulerDiscrete does not")
    return _rebuilt(diffusers.EulerDiscreteScheduler, scheduler)


def _first_order_solver(scheduler: SchedulerMixin) -> SchedulerMixin:
    if isinstance(scheduler, diffusers.CosineDPMSolverMultistepScheduler):
        raise NoFirstOrder("CosineDPMSolverMultistepScheduler is always stochastic, and no other class has its timesteps")
    if isinstance(scheduler, diffusers.EDMEulerScheduler):
        return _rebuilt(diffusers.EDMEulerScheduler, scheduler)
    if isinstance(scheduler, diffusers.UniPCMultistepScheduler):
        never = list(range(scheduler.config.num_train_timesteps))
        order = {"solver_order": 1, "solver_type": "bh2"}  # bh1 is not finite at sigma 0; at first order they are the same
        return _rebuilt(type(scheduler), scheduler, disable_corrector=never, solver_p=None, **order)
    if isinstance(scheduler, diffusers.DEISMultistepScheduler):
        return _rebuilt(type(scheduler), scheduler, solver_order=1)
    if not isinstance(scheduler, diffusers.SASolverScheduler):  # all DPM-Solvers are the same at first order
        return _rebuilt(type(scheduler), scheduler, solver_order=1, algorithm_type="dpmsolver++")
    if scheduler.config.use_flow_sigmas:
        raise NoFirstOrder("SASolverScheduler with use_flow_sigmas repeats its last level and DPMSolverMultistep does not")
    order = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "sigma_min"}
    return _rebuilt(diffusers.DPMSolverMultistepScheduler, scheduler, **order)  # its own corrector cannot be switched off


def _first_order_preserving(scheduler: SchedulerMixin) -> SchedulerMixin:
    if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
        return _rebuilt(diffusers.CogVideoXDDIMScheduler, scheduler)
    if isinstance(scheduler, diffusers.PNDMScheduler):
        return _rebuilt(diffusers.DDIMScheduler, scheduler, clip_sample=False)  # PNDM has no such option, DDIM's default is True
    if isinstance(scheduler, (*levels.STRIDED, diffusers.TCDScheduler)):
        return _rebuilt(type(scheduler), scheduler)
    if isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler)) and _is_strided(scheduler):
        betas = {"trained_betas": scheduler.betas.tolist(), "rescale_betas_zero_snr": False, "set_alpha_to_one": True}
        return _rebuilt(diffusers.DDIMScheduler, scheduler, **betas)
    raise NoFirstOrder(f"no deterministic scheduler of diffusers has the timesteps and levels of {type(scheduler).__name__}")


def _is_strided(scheduler: SchedulerMixin) -> bool:
    """Whether DDPM's next timestep is t - T // N, where DDIM goes; trailing ones depend on the number of steps in force."""
    if scheduler.custom_timesteps or scheduler.config.timestep_spacing == "linspace":
        return False
    if scheduler.config.timestep_spacing == "leading":
        return True
    steps = scheduler.num_inference_steps
    return steps is not None and scheduler.config.num_train_timesteps % steps == 0
