"""The descent itself: the gradient's norm is bounded, the optimizer takes its step, averages and the entropy's bonus follow."""

from dataclasses import replace

import torch

from mmgrpo.entropy import adapted, applied, mean_entropy
from mmgrpo.improve import Given, Loss, Measured, NonFiniteError
from mmgrpo.ratios import masked
from mmgrpo.run import Run, adaptation
from mmgrpo.types import Evaluation
from mmgrpo.weighting import selection


def today(run: Run) -> Loss:
    """The loss with the weight that the entropy has in the coming update."""
    if run.loss.entropy_weight is None:
        return run.loss
    return replace(run.loss, entropy_weight=applied(run.bonus, adaptation(run.recipe)))


def clip_gradient(run: Run) -> float:
    """Scale the gradient down to the recipe's norm; -> its norm before; raises NonFiniteError naming a parameter."""
    parameters = run.policy.trainable()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), run.recipe.optimizer.max_grad_norm)
    if not torch.isfinite(norm):
        bad = [name for name, value in parameters.items() if value.grad is not None and not value.grad.isfinite().all()]
        raise NonFiniteError(f"the gradient of {bad[0]!r} is not finite ({len(bad)} parameters in all)")
    run.norms.append(float(norm))
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


def follow_entropy(run: Run, measured: Measured, given: Given) -> dict[str, float]:
    """Adapt the weight of the entropy's bonus to what an update showed; -> metrics: the weight that it had, the mean."""
    if run.loss.entropy_weight is None:
        return {}
    assert given.evenly is not None  # the trainer sets it for such a loss
    how = adaptation(run.recipe)
    found = masked(Evaluation(measured.values["log_ratio"], entropy=measured.values["entropy"]), given.weights.ne(0))
    mean = float(mean_entropy(found, given.advantages, given.evenly, selection(run.loss.objective)))
    metrics = {"update/entropy_weight": applied(run.bonus, how), "update/entropy_mean": mean}
    if how is not None:
        run.bonus = adapted(run.bonus, mean, how)
    return metrics
