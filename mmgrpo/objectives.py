"""Losses of single decisions: (evaluation, advantages (B, S), *, options) -> (B, S).

Named methods are `partial`s that show which factor differs: a ratio's level (mmgrpo/ratios.py), a clip width, a mixing. How
losses are added up is mmgrpo/aggregations.py; weights without gradient are mmgrpo/weighting.py; objectives on stale data
mmgrpo/off_policy.py; those that compare the samples of a prompt themselves mmgrpo/contrasts.py.
Untrained decisions may hold anything: `ratios.masked` empties them before a loss sees them and `aggregations.weighted_sum`
selects, so neither the value nor the gradient can meet them. The ratio is exp(log_ratio); on the first update after a rollout it
is 1 and the gradient -advantage * grad log pi. Clip widths are for the reduction of the log-ratio at hand: about 0.2 for tokens,
1e-6 to 1e-3 for means over latents. Axes: B samples, S decisions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mmgrpo.facts import Facts
from mmgrpo.groups import group_std
from mmgrpo.ratios import (
    Level,
    decision,
    of_samples,
    required,
    sample_mean,
    sample_mean_token,
    sample_sum,
    trained,
)
from mmgrpo.types import Evaluation, same_shape

Objective = Callable[[Evaluation, Tensor], Tensor]
LARGEST = 20.0  # log-ratio beyond which gates that are flat there are not asked


def clipped(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    level: Level = decision,
    low: float = 0.2,
    high: float = 0.2,
    ceiling: float | None = None,
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), PPO's clip as in GRPO (arXiv 2402.03300, eq. 3); -> (B, S).

    `level` says whose ratio it is; a sample's gives every decision the sample's loss, for `seq_mean` to add up. `ceiling` >
    1 + high also bounds the ratio where A < 0.
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    floor, roof = log_widths(low, high)
    if ceiling is not None and ceiling <= 1 + high:
        raise ValueError(f"ceiling is {ceiling}; expected more than 1 + high = {1 + high}")
    top = None if ceiling is None else math.log(ceiling)
    bounded = pessimistic(level(evaluation), advantages, floor, roof, top)
    return -advantages * bounded.exp()


# DAPO, arXiv 2503.14476: clip-higher; `token_mean`.
dapo = partial(clipped, low=0.2, high=0.28)
# NGRPO (arXiv 2509.18851, the id is not confirmed): a tighter clip below; `token_mean`.
ngrpo = partial(clipped, low=0.16, high=0.24)
# INTELLECT-2, arXiv 2505.07291, the dual clip of PPO: a runaway ratio with A < 0 is bounded too.
two_sided = partial(clipped, ceiling=4.0)
# GSPO, arXiv 2507.18071, eq. 5: the ratio of a sample is exp of its mean log-ratio; `seq_mean`.
gspo = partial(clipped, level=sample_mean, low=3e-4, high=4e-4)
# GSPO-token, eq. 14: for advantages per decision; `seq_mean`.
gspo_token = partial(clipped, level=sample_mean_token, low=3e-4, high=4e-4)
# LUSPO, arXiv 2602.05261: GSPO times the length of the sample, which is `constant` with length 1.
luspo = partial(clipped, level=sample_mean, low=2e-3, high=2.5e-3)
# RLOO, arXiv 2402.14740: the ratio of the sample as a whole; `seq_mean`.
rloo = partial(clipped, level=sample_sum)


def reinforce(evaluation: Evaluation, advantages: Tensor) -> Tensor:
    """-A * log_ratio, whose gradient is -A grad log pi at any ratio; -> (B, S)."""
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    return -advantages * evaluation.log_ratio


def guarded(
    evaluation: Evaluation, advantages: Tensor, *, low: float = 2e-6, high: float = 2e-6, scale_by_dt: bool = True
) -> Tensor:
    """GRPO-Guard (arXiv 2510.22319): clip the ratio without its bias and step-dependent scale; needs Gaussian steps; -> (B, S).

    log ratio' = step_std * (log_ratio + drift), linear in the move of the mean. `scale_by_dt` divides the loss by the length
    of the step, as the paper and the authors' code do. All reductions over event dimensions are means.
    """
    drift, std, dt = (required(evaluation, name) for name in FACTS[guarded].needs)
    same_shape(log_ratio=evaluation.log_ratio, drift=drift, step_std=std, dt=dt, advantages=advantages)
    moved = replace(evaluation, log_ratio=std * (evaluation.log_ratio + drift))
    loss = clipped(moved, advantages, low=low, high=high)
    return loss / torch.where(dt > 0, dt, 1) if scale_by_dt else loss


def cispo(evaluation: Evaluation, advantages: Tensor, *, cap: float = 5.0) -> Tensor:
    """CISPO (arXiv 2506.13585, eq. 4): -A * log pi under the weight min(ratio, cap), which carries no gradient; -> (B, S).

    No lower bound, as MiniMax uses it and ScaleRL (arXiv 2510.13786) recommends with a cap of 5. log_ratio stands for
    log pi: the gradient is the same, the value of the loss is another. Published with `token_mean`.
    """
    if cap <= 0:
        raise ValueError(f"cap is {cap}; expected a positive bound of the ratio")
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    weight = evaluation.log_ratio.detach().clamp(max=math.log(cap)).exp()
    return -weight * advantages * evaluation.log_ratio


def sapo(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    level: Level = decision,
    positive: float = 1.0,
    negative: float = 1.05,
) -> Tensor:
    """SAPO (arXiv 2511.20347): -A * (4 / tau) * sigmoid(tau * (ratio - 1)), tau by the sign of A; -> (B, S), `seq_mean`.

    The gradient's weight is 1 at a ratio of 1 and falls to 0 on both sides. A = 0 has the temperature `negative`.
    """
    if positive <= 0 or negative <= 0:
        raise ValueError(f"positive and negative are {positive} and {negative}; expected positive temperatures")
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    tau = torch.where(advantages > 0, positive, negative).to(advantages)
    gate = (tau * torch.expm1(level(evaluation).clamp(max=LARGEST))).sigmoid()
    return -4 / tau * gate * advantages


def gmpo(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    low: float = 0.4,
    high: float = 0.4,
    choose: Callable[[Evaluation, Tensor], Tensor] | None = None,
) -> Tensor:
    """GMPO (arXiv 2507.20673): -A * the geometric mean of a sample's ratios, each clipped in log space; -> (B, S), `seq_mean`.

    `low` and `high` are nats. A clipped decision counts in the mean and is not pulled on. `choose` gives the decisions that
    the mean is over, as `weighting.in_top_share` does: here an entropy mask enters the mean and its count.
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    if low <= 0 or high <= 0:
        raise ValueError(f"low and high are {low} and {high}; expected positive clip widths, in nats")
    among = trained(evaluation)
    if choose is not None:
        among = among & (choose(evaluation, advantages) > 0)
    kept = pessimistic(evaluation.log_ratio, advantages, -low, high)
    return -advantages * sample_mean(replace(evaluation, log_ratio=kept, mask=among)).exp()


