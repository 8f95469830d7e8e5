"""Every benchmark runs at its smallest size and ends with one JSON line; what it measures there means nothing."""

import json
import math
from collections.abc import Callable
from types import ModuleType

import pytest
from benchmarks import policy_overhead, replay_batching, scaling, speech_step, update_memory, video_memory, vlm_vs_trl

ABOUT = {"benchmark", "device", "dtype", "parameters", "trained_parameters", "rows", "memory/resident_bytes"}
RATES = {"images_per_second", "tflops", "matrix_share"}
PAIRS = {"ratio", "low", "high", "fastest", "seconds", "against"}


@pytest.fixture
def last_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """Runs a benchmark at its smallest size and reads the line that it prints last."""

    def run(module: ModuleType, *arguments: str) -> dict:
        module.main(["--size", "smallest", *arguments])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["benchmark"] == module.__name__.removeprefix("benchmarks.")
        assert found.keys() >= ABOUT
        assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))
        return found

    return run


def test_the_overhead_is_given_for_the_rollout_and_for_the_replay(last_line):
    found = last_line(policy_overhead, "--pairs", "2")
    for part in ("rollout", "replay"):
        assert found[part].keys() == PAIRS | RATES
        assert found[part]["low"] <= found[part]["ratio"] <= found[part]["high"]


def test_joined_steps_are_timed_against_single_ones(last_line):
    found = last_line(replay_batching, "--pairs", "1", "--decisions", "2", "--joined", "2")
    assert found.keys() >= {"decisions", "joined", *PAIRS, *RATES}


def test_exponents_are_fitted_to_the_time_of_an_update(last_line):
    found = last_line(scaling, "--samples", "2", "4", "--decisions", "2", "3", "--rounds", "1")
    assert found.keys() >= {"samples_exponent", "decisions_exponent", *RATES}
    assert [*found["seconds_by_samples"], *found["seconds_by_decisions"]] == ["2", "4", "2", "3"]


def test_the_memory_of_an_update_is_measured_at_every_size(last_line):
    found = last_line(update_memory, "--samples", "2", "4", "--decisions", "2", "3")
    assert found.keys() >= {"growth", *RATES}
    assert [(point["samples"], point["decisions"]) for point in found["points"]] == [(2, 2), (4, 2), (2, 3), (4, 3)]
    gradients = 4 * found["trained_parameters"]  # float32
    assert all(point["peak_bytes"] > gradients for point in found["points"])


def test_memory_is_flat_in_steps_that_are_not_trained_and_grows_with_those_that_are(last_line):
    found = last_line(video_memory, "--steps", "4", "8", "--offload")
    assert [(point["steps"], point["trained"]) for point in found["points"]] == [(4, 2), (8, 2)]
    assert found["growth"] < 0.05
    assert len({point["trajectory_bytes"] for point in found["points"]}) == 1
    few, many = found["all_steps"]
    assert (few["trained"], many["trained"]) == (3, 7)
    assert many["peak_bytes"] - few["peak_bytes"] > many["trajectory_bytes"] - few["trajectory_bytes"] > 0


@pytest.mark.parametrize("text", [(), ("--text",)], ids=["pictures", "text"])
def test_a_step_and_its_update_are_set_against_those_of_trl(last_line, text):
    shape = ("--prompt-tokens", "60", "--new-tokens", "6", "--group-size", "4", "--samples-at-once", "4")
    found = last_line(vlm_vs_trl, *shape, "--pairs", "2", *text)
    for part in ("step", "update"):
        low, middle, high = found[part]["times_as_fast"]
        assert 0 < low <= middle <= high
        assert 0 < found[part]["peak_bytes"] < found[part]["trl_peak_bytes"]
    assert found["step"]["seconds"] > found["update"]["seconds"]
    assert found["step"]["trl_seconds"] > found["update"]["trl_seconds"]
    assert max(case["gradient"] for case in found["difference"].values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("network", ["band_gains", "unet"])
def test_a_step_of_speech_is_split_into_its_parts(last_line, network):
    short = ("--seconds", "0.5", "1", "--memory-seconds", "1", "--rounds", "1", "--group-size", "3", "--processes", "1")
    found = last_line(speech_step, "--network", network, *short, "--measures", "si_sdr", "stoi")
    assert [*found["seconds_by_length"]] == ["0.5", "1"]
    for parts in found["seconds_by_length"].values():
        assert parts.keys() == {"rollout", "score", "update"} and all(value > 0 for value in parts.values())
    assert found["step_peak_bytes"] > 4 * found["trained_parameters"]
