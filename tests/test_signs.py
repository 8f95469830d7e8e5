"""Signs of a collapse on histories worked out by hand: each is seen at the iteration at which it must be, and not in healthy noise."""

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from mmgrpo.recipe import Watch
from mmgrpo.signs import History, error, read, signs

WEIGHTS = {"soft": 1.0, "cost": -0.5, "distance": 0.0}
SPREAD = 0.4  # standard deviation of the samples' rewards, in all of these histories


def told(
    rewards: Sequence[float] = (),
    *,
    name: str = "soft",
    norms: Sequence[Sequence[float]] = (),
    held_out: Mapping[int, Mapping[str, float]] | None = None,
    alike: float = 0.0,
    scale: float = 1.0,
    options: Watch | None = None,
) -> dict[str, list[int]]:
    """The iterations at which each sign that acts, or with a "?" each that is only told, was seen."""
    history, found = History(), {}
    for at in range(max(len(rewards), len(norms))):
        metrics = {"seconds/rollout": 1.0}
        if rewards:
            metrics |= {f"reward/{key}/mean": rewards[at] * scale for key in ("total", name)}
            metrics |= {"reward/total/std": SPREAD * scale, "reward/total/groups_without_spread": alike}
        errors = (held_out or {}).get(at, {})
        metrics |= {f"held_out/{key}/standard_errors": value for key, value in errors.items()}
        history = read(history, norms[at] if norms else (), metrics)
        for sign in signs(history, options or Watch(), WEIGHTS):
            assert "\n" not in sign.sentence
            found.setdefault(sign.name if sign.acts else f"{sign.name}?", []).append(at)
    return found


# ---- the gradient


CALM = [(0.05, 0.1)] * 6  # the usual norm is 0.1, and 0.4 is not over 4 times that


def test_the_third_update_over_four_times_the_median_is_seen() -> None:
    assert told(norms=[*CALM, *[(0.41,)] * 3, (0.1,)]) == {"gradient": [8]}
    assert told(norms=[*CALM, *[(0.4,)] * 9]) == {}
    assert told(norms=[*CALM, (0.41, 0.41), (0.41, 0.1), (0.1, 0.1)]) == {"gradient": [7]}, (
        "all updates of an iteration count"
    )
    assert told(norms=[*CALM, *[(0.1,)] * 2, (0.41, 0.41, 0.41)]) == {"gradient": [8]}
    assert told(norms=[*CALM, (0.41, 0.41), (0.1, 0.1), (0.41, 0.41), (0.1, 0.1)]) == {}, "not on end"
    assert told(norms=[*CALM, (9.0, 0.0), (), (9.0, 0.0), (9.0, 0.0)]) == {"gradient": [9]}, (
        "an iteration without updates"
    )


def test_the_factor_and_the_number_of_updates_are_the_recipe_s() -> None:
    assert told(norms=[*CALM, *[(0.41,)] * 2], options=Watch(norm_updates=2)) == {"gradient": [7]}
    assert told(norms=[*CALM, *[(0.25,)] * 3], options=Watch(norm_factor=2.4)) == {"gradient": [8]}


def test_passes_that_are_clipped_more_and_more_are_healthy() -> None:
    """Two updates of each of four passes: of all updates the median is 0.01, of the largest of an iteration 0.1."""
    assert told(norms=[(0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.0, 0.0)] * 20) == {}


def test_gradients_that_shrink_to_nothing_or_were_never_any_are_not_seen() -> None:
    assert told(norms=[(1.0,)] * 10 + [(1e-9,)] * 10) == {}
    assert told(norms=[(0.0,)] * 10 + [(0.3,)] * 3) == {}
    assert told(norms=[(0.1,)] * 4 + [(1.0,)] * 3) == {}, "four before are too few for a median"


@pytest.mark.parametrize("seed", range(10))
def test_norms_that_vary_by_a_factor_of_two_are_healthy(seed: int) -> None:
    drawn = random.Random(seed)
    assert told(norms=[(drawn.lognormvariate(-2, 0.6),) for _ in range(200)]) == {}


# ---- the rewards of rollouts


@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e-3])
def test_a_quiet_reward_has_fallen_when_its_mean_is_below_the_best_by_the_bound(scale: float) -> None:
    """The bound is 0.15 * 0.4 = 0.06. From 0.80 to 0.73 the mean of five falls by 0.014 an iteration, the fifth makes 0.07."""
    assert told([0.8] * 10 + [0.73] * 6, scale=scale) == {"reward": [14, 15]}
    assert told([0.8] * 10 + [0.745] * 6, scale=scale) == {}
    assert told([0.8] * 10 + [0.745] * 6, scale=scale, options=Watch(fall=0.1)) == {"reward": [13, 14, 15]}


def test_a_noisy_reward_has_fallen_when_it_is_five_standard_errors_below_its_best() -> None:
    """0.8, 0.9, 0.8, ...: neighbours differ by 0.1, so the error is 0.1 / 0.954 * sqrt(2 / 5) = 0.0663 and the bound 0.331.

    The best mean is 0.86. With 0.2 from iteration 10 on the means are 0.72, 0.60 and, at iteration 12, 0.46: below by 0.40.
    """
    noisy = [0.8, 0.9] * 5
    assert error(noisy) == pytest.approx(0.1 / 0.954 * math.sqrt(0.4))
    assert told([*noisy, 0.2, 0.2]) == {}
    assert told([*noisy, 0.2, 0.2, 0.2]) == {"reward": [12]}


