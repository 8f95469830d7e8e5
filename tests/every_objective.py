"""Every objective of the core by name, evaluations that feed all of them, and what tells them apart in the common properties."""

from functools import partial

import torch
from torch import Tensor

from mmgrpo import contrasts, denoising, group_matching, matching, objectives, off_policy
from mmgrpo.aggregations import Aggregation, constant, seq_mean, token_mean
from mmgrpo.objectives import Objective, clipped, reinforce
from mmgrpo.types import Evaluation
from mmgrpo.weighting import by_kind, sampler_corrected, top_entropy, without_stale

F64 = torch.float64
OBJECTIVES: dict[str, Objective] = {
    "clipped": clipped,
    "dapo": objectives.dapo,
    "ngrpo": objectives.ngrpo,
    "two-sided": objectives.two_sided,
    "narrow": partial(clipped, low=1e-4, high=1e-4),
    "reinforce": reinforce,
    "guarded": objectives.guarded,
    "guarded, not by dt": partial(objectives.guarded, scale_by_dt=False),
    "divergence bound": denoising.divergence_bound,
    "divergence bound, not by variance": partial(denoising.divergence_bound, by_variance=False),
    "noise weighted": denoising.noise_weighted(),
    "noise scaled": denoising.noise_weighted(scale=2.25),
    "gspo": objectives.gspo,
    "gspo-token": objectives.gspo_token,
    "luspo": objectives.luspo,
    "rloo": objectives.rloo,
    "cispo": objectives.cispo,
    "sapo": objectives.sapo,
    "sapo of samples": partial(objectives.sapo, level=objectives.sample_mean),
    "gmpo": objectives.gmpo,
    "vespo": objectives.vespo,
    "dhpo": objectives.dhpo,
    "dhpo guided": objectives.dhpo_guided,
    "elastic": objectives.elastic,
    "rec one-side": off_policy.rec_one_side,
    "rec one-side IS": off_policy.rec_one_side_is,
    "rec two-side": off_policy.rec_two_side,
    "rec two-side IS": off_policy.rec_two_side_is,
    "rec ring": off_policy.rec_ring,
    "rec of samples": off_policy.rec_sample,
    "opmd": off_policy.opmd,
    "opmd, Kimi's": off_policy.opmd_kimi,
    "asymre": off_policy.asymre,
    "red weight": off_policy.red_weight,
    "disco": contrasts.disco,
    "disco of ratios": contrasts.disco_ratio,
    "disco, basic": contrasts.disco_b,
    "dno": contrasts.dno,
    "dno, hard": contrasts.dno_hard,
    "regressed": contrasts.regressed,
    "nft": matching.nft,
    "nft, weak": partial(matching.nft, strength=0.1),
    "nft, plain": matching.nft_plain,
    "advantage weighted": matching.advantage_weighted,
    "advantage weighted by time": partial(matching.advantage_weighted, weighting=matching.by_time),
    "awm tuned": matching.awm_tuned,
    "dgpo": group_matching.dgpo,
    "dgpo, exact": partial(group_matching.dgpo, exact=True),
    "dgpo against the old": partial(group_matching.dgpo, against=group_matching.of_old, clip=None),
    "gdro": group_matching.gdro,
    "gdro, top": partial(group_matching.gdro, top=True),
    "corrected": sampler_corrected(objective=clipped),
    "top entropy": top_entropy(objective=clipped, share=1.0),  # a smaller share is tested on its own
    "without stale": without_stale(objective=clipped),
    "by kind": by_kind(),
}
BY_REWARD = {
    "disco",
    "disco of ratios",
    "disco, basic",
    "dno",
    "dno, hard",
    "gdro",
    "gdro, top",
}  # no advantage is read
NFT = {"nft", "nft, weak", "nft, plain"}
PULLED = {*BY_REWARD, *NFT, "awm tuned", "regressed", "opmd, Kimi's", "asymre"}  # where the advantage is 0 too
DGPO = {"dgpo", "dgpo, exact", "dgpo against the old"}
COUNTED = {
    *DGPO,
    "elastic",
    "top entropy",
    "entropy clipped",
}  # a sample of advantage 0 is not pulled on, but counts for the others
NOT_LINEAR = {*PULLED, *DGPO, "elastic", "red weight"}  # in the advantages

AGGREGATIONS: dict[str, Aggregation] = {
    "seq_mean": seq_mean,
    "token_mean": token_mean,
    "constant": partial(constant, length=6),
}


def drawn(rows: int, steps: int, seed: int = 0, scale: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, advantages and a mask with rows of unequal length; (B, S) each."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio = scale * torch.randn(rows, steps, generator=generator, dtype=F64)
    advantages = torch.randn(rows, 1, generator=generator, dtype=F64).expand(rows, steps)
    lengths = torch.randint(1, steps + 1, (rows, 1), generator=generator)
    return log_ratio, advantages, torch.arange(steps) < lengths


def evaluation(log_ratio: Tensor) -> Evaluation:
    """Decisions that have every field, with the given log-ratios; groups of three samples, the first of each right."""
    generator = torch.Generator().manual_seed(3)
    still, std, dt = (torch.rand(log_ratio.shape, generator=generator, dtype=F64) + 0.1 for _ in range(3))
    row = torch.arange(len(log_ratio)).unsqueeze(1).expand(log_ratio.shape)
    return Evaluation(
        **moving(log_ratio, still),
        old_error=2 + still,
        reference_error=2.01 + 0.98 * still,
        clean_scale=std,
        old_prediction=outputs(still, 1, -1),
        target=outputs(still, 0.3, 0.2),
        step_std=std,
        dt=dt,
        sampler_gap=torch.zeros(log_ratio.shape, dtype=F64),  # a sampler with the replay's own kernels
        entropy=still,
        kind=torch.arange(log_ratio.shape[1]).expand(log_ratio.shape) % 2,
        group=row // 3,
        reward=(row % 3 == 0).to(F64),
    )


def moving(log_ratio: Tensor, still: Tensor) -> dict[str, Tensor]:
    """The fields that move with the log-ratio, linearly, each from a start of its own; (B, S), the outputs (B, S, 2)."""
    return {
        "log_ratio": log_ratio,
        "to_reference": log_ratio + 0.1 * still,
        "log_prob": log_ratio - still,
        "drift": 1e-3 * still + 1e-4 * log_ratio,
        "error": 2 + still - log_ratio,
        "prediction": outputs(still, 1, -1) + outputs(log_ratio, 0.5, -1),
    }


def outputs(values: Tensor, *direction: float) -> Tensor:
    """The values along a direction of the output, (B, S) -> (B, S, D)."""
    return values.unsqueeze(2) * torch.tensor(direction, dtype=F64)