def vespo(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    level: Level = sample_sum,
    powers: tuple[float, float] = (2.0, 3.0),
    rates: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """VESPO (arXiv 2602.10693): -A * log pi under the weight W^k * exp(rate * (1 - W)), W a sample's ratio; -> (B, S).

    k and rate are (of A >= 0, of A < 0); the weight carries no gradient, is 1 at W = 1 and largest at W = k / rate. With the
    level `sample_sum_from_sampler` W also holds the sampler's own deviation, which is then not to be corrected again.
    log_ratio stands for log pi. Published with `token_mean`. Where the authors' code drops a weight that is not finite, this
    one shows it in the loss.
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    limited = replace(evaluation, log_ratio=evaluation.log_ratio.detach().clamp(-LARGEST, LARGEST))
    log_ratio = level(limited).clamp(math.log(1e-8), LARGEST)
    good = advantages >= 0
    power, rate = (torch.where(good, *values).to(advantages) for values in (powers, rates))
    weight = (power * log_ratio - rate * torch.expm1(log_ratio)).exp()
    return -weight.detach() * advantages * evaluation.log_ratio


def hybrid(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    mixing: Callable[[Evaluation], Tensor],
    low: float = 0.2,
    high: float = 0.2,
    sample_low: float = 3e-4,
    sample_high: float = 4e-4,
) -> Tensor:
    """DHPO (arXiv 2601.05607): -A * (w * own ratio + (1 - w) * the sample's ratio), each clipped for itself; -> (B, S).

    `mixing` gives w, (B, S) in [0, 1] without gradient: 1 is `clipped`, 0 is `gspo`. `seq_mean`. PARTIAL: that each is
    clipped before they are mixed is confirmed, the widths (those of GRPO and GSPO) are not.
    """
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    share = mixing(evaluation).detach()
    own = clipped(evaluation, advantages, low=low, high=high)
    whole = clipped(evaluation, advantages, level=sample_mean, low=sample_low, high=sample_high)
    return share * own + (1 - share) * whole


def even(evaluation: Evaluation, *, share: float = 0.5) -> Tensor:
    """The same share of the decision's own ratio everywhere; (B, S)."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number in [0, 1]")
    return torch.full_like(evaluation.log_ratio, share)


def by_entropy(evaluation: Evaluation, *, invert: bool = False) -> Tensor:
    """A decision's entropy over the largest of its sample's, 0 where all are 0; (B, S) in [0, 1].

    RECONSTRUCTED: the normaliser, and that decisions of high entropy have the larger share of their own ratio; `invert` is
    the other direction.
    """
    entropy = torch.where(trained(evaluation), required(evaluation, "entropy").detach(), 0).clamp(min=0)
    largest = entropy.amax(1, keepdim=True)
    share = entropy / torch.where(largest > 0, largest, 1)
    return 1 - share if invert else share


dhpo = partial(hybrid, mixing=even)  # averaged
dhpo_guided = partial(hybrid, mixing=by_entropy)


def elastic(
    evaluation: Evaluation,
    advantages: Tensor,
    *,
    level: Level = decision,
    low: float = 0.2,
    high: float = 0.2,
    by_advantage: float = 0.5,
    by_spread: float = 0.5,
    least: float = 0.05,
    most: float = 0.5,
    reward_range: float = 1.0,
) -> Tensor:
    """ETR (arXiv 2601.03723): PPO's clip, wider for a large |A| and for groups that are often both right and wrong; -> (B, S).

    RECONSTRUCTED: only these two dependencies are confirmed. width * (1 + by_advantage * (2 m - 1)) * (1 + by_spread * (2 v - 1))
    within [least, most], m = |A| / (1 + |A|), v = 4 * the variance of the group's rewards over reward_range^2, at most 1: 4 p (1 - p)
    of a pass rate p. With both at 0 it is `clipped`.
    """
    if not 0 < least <= most < 1:
        raise ValueError(f"least and most are {least} and {most}; expected 0 < least <= most < 1")
    same_shape(log_ratio=evaluation.log_ratio, advantages=advantages)
    size = advantages.abs() / (1 + advantages.abs())
    rewards = torch.where(trained(evaluation).any(1), of_samples(evaluation, "reward"), torch.nan)
    spread = 4 * group_std(rewards, of_samples(evaluation, "group"), ddof=0).square() / reward_range**2
    spread = spread.clamp(max=1).to(size).unsqueeze(1)
    wider = (1 + by_advantage * (2 * size - 1)) * (1 + by_spread * (2 * spread - 1))
    below, above = ((width * wider).clamp(least, most) for width in (low, high))
    bounded = pessimistic(level(evaluation), advantages, torch.log1p(-below), torch.log1p(above))
    return -advantages * bounded.exp()


def pessimistic(
    log_ratio: Tensor,
    advantages: Tensor,
    floor: float | Tensor,
    roof: float | Tensor,
    ceiling: float | None = None,
) -> Tensor:
    """The log-ratio up to `roof` where A >= 0, which gains nothing above, and from `floor` to `ceiling` where A < 0; (B, S).

    PPO's clip in log space, where a width of 1e-6 keeps its digits in float32 and no exponential overflows when A >= 0.
    """
    lowered = log_ratio.clamp(min=floor)
    lowered = lowered if ceiling is None else lowered.clamp(max=ceiling)
    return torch.where(advantages >= 0, log_ratio.clamp(max=roof), lowered)


def log_widths(low: float, high: float) -> tuple[float, float]:
    """log(1 - low), which is -infinity from 1 on, and log(1 + high); raises ValueError unless both are positive."""
    if low <= 0 or high <= 0:
        raise ValueError(f"low and high are {low} and {high}; expected positive clip widths")
    return math.log1p(-low) if low < 1 else -math.inf, math.log1p(high)


FACTS: Mapping[Callable[..., Tensor], Facts] = {
    guarded: Facts(("drift", "step_std", "dt")),
    gmpo: Facts(couples="sample"),
    hybrid: Facts(couples="sample"),
    by_entropy: Facts(("entropy",), "sample"),
    elastic: Facts(("reward", "group"), "batch", every=True),
}
