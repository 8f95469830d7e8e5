"""The descent itself: the gradient's norm is bounded, the optimizer takes its step, averages follow."""

import torch

from mmgrpo.improve import NonFiniteError
from mmgrpo.run import Run


def clip_gradient(run: Run) -> float:
    """Scale the gradient down to the recipe's norm; -> its norm before; raises NonFiniteError naming a parameter."""
    parameters = run.policy.trainable()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), run.recipe.optimizer.max_grad_norm)
    if not torch.isfinite(norm):
        bad = [name for name, value in parameters.items() if value.grad is not None and not value.grad.isfinite().all()]
        raise NonFiniteError(f"the gradient of {bad[0]!r} is not finite ({len(bad)} parameters in all)")
    return float(norm)


def step(run: Run) -> None:
    """One optimizer update; averages follow once per update."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.updates += 1
    run.reference.after_update()
    if run.average is not None:
        run.average.follow(run.recipe.ema.decay)
