"""Claims about how rewards become advantages."""

from functools import partial

from mmgrpo.advantages import centered, gdpo, leave_one_out, scaled_sum, standardized
from mmgrpo.aggregations import constant, seq_mean, token_mean
from mmgrpo.baselines import batch_whitened, gaussian_rank, median, virtual_best
from mmgrpo.credit import anchored_states, edges, shared_edges, token_hidden_reward
from mmgrpo.entropy_clip import entropy_clipped
from mmgrpo.objectives import clipped, luspo, ngrpo, rloo
from mmgrpo.risk import bundle_risk
from mmgrpo.shaping import difficulty_scaled, distribution_centric, unlikeliness

from . import texts, worlds
from .claims import ENTROPY, FLIPS, GREEDY, Claim, Metric, away_from, pass_at
from .training import Effort, Side

MEDIAN = Side("MC-GRPO", lambda: median)
SCALES = partial(texts.two_rewards, scale=10.0)
WRONG_LENGTH = Metric("tokens of wrong answers", lambda trained: texts.length_of_wrong(trained.policy), False)
VERY_HARD = partial(worlds.hard, away=4.0)
EQUAL_STEPS = Effort(samples=8, updates=20, bound=0.02)
MANY = Effort(updates=60)
FEW = Effort(samples=8, updates=20)
WALK = Effort(samples=8, updates=30, bound=0.02)
RARE = Effort(samples=32, updates=30, passes=2)
HARD_TO_FIND = Metric("expected reward of the hardest third", lambda t: t.world.chance(t.policy)[:, :4].mean(1))

