"""The benchmark of time to reward: its arithmetic on curves worked out by hand, and runs of two iterations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.time_to_reward import __main__ as command
from benchmarks.time_to_reward.curves import common, crossing, middle, ratio, reached, running_mean, summary, value_at
from benchmarks.time_to_reward.measuring import Conditions, measured, recipe, settings
from benchmarks.time_to_reward.methods import BASELINE, METHODS, Method
from benchmarks.time_to_reward.report import table

from pipelines import assets

TINY = ("train.prompts=2", "train.group_size=2", "train.iterations=2")
TINY = (*TINY, "policy.rollout_rows=2", "policy.replay_rows=2", "policy.call.num_inference_steps=2")
CONDITIONS = Conditions(samples=1, every=0.0)


def line(method: str, seed: int, exact: list[float], step: float, longer: int = 1) -> dict:
    """A run that is evaluated every `step` seconds, an iteration and 10 network evaluations each."""
    seconds = [step * number for number in range(len(exact))]
    counts = {"iterations": [*range(len(exact))], "evaluations": [10 * number for number in range(len(exact))]}
    curve = {"seconds": seconds, **counts, "exact": exact, "distance": [0.1 + value / 10 for value in exact]}
    return {"method": method, "seed": seed, "longer": longer, "split": "held_out", "stopped": "", "curve": curve}


def test_the_running_mean_is_over_a_value_and_its_neighbours():
    assert running_mean([0.0, 3.0, 6.0, 0.0]) == [1.5, 3.0, 3.0, 3.0]
    assert running_mean([0.5]) == [0.5]


def test_a_level_is_crossed_on_the_straight_line_before_the_first_point_above_it():
    assert crossing([0, 2, 6], [0.6, 0.7, 0.9], 0.8) == pytest.approx(4.0)
    assert crossing([0, 2, 6, 9], [0.6, 0.9, 0.7, 0.95], 0.75) == pytest.approx(1.0)
    assert crossing([1, 2], [0.8, 0.9], 0.8) == 1
    assert crossing([0, 2], [0.6, 0.7], 0.8) is None


def test_a_level_is_reached_by_the_running_mean():
    one = line("baseline", 0, [0.6, 0.9, 0.9, 0.9], step=3.0)  # running mean 0.75, 0.8, 0.9, 0.9
    assert reached(one, 0.85, "seconds") == pytest.approx(4.5)
    assert reached(one, 0.85, "evaluations") == pytest.approx(15.0)
    assert reached(one, 0.95, "seconds") is None


def test_a_level_that_fewer_than_half_of_the_runs_reach_has_no_median():
    assert middle([3.0, None, 1.0]) == 3.0
    assert middle([3.0, None, None]) is None
    assert middle([3.0, None]) is None
    assert (ratio(8.0, 2.0), ratio(None, 2.0), ratio(8.0, None)) == (4.0, None, None)


def test_a_summary_joins_the_seeds_of_a_method():
    found = summary([line("baseline", 0, [0.6, 0.9, 0.9, 0.9], 3.0), line("baseline", 1, [0.6, 0.6, 0.8, 0.7], 3.0)])
    assert (found.method, found.seeds, found.iteration, found.start) == ("baseline", 2, 3.0, 0.6)
    assert found.finals == [pytest.approx(0.9), pytest.approx(0.7)]
    assert found.quality == (pytest.approx(0.16), pytest.approx(0.18))
    assert found.peak == pytest.approx((0.9 + 0.75) / 2)
    assert found.costs["seconds", 0.85] is None


def test_a_common_curve_ends_with_the_shortest_run():
    runs = [line("baseline", 0, [0.0, 1.0, 2.0], 2.0), line("baseline", 1, [0.0, 3.0], 2.0)]
    assert common(runs, "exact", points=2) == ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])
    assert value_at(runs[0]["curve"], "exact", 3.0) == 1.5


def test_the_table_has_a_row_for_each_method_and_one_where_it_was_left_running():
    fast = [0.6, 0.9, 0.9, 0.9]
    lines = [line("fast", 0, fast, 1.0), line("baseline", 0, fast, 4.0), line("fast", 0, [*fast, 0.2], 1.0, longer=3)]
    rows = [text.split(" | ") for text in table(lines).splitlines() if text.startswith("|")]
    baseline, other, left = (next(row for row in rows[at:] if "arXiv" in row[0]) for at in (0, 3, 4))
    assert baseline[0].startswith("| Flow-GRPO (") and baseline[2:5] == [
        "4 / 6 / 8",
        "1.0 / 1.0 / 1.0",
        "1.0 / 1.0 / 1.0",
    ]
    assert other[2:5] == ["1 / 2 / 2", "4.0 / 4.0 / 4.0", "1.0 / 1.0 / 1.0"]
    assert left[1:5] == ["3", "0.90", "0.67", "0.667"]


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
def test_a_method_is_a_recipe_that_can_be_left_running(method):
    once, longer = (recipe(method, 3, Conditions(longer=times)) for times in (1, 3))
    assert longer.train.iterations == 3 * once.train.iterations
    assert once.seed == 3 and once.prompts.source.endswith("train.jsonl") and not once.evaluation.source
    assert '"assets/image_demo"' in settings(method, 3) and str(assets.folder("image_demo")) not in settings(method, 3)


def test_tempflow_divides_the_noise_of_a_step_by_the_mean_of_its_schedule():
    times = [number / 8 for number in range(8, 1, -1)]  # of the steps but the last; 1 is noise
    std = [
        0.7 * math.sqrt(t / (1 - min(t, 7 / 8)) / 8) for t in times
    ]  # Flow-GRPO, eq. 9, its first step from the second
    objective = next(recipe(method, 0, CONDITIONS).objective for method in METHODS if method.name == "tempflow")
    assert objective["scale"] == pytest.approx(7 / sum(std), rel=1e-3)


def test_a_run_is_measured_from_before_training_to_its_end():
    found = json.loads(json.dumps(measured(Method("baseline", "", "", TINY, budget=100.0), 0, CONDITIONS)))
    curve = found["curve"]
    assert curve["iterations"] == [0, 1, 2] and found["stopped"] == ""
    assert curve["evaluations"] == [0, 8 + 12, 16 + 24]  # 4 samples in 2 steps, of which one is trained, in calls of 2
    assert curve["seconds"][0] == 0 and curve["seconds"][1] < curve["seconds"][2]
    assert all(0 <= value <= 1 for value in curve["exact"] + curve["distance"])


@pytest.mark.slow
def test_runs_are_kept_and_only_what_is_missing_or_has_changed_is_made(tmp_path, monkeypatch, capsys):
    tiny = replace(BASELINE, overrides=TINY)
    monkeypatch.setitem(command.BY_NAME, "baseline", tiny)
    call = ["--only", "baseline", "--samples", "1", "--every", "0", "--output", str(tmp_path)]
    command.main([*call, "--seeds", "1"])
    first = kept(tmp_path)
    command.main([*call, "--seeds", "2", "--workers", "2"])
    assert kept(tmp_path)[:1] == first and [one["seed"] for one in kept(tmp_path)] == [0, 1]
    monkeypatch.setitem(command.BY_NAME, "baseline", replace(tiny, overrides=(*TINY, "train.iterations=1")))
    command.main([*call, "--seeds", "1"])
    assert [one["curve"]["iterations"] for one in kept(tmp_path)] == [[0, 1]]
    assert "Flow-GRPO" in capsys.readouterr().out and (tmp_path / "time_to_reward.png").stat().st_size > 10_000


def kept(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "time_to_reward.jsonl").read_text().splitlines()]


def test_an_unknown_method_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "baseline,nothing"])
    assert "no method 'nothing'; expected some of baseline, fast" in capsys.readouterr().err
