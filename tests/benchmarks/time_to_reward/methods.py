"""The methods: a recipe and what is laid over it in the language of the command line, where later lines win.

A row that starts from `FLOW_GRPO` differs from the baseline in its overrides alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

FLOW_GRPO = Path(__file__).with_name("flow_grpo.toml")
DEMO = Path(str(files("pipelines") / "recipes" / "demo_image.toml"))
SHARED = (  # by every method: the reward alone, without what is watched
    "rewards=[{name='soft', build='rewards.shapes:shape_reward'}]",
    "evaluation.source=''",
    "train.evaluate_every=0",
)


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    title: str
    paper: str
    overrides: Sequence[str] = ()
    base: Path = FLOW_GRPO
    budget: float = 90.0  # processor seconds of training
    every: float = math.inf  # processor seconds between two evaluations, at most


QUICK = (DEMO, 90.0, 2.0)  # ends by itself, after 30 iterations of a second
UNENDING = ("optimizer.decay=constant", "train.iterations=100000")  # the budget ends it
PLAIN = "objective={build='mmgrpo.matching:nft_plain', bound=0.5}"
AWM = (
    "advantage={build='mmgrpo.advantages:standardized', scale='batch', clamp=1.0}",
    "objective={build='mmgrpo.matching:awm_tuned'}",
)
DGPO = (
    "optimizer.muon=[]",
    "optimizer.learning_rate=3e-4",
    "advantage={build='mmgrpo.advantages:standardized', clamp=5.0}",
    "objective={build='mmgrpo.group_matching:dgpo'}",
    "reference.kind=frozen",
)
METHODS = (
    Method("baseline", "Flow-GRPO", "arXiv 2505.05470", budget=120.0),
    Method(
        "fast",
        "Flow-GRPO-Fast: 2 steps of the first half, drawn in each iteration",
        "arXiv 2505.05470",
        ("policy.plan={build='mmgrpo.schedules:random_window', size=2}",),
        budget=70.0,
    ),
    Method(
        "window",
        "MixGRPO: a window of 2 steps that moves on every 4 iterations",
        "arXiv 2507.21802",
        ("policy.plan={build='mmgrpo.schedules:window', size=2, every=4}",),
        budget=70.0,
    ),
    Method(
        "tempflow",
        "TempFlow-GRPO: steps weighted by their noise",
        "arXiv 2508.04324",
        (
            "objective={build='mmgrpo.denoising:noise_weighted', scale=2.607, "  # 1 over the mean std of the 7 steps
            "objective={build='mmgrpo.objectives:clipped', low=1e-3, high=1e-3}}",
        ),
    ),
    Method(
        "guard",
        "GRPO-Guard: ratios normalized, clip 1e-4",
        "arXiv 2510.22319",
        ("objective={build='mmgrpo.objectives:guarded', low=1e-4, high=1e-4}",),
    ),
    Method(
        "dppo",
        "Flow-DPPO: a bound of the divergence, 1e-5",
        "arXiv 2606.11025",
        ("objective={build='mmgrpo.denoising:divergence_bound', limit=1e-5}",),
    ),
    Method("default", "the default: DiffusionNFT as in the demo, which ends by itself", "arXiv 2509.16117", (), *QUICK),
    Method("nft_plain", "the same with the paper's loss", "arXiv 2509.16117", (PLAIN,), *QUICK),
    Method("awm", "the same with AWM's loss, held to the old outputs", "arXiv 2509.25050", AWM, *QUICK),
    Method("dgpo", "DGPO: direct group preferences", "arXiv 2510.08425", (*UNENDING, *DGPO), DEMO, 50.0),
)
BASELINE = METHODS[0]