def test_the_unit_is_the_prototype_s_for_rewards_between_0_and_1() -> None:
    assert Watch().fall * 1 / 3 == pytest.approx(0.05)


@pytest.mark.parametrize("rise", [0.0, 0.002], ids=["flat", "rising"])
def test_noise_of_rollouts_is_not_taken_for_a_fall(rise: float) -> None:
    """A tenth of the samples' spread, as of 16 prompts with 20 samples; a run of 120 iterations is stopped by chance in few."""
    stopped = 0
    for seed in range(20):
        drawn = random.Random(seed)
        stopped += bool(told([0.5 + rise * at + drawn.gauss(0, 0.04) for at in range(120)]))
    assert stopped <= 1


def test_too_few_rollouts_are_not_judged() -> None:
    assert told([0.9] * 5 + [0.0] * 4) == {}


def test_groups_without_spread_are_told_and_acted_on_if_asked() -> None:
    assert told([0.9] * 7, alike=0.75) == {"saturation?": [4, 5, 6]}
    assert told([0.9] * 7, alike=0.75, options=Watch(saturated=0.74)) == {"saturation": [4, 5, 6]}
    assert told([0.9] * 7, alike=0.7) == {}
    assert told([1.0] * 7, alike=1.0) == {"saturation?": [4, 5, 6]}


# ---- held-out scores

RISING = [0.5 + 0.01 * at for at in range(20)]


def test_a_held_out_score_that_falls_while_its_rollouts_rise_is_seen() -> None:
    """From +8 to +2.9 standard errors it lost 5.1, to +3.1 only 4.9; the start counts as 0."""
    assert told(RISING, held_out={4: {"soft": 3}, 9: {"soft": 8}, 14: {"soft": 2.9}}) == {"sampler": [14]}
    assert told(RISING, held_out={4: {"soft": 3}, 9: {"soft": 8}, 14: {"soft": 3.1}}) == {}
    assert told(RISING, held_out={14: {"soft": -5.1}}) == {"sampler": [14]}
    assert told(RISING[::-1], held_out={14: {"soft": -5.1}}).keys() == {"reward"}, "it fell in rollouts too"


def test_of_a_reward_of_negative_weight_less_is_better() -> None:
    assert told(RISING, name="cost", held_out={14: {"cost": -9}}) == {}
    assert told([-value for value in RISING], name="cost", held_out={14: {"cost": 9}})["sampler"] == [14]


def test_a_guarded_score_may_not_go_the_wrong_way_while_the_reward_rises() -> None:
    moved = {4: {"distance": 4.9}, 14: {"distance": 5.0}}
    assert told(RISING, held_out=moved, options=Watch(guard={"distance": "lower"})) == {"guard": [14]}
    assert told(RISING, held_out=moved, options=Watch(guard={"distance": "higher"})) == {}
    away = {14: {"distance": -6.0}}
    assert told(RISING, held_out=away, options=Watch(guard={"distance": "higher"})) == {"guard": [14]}
    assert "guard" not in told(RISING[::-1], held_out=moved, options=Watch(guard={"distance": "lower"}))


def test_what_could_be_guarded_is_told_with_the_line_that_would_guard_it() -> None:
    assert told(RISING, held_out={14: {"distance": 5.0, "soft": 7.0}}) == {"unguarded?": [14]}
    history = History()
    for at, reward in enumerate(RISING):
        errors = {"held_out/distance/standard_errors": 7.0} if at == 19 else {}
        history = read(history, (), {"reward/total/mean": reward, "reward/total/std": SPREAD} | errors)
    (sign,) = signs(history, Watch(), WEIGHTS)
    assert sign.sentence.endswith(
        'distance by +7.0 standard errors; to stop where that is worse: watch.guard = { distance = "lower" }'
    )


def test_a_score_without_a_number_says_nothing() -> None:
    assert told(RISING, held_out={14: {"soft": math.nan, "distance": math.nan}}) == {}


# ---- without rollouts


def test_without_rollouts_held_out_scores_are_read_alone() -> None:
    """As in the stage "offline", whose rewards are those of samples that were made once."""
    history = History()
    for errors in ({"soft": 6.0, "distance": 0.0}, {"soft": 0.9, "distance": 5.0}):
        history = read(history, (), {f"held_out/{name}/standard_errors": value for name, value in errors.items()})
    guarded = Watch(guard={"distance": "lower"})
    assert signs(history, guarded, WEIGHTS) == []
    found = {sign.name: sign.sentence for sign in signs(history, guarded, WEIGHTS, rolls=False)}
    assert found == {
        "sampler": "soft fell on held-out samples by 5.1 standard errors since iteration 0",
        "guard": "distance got worse by 5.0 standard errors on held-out samples",
    }
    [told] = signs(history, Watch(fall=9.0), {"distance": 0.0}, rolls=False)
    assert told.sentence.startswith("not trained on, moved: distance by +5.0 standard errors;") and not told.acts
