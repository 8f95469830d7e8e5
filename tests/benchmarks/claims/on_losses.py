"""Claims about the losses: what is clipped, weighed, compared or held up."""

from collections.abc import Callable
from functools import partial

from mmgrpo.advantages import centered, standardized
from mmgrpo.aggregations import token_mean
from mmgrpo.baselines import balanced, log_mean_exp, shifted
from mmgrpo.contrasts import disco
from mmgrpo.entropy import Adaptation
from mmgrpo.objectives import (
    Objective,
    cispo,
    clipped,
    dapo,
    dhpo,
    elastic,
    gmpo,
    gspo,
    reinforce,
    sapo,
    two_sided,
    vespo,
)
from mmgrpo.off_policy import opmd, opmd_kimi, rec_one_side, rec_ring, rec_two_side, red_weight, two_side
from mmgrpo.types import AdvantageFunction
from mmgrpo.weighting import sampler_corrected, top_entropy, without_stale

from . import texts, worlds
from .claims import ENTROPY, SPIKE, Claim
from .training import GRPO, Effort, Side

STALE = Effort(updates=60, stale=10, passes=4)
LATE = Effort(updates=60, stale=20, passes=2)
LONG = Effort(updates=30, passes=16)
LONG_AND_STALE = Effort(updates=30, stale=10, passes=4)
PASSES = Effort(updates=20, passes=8)
MANY = Effort(updates=60)
MISMATCHED = Effort(updates=40)
CENTERED = Side("centred GRPO", lambda: centered, clipped, token_mean)


def plain() -> AdvantageFunction:
    return standardized


def off_policy(name: str, objective: Objective, compare: Callable[[], AdvantageFunction] = lambda: centered) -> Side:
    return Side(name, compare, objective, token_mean)


REINFORCE = off_policy("REINFORCE", reinforce)
STALE_METHODS: list[tuple[str, str, str, Objective, Callable[[], AdvantageFunction]]] = [
    ("asymre", "a baseline below the mean is steadier on stale data", "AsymRE", reinforce, shifted),
    ("opmd", "a baseline between mean and maximum is steadier on stale data", "OPMD", opmd, lambda: log_mean_exp),
    (
        "opmd_kimi",
        "a pull to the policy that sampled is steadier on stale data",
        "OPMD, Kimi",
        opmd_kimi,
        lambda: centered,
    ),
    ("red_drop", "dropping surplus bad samples helps on stale data", "RED-Drop", reinforce, lambda: balanced),
    ("red_weight", "letting good samples weigh more helps on stale data", "RED-Weight", red_weight, lambda: centered),
]

CLAIMS = [
    Claim(
        "clip",
        "on stale data the clip is what matters: GRPO against plain REINFORCE",
        GRPO,
        texts.words,
        STALE,
        against=REINFORCE,
    ),
    Claim(
        "rec_one_side",
        "with the clip the importance weight can go: not worse by more than 0.02",
        off_policy("REC one-side", rec_one_side),
        texts.words,
        STALE,
        against=CENTERED,
        tolerance=0.02,
    ),
    Claim(
        "rec_wide",
        "a wide two-sided clip (0.6, 2.0) learns faster",
        off_policy("REC wide", partial(rec_two_side, keep=partial(two_side, low=0.6, high=2.0))),
        texts.words,
        STALE,
    ),
    Claim("rec_ring", "the ring learns faster", off_policy("REC ring", rec_ring), texts.words, STALE),
    *[
        Claim(
            name if against is GRPO else f"{name}_alone",
            says,
            off_policy(*method),
            texts.words,
            STALE,
            against=against,
        )
        for name, says, *method in STALE_METHODS
        for against in (GRPO, REINFORCE)
    ],
    Claim(
        "disco",
        "very hard and very easy prompts count like others",
        Side("DisCO", plain, disco, lose_apart=True),
        worlds.uneven,
        Effort(samples=8, updates=20, bound=0.02),
        tuned=None,
        rate=50.0,
    ),
    *[
        Claim(
            name if effort is LONG else f"{name}_stale", says, Side(name.upper(), plain, objective), texts.long, effort
        )
        for name, says, objective in (
            ("gspo", "a sample's ratio is steadier on long texts", gspo),
            ("gmpo", "the geometric mean of ratios is steadier on long texts", gmpo),
            ("dhpo", "the mean of a token's and a sample's ratio is steadier on long texts", dhpo),
        )
        for effort in (LONG, LONG_AND_STALE)
    ],
    Claim(
        "clip_higher",
        "a wider clip above keeps the entropy up",
        Side("DAPO", plain, dapo, token_mean),
        worlds.many,
        PASSES,
        ENTROPY,
        None,
        rate=20.0,
    ),
    Claim(
        "cispo",
        "clipping the weight alone lets rare tokens learn in every pass",
        Side("CISPO", plain, cispo, token_mean),
        texts.words,
        PASSES,
    ),
    Claim("sapo", "a smooth gate learns more than a hard clip", Side("SAPO", plain, sapo), texts.words, PASSES),
    Claim(
        "elastic",
        "clip widths that follow advantage and spread learn more",
        Side("ETR", plain, elastic),
        texts.words,
        PASSES,
    ),
    Claim(
        "elastic_entropy",
        "with them the entropy falls more slowly",
        Side("ETR", plain, elastic),
        texts.words,
        PASSES,
        ENTROPY,
    ),
    Claim(
        "two_sided",
        "a ceiling on the ratio of bad samples removes spikes of the gradient",
        Side("two-sided clip", plain, two_sided),
        texts.words,
        LATE,
        SPIKE,
    ),
    Claim(
        "vespo",
        "a smooth weight of whole samples stands staleness",
        Side("VESPO", plain, vespo, token_mean),
        texts.words,
        LATE,
    ),
    Claim(
        "without_stale",
        "leaving out bad samples that the policy has left stands staleness",
        Side("off-policy mask", plain, without_stale()),
        texts.words,
        LATE,
    ),
    Claim(
        "truncated_correction",
        "a sampler with other probabilities is corrected (TIS)",
        Side("TIS", plain, sampler_corrected()),
        texts.mismatched,
        MISMATCHED,
    ),
    Claim(
        "masked_correction",
        "what a sampler finds far likelier or unlikelier is left out (MIS)",
        Side("MIS", plain, sampler_corrected(mode="mask", floor=0.5, cap=5.0)),
        texts.mismatched,
        MISMATCHED,
    ),
    Claim(
        "entropy_bonus",
        "an entropy bonus of 0.01 keeps the entropy up",
        Side("bonus", plain, entropy_weight=0.01),
        worlds.many,
        MANY,
        ENTROPY,
        None,
        rate=20.0,
    ),
    Claim(
        "adaptive_entropy",
        "a bonus that follows the entropy holds it at 1 nat or above",
        Side("adaptive bonus", plain, entropy_weight=0.0, adaptation=Adaptation(1.0), lose_apart=True),
        worlds.many,
        MANY,
        ENTROPY,
        None,
        rate=20.0,
    ),
    Claim(
        "top_entropy",
        "the fifth of the tokens with the highest entropy is enough",
        Side("top entropy", plain, top_entropy(), lose_apart=True),
        texts.forks,
        Effort(updates=20),
        tolerance=0.02,
    ),
]
