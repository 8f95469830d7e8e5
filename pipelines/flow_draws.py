"""Draws on a flow's path of our own, x_t = (1 - t) clean + t noise: which options ask for them, and one of them evaluated.

Axes: b rows, then whatever the latents have.
"""

from torch import Tensor

from mmgrpo.draws import Draws
from mmgrpo.schedules import Plan
from mmgrpo.types import Evaluation
from pipelines.matching import evaluation


def chosen(sampled: bool, plan: Plan | None, draws: Draws | None) -> Plan | Draws:
    """Planned steps or draws, whichever the options name; raises ValueError unless they name one."""
    if draws is not None and plan is None and not sampled:
        if draws.call:
            raise ValueError(f"policy.draws.call is {dict(draws.call)}; this policy runs no pipeline: expected none")
        return draws
    if draws is None and plan is not None:
        return plan
    named = {"sampler": sampled, "plan": plan, "draws": draws}
    given = ", ".join(f"policy.{name}" for name, there in named.items() if there)
    raise ValueError(f"{given or 'none of them'} arrived; expected policy.plan, or policy.draws alone")


def evaluated(velocity: Tensor, target: Tensor, t: Tensor, old: Tensor, reference: Tensor | None) -> Evaluation:
    """One draw of a call's rows under today's weights, old ones and those of a reference; (b, ...) each, t (b,) -> (b, 1)."""
    output, old, target = (value.to(velocity).flatten(1) for value in (velocity, old, target))
    held = None if reference is None else reference.flatten(1)
    return evaluation(output, target, old, held, t.to(velocity).unsqueeze(1))
