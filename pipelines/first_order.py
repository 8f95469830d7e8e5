"""The stock scheduler that a policy must equal with its noise off."""

import diffusers
from diffusers import SchedulerMixin

from pipelines import schedulers
from pipelines.schedulers import OFF, require_supported


class NoFirstOrder(ValueError):
    """diffusers has no deterministic first-order sampler with this scheduler's levels and timesteps."""


def first_order(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A new stock scheduler: the deterministic first-order sampler over the same levels, without clipping.

    TCDScheduler is deterministic only with `eta=0` passed to `step`. Two-stage solvers make about twice as many calls as
    the scheduler returned. Raises NoFirstOrder where diffusers has none, Unsupported where no policy can be made.
    """
    require_supported(scheduler)
    if isinstance(scheduler, schedulers.FLOW):
        return _first_order_flow(scheduler)
    if isinstance(scheduler, schedulers.SIGMA_SPACE):
        return _first_order_euler(scheduler)
    if isinstance(scheduler, (*schedulers.EDM, *schedulers.CONVERTING)):
        return _first_order_solver(scheduler)
    return _first_order_preserving(scheduler)


def _rebuilt(kind: type, scheduler: SchedulerMixin, **changes: object) -> SchedulerMixin:
    """`kind` with all options of `scheduler` that it has; `from_config` alone would give `kind` its own defaults back."""
    off = [name for name in OFF if scheduler.config.get(name)]
    options = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    if type(scheduler) is not kind:
        # With its class named, options that only the other class has are dropped in silence.
        options["_class_name"] = type(scheduler).__name__
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
        raise NoFirstOrder(
            f"{type(scheduler).__name__} with use_karras_sigmas rounds its timesteps and EulerDiscrete does not"
        )
    return _rebuilt(diffusers.EulerDiscreteScheduler, scheduler)


def _first_order_solver(scheduler: SchedulerMixin) -> SchedulerMixin:
    if isinstance(scheduler, diffusers.CosineDPMSolverMultistepScheduler):
        raise NoFirstOrder(
            "CosineDPMSolverMultistepScheduler is always stochastic, and no other class has its timesteps"
        )
    if isinstance(scheduler, diffusers.EDMEulerScheduler):
        return _rebuilt(diffusers.EDMEulerScheduler, scheduler)
    if isinstance(scheduler, diffusers.UniPCMultistepScheduler):
        never = list(range(scheduler.config.num_train_timesteps))
        # bh1 is not finite at sigma 0; at first order the two types are the same.
        order = {"solver_order": 1, "solver_type": "bh2"}
        return _rebuilt(type(scheduler), scheduler, disable_corrector=never, solver_p=None, **order)
    if isinstance(scheduler, diffusers.DEISMultistepScheduler):
        return _rebuilt(type(scheduler), scheduler, solver_order=1)
    if not isinstance(scheduler, diffusers.SASolverScheduler):  # all DPM-Solvers are the same at first order
        return _rebuilt(type(scheduler), scheduler, solver_order=1, algorithm_type="dpmsolver++")
    if scheduler.config.use_flow_sigmas:
        raise NoFirstOrder(
            "SASolverScheduler with use_flow_sigmas repeats its last level and DPMSolverMultistep does not"
        )
    # SASolver's own corrector cannot be switched off.
    order = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "sigma_min"}
    return _rebuilt(diffusers.DPMSolverMultistepScheduler, scheduler, **order)


def _first_order_preserving(scheduler: SchedulerMixin) -> SchedulerMixin:
    if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
        return _rebuilt(diffusers.CogVideoXDDIMScheduler, scheduler)
    if isinstance(scheduler, diffusers.PNDMScheduler):
        # PNDM has no `clip_sample`, and DDIM's default is True.
        return _rebuilt(diffusers.DDIMScheduler, scheduler, clip_sample=False)
    if isinstance(scheduler, (*schedulers.STRIDED, diffusers.TCDScheduler)):
        return _rebuilt(type(scheduler), scheduler)
    if isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler)) and _is_strided(scheduler):
        betas = {"trained_betas": scheduler.betas.tolist(), "rescale_betas_zero_snr": False, "set_alpha_to_one": True}
        return _rebuilt(diffusers.DDIMScheduler, scheduler, **betas)
    raise NoFirstOrder(
        f"no deterministic scheduler of diffusers has the timesteps and levels of {type(scheduler).__name__}"
    )


def _is_strided(scheduler: SchedulerMixin) -> bool:
    """Whether DDPM's next timestep is t - T // N, where DDIM goes; trailing ones depend on the number of steps in force."""
    if scheduler.custom_timesteps or scheduler.config.timestep_spacing == "linspace":
        return False
    if scheduler.config.timestep_spacing == "leading":
        return True
    steps = scheduler.num_inference_steps
    return steps is not None and scheduler.config.num_train_timesteps % steps == 0
