"""diffusers schedulers as the policies handle them: their families, which are supported, and their bookkeeping."""

from typing import Protocol, runtime_checkable

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

FLOW = (
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    diffusers.FlowMatchLCMScheduler,
    diffusers.FlowMapEulerDiscreteScheduler,
    diffusers.LTXEulerAncestralRFScheduler,
    diffusers.MiniMaxH3Scheduler,
    diffusers.HeliosScheduler,
)
SIGMA_SPACE = (
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.DPMSolverSDEScheduler,
)
EDM = (
    diffusers.EDMEulerScheduler,
    diffusers.EDMDPMSolverMultistepScheduler,
    diffusers.CosineDPMSolverMultistepScheduler,
)
CONVERTING = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.SASolverScheduler,
)
STRIDED = (  # step to t - T // N, whatever the next timestep is
    diffusers.DDIMScheduler,
    diffusers.DDIMParallelScheduler,
    diffusers.CogVideoXDDIMScheduler,
    diffusers.CogVideoXDPMScheduler,
    diffusers.PNDMScheduler,
)
LISTED = (  # step to the next timestep
    diffusers.DDPMScheduler,
    diffusers.DDPMParallelScheduler,
    diffusers.UnCLIPScheduler,
)
OWN = (
    diffusers.LCMScheduler,
    diffusers.TCDScheduler,
    diffusers.CMStochasticIterativeScheduler,
    diffusers.IPNDMScheduler,
    diffusers.SCMScheduler,
)
WITHOUT_INDEX = (*STRIDED, *LISTED, diffusers.DDPMWuerstchenScheduler)
INDEXED = (*FLOW, *SIGMA_SPACE, *EDM, *CONVERTING, *OWN)
SUPPORTED = (*INDEXED, *WITHOUT_INDEX)

AS_OUTPUT = (  # return the next sample in the dtype of the model's output
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    diffusers.FlowMatchLCMScheduler,
    diffusers.FlowMapEulerDiscreteScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.EDMEulerScheduler,
    diffusers.DDPMWuerstchenScheduler,
)
AS_SAMPLE = (  # return it in the dtype of the sample
    diffusers.LTXEulerAncestralRFScheduler,
    diffusers.MiniMaxH3Scheduler,
    diffusers.HeliosScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.SASolverScheduler,
)

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
    "PiflowScheduler": "integrates a policy that the model's output describes: it predicts nothing at the step's level",
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
OFF = {  # options that a Gaussian step must not have, and why
    "clip_sample": "clipping the predicted data stops gradients where it saturates",
    "thresholding": "thresholding the predicted data stops gradients where it saturates",
    "clip_denoised": "clipping the predicted data stops gradients where it saturates",
    "stochastic_sampling": "the policy draws the noise",
}


class Unsupported(ValueError):
    """The scheduler's steps have no noise levels that can be read, for the reason given."""


@runtime_checkable
class Stepping(Protocol):
    """What a pipeline calls on a scheduler."""

    def set_timesteps(self, num_inference_steps: int) -> None: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> object: ...


def is_scheduler(component: object) -> bool:
    """Whether a pipeline's component steps samples; not every SchedulerMixin does (the `Mel` of audio diffusion)."""
    return isinstance(component, SchedulerMixin) and isinstance(component, Stepping)


def require_supported(scheduler: SchedulerMixin) -> None:
    """Raise Unsupported with the reason if no policy can be made of this scheduler."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, SUPPORTED):
        raise Unsupported(f"{name} {REASONS.get(name, 'is not a scheduler whose noise levels are known')}")
    if isinstance(scheduler, diffusers.FlowMatchLCMScheduler) and scheduler._scale_factors:
        raise Unsupported(f"{name} with scale_factors changes the sample's size inside a step: expected none")
    if isinstance(scheduler, diffusers.HeliosScheduler) and scheduler.config.scheduler_type == "dmd":
        raise Unsupported(f"{name} with scheduler_type 'dmd' has no step: expected 'euler' or 'unipc'")
    if isinstance(scheduler, diffusers.HeliosScheduler) and scheduler.config.prediction_type != "flow_prediction":
        kind = scheduler.config.prediction_type
        raise Unsupported(f"{name} with prediction_type {kind!r} is not a flow: expected 'flow_prediction'")


def quiet(scheduler: SchedulerMixin, *, noisy: bool = False) -> list[str]:
    """Switch off, in the scheduler's config, what a Gaussian step must not have; one line for each thing switched off.

    A policy that asks the scheduler for its own noise is `noisy` and leaves that on.
    """
    kept = {"stochastic_sampling"} if noisy else set()
    kept |= {"clip_sample"} if isinstance(scheduler, _UNCLIPPED) else set()
    on = [name for name in OFF if scheduler.config.get(name) and name not in kept]
    scheduler.register_to_config(**dict.fromkeys(on, False))
    return [f"{type(scheduler).__name__}: {name} switched off ({OFF[name]})" for name in on]


def position(scheduler: SchedulerMixin, timestep: Tensor | float) -> int | None:
    """The index of the step that stock `step(..., timestep, ...)` takes now, set as it sets it; None without an index."""
    if not isinstance(scheduler, INDEXED):
        return None
    if scheduler._step_index is None:
        _start(scheduler, timestep)
    if isinstance(scheduler, diffusers.FlowMapEulerDiscreteScheduler):  # goes by the timestep and only counts the steps
        index: int | None = scheduler.index_for_timestep(timestep)
        if index is None:
            raise ValueError(f"timestep {float(timestep)} is not on the schedule of {type(scheduler).__name__}")
        return index
    return int(scheduler._step_index)


def state_dtype(scheduler: SchedulerMixin, sample: Tensor, output: Tensor) -> torch.dtype:
    """In which the stock step returns the next sample: what the pipeline's next call of the model sees."""
    if isinstance(scheduler, AS_OUTPUT):
        return output.dtype
    return sample.dtype if isinstance(scheduler, AS_SAMPLE) else torch.promote_types(sample.dtype, output.dtype)


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

    Two-stage solvers stay in their first stage (the model's output in the second is not used), and multistep solvers keep
    no history.
    """
    if isinstance(scheduler, diffusers.PNDMScheduler):
        scheduler.counter += 1
    if position(scheduler, timestep) is None:
        return
    scheduler._step_index += 1
    if isinstance(scheduler, diffusers.LTXEulerAncestralRFScheduler):
        scheduler._step_index = min(scheduler._step_index, len(scheduler.sigmas) - 1)