CLAIMS = [
    Claim(
        "median_signs",
        "a median baseline gives fewer advantages the wrong sign where rewards have outliers",
        MEDIAN,
        worlds.outliers,
        Effort(samples=3, updates=25),
        FLIPS,
        None,
    ),
    Claim(
        "median_of_3",
        "with 2 + 1 samples and outliers the median learns more",
        MEDIAN,
        worlds.outliers,
        Effort(samples=3, updates=25),
    ),
    Claim(
        "median_clamped",
        "the same with the values limited to 2, which is ours",
        Side("MC-GRPO, clamp 2", lambda: partial(median, clamp=2.0)),
        worlds.outliers,
        Effort(samples=3, updates=25),
    ),
    Claim(
        "median_binary",
        "with 2 + 1 samples and binary rewards the median learns more",
        MEDIAN,
        worlds.coins,
        Effort(samples=3, updates=60),
    ),
    Claim(
        "median_of_5",
        "with 4 + 1 samples and outliers the median learns more",
        MEDIAN,
        worlds.outliers,
        Effort(samples=5, updates=25),
    ),
    Claim(
        "gdpo",
        "two binary rewards that collapse when they are summed are both learnt sooner",
        Side("GDPO", lambda: gdpo, compare_apart=True),
        texts.two_rewards,
        FEW,
    ),
    Claim(
        "gdpo_scales",
        "a hard reward is learnt beside an easy one that is ten times as large",
        Side("GDPO", lambda: gdpo, compare_apart=True),
        SCALES,
        FEW,
    ),
    Claim(
        "scaled_sum",
        "a hard reward is learnt beside a large one if each is divided by its spread in the batch",
        Side("scaled sum", lambda: scaled_sum, compare_apart=True),
        SCALES,
        FEW,
    ),
    Claim(
        "gaussian_rank",
        "ranks learn from binary and heavy-tailed rewards in one batch",
        Side("Gaussian rank", lambda: gaussian_rank),
        worlds.shapes,
        Effort(samples=8, updates=30),
    ),
    Claim(
        "ngrpo",
        "groups that are all wrong teach too, so hard prompts are learnt sooner",
        Side("NGRPO", virtual_best, ngrpo, token_mean),
        VERY_HARD,
        Effort(samples=8, updates=60, passes=4),
    ),
    Claim(
        "ngrpo_moderate",
        "groups that are all wrong teach too, where a right answer is found at times",
        Side("NGRPO", virtual_best, ngrpo, token_mean),
        worlds.hard,
        Effort(samples=8, updates=60, passes=4),
    ),
    Claim(
        "unlikeliness",
        "right answers that were unlikely gain, so pass@64 rises",
        Side("unlikeliness", unlikeliness),
        worlds.rare,
        RARE,
        pass_at(64),
    ),
    Claim(
        "risk",
        "the lower tail of bundles weighs more, so pass@64 rises",
        Side("RiskPO", partial(bundle_risk, size=4), compare_apart=True),
        worlds.rare,
        RARE,
        pass_at(64),
    ),
    Claim(
        "distribution_centric",
        "the entropy is held at a target",
        Side("DCPO", partial(distribution_centric, target=0.5), compare_apart=True),
        worlds.many,
        MANY,
        away_from(0.5),
        None,
        rate=20.0,
    ),
    Claim(
        "entropy_clipped",
        "leaving out the tokens that would lower the entropy most keeps it up",
        Side("Clip_B", entropy_clipped, compare_apart=True),
        worlds.many,
        MANY,
        ENTROPY,
        None,
        rate=20.0,
    ),
    Claim(
        "gigpo",
        "actions in states that recur are compared with each other",
        Side("GiGPO", anchored_states),
        texts.walk,
        WALK,
        tuned=None,
        rate=50.0,
    ),
    Claim(
        "salt",
        "steps that walks share are neutral, those that differ carry the credit",
        Side("SALT", shared_edges),
        texts.walk,
        WALK,
        tuned=None,
        rate=50.0,
    ),
    Claim(
        "edges",
        "each edge of a graph has its own advantage under a noisy binary reward",
        Side("Graph-GRPO", edges),
        texts.graph,
        Effort(samples=16, updates=20),
    ),
    Claim(
        "difficulty",
        "prompts that are known to be hard weigh more, so they are learnt sooner",
        Side("DR-IRL scaling", difficulty_scaled, compare_apart=True),
        worlds.uneven,
        EQUAL_STEPS,
        HARD_TO_FIND,
        None,
        rate=50.0,
    ),
    Claim(
        "dr_grpo_length",
        "without 1 / length wrong answers do not grow",
        Side("Dr. GRPO", lambda: centered, clipped, partial(constant, length=1 + texts.LONGEST)),
        texts.lengths,
        Effort(samples=8, updates=60),
        WRONG_LENGTH,
        None,
    ),
    Claim(
        "luspo_length",
        "a sample's ratio that weighs by its length does not let wrong answers grow",
        Side("LUSPO", lambda: standardized, luspo, partial(constant, length=1)),
        texts.lengths,
        Effort(samples=8, updates=60),
        WRONG_LENGTH,
        None,
    ),
    Claim(
        "dr_grpo_trifles",
        "without the group's std, differences of a thousandth do not count as much as real ones",
        Side("Dr. GRPO", lambda: centered),
        worlds.trifles,
        FEW,
    ),
    Claim(
        "reinforce_plus_plus",
        "with the batch's std, differences of a thousandth do not count as much as real ones",
        Side("REINFORCE++", partial(batch_whitened, baseline=True), compare_apart=True),
        worlds.trifles,
        FEW,
    ),
    Claim(
        "reinforce_plus_plus_small",
        "a scale of the whole batch is steadier than that of groups of 2",
        Side("REINFORCE++", partial(batch_whitened, baseline=True), compare_apart=True),
        worlds.coins,
        Effort(samples=2, updates=60),
    ),
    Claim(
        "rloo",
        "the others' mean as baseline and a sample's own ratio do not lose to GRPO",
        Side("RLOO", lambda: leave_one_out, rloo, seq_mean),
        texts.words,
        Effort(updates=40),
    ),
    Claim(
        "hidden_reward_exploit",
        "tokens that make right answers likelier weigh more: greedy answers gain",
        Side("THR, tilt 0.1", partial(token_hidden_reward, tilt=0.1)),
        texts.chains,
        Effort(updates=30),
        GREEDY,
    ),
    Claim(
        "hidden_reward_explore",
        "tokens that make right answers likelier weigh less: pass@16 gains",
        Side("THR, tilt -0.1", partial(token_hidden_reward, tilt=-0.1)),
        texts.chains,
        Effort(updates=30),
        pass_at(16),
    ),
]
