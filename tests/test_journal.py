"""The metrics of a resumed run read like those of an uninterrupted one, in the file and in every tracker."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmgrpo.journal import FILE, Journal, Stopwatch, peak_memory, read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


def reward(iteration: int) -> float:
    return (iteration * 0.37 + 1e-17) ** 0.5


def scalars(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("reward/total")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_a_line_per_iteration_is_on_disk_before_the_next_begins(tmp_path):
    with Journal(tmp_path, trackers=()) as journal:
        for iteration in range(3):
            journal.write(iteration, {"reward/total": reward(iteration), "count": 2**53 + 1})
            lines = (tmp_path / FILE).read_text().splitlines()
            assert len(lines) == iteration + 1
            assert json.loads(lines[-1]) == {
                "iteration": iteration,
                "reward/total": reward(iteration),
                "count": 2**53 + 1,
            }


def test_numbers_that_are_not_finite_are_null_in_strict_json_and_themselves_in_a_tracker(tmp_path):
    metrics = {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "reward/total": float("inf")}
    with Journal(tmp_path) as journal:
        journal.write(0, metrics)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert line == {"iteration": 0, "a": None, "b": None, "c": None, "reward/total": None} == read(tmp_path)[0]
    assert scalars(tmp_path) == {0: float("inf")}


@pytest.mark.parametrize("resume_at", [0, 3, 5])
def test_a_resumed_journal_equals_an_uninterrupted_one(tmp_path, resume_at):
    for name, stop in (("whole", 8), ("resumed", 5)):
        with Journal(tmp_path / name) as journal:
            for iteration in range(stop):
                journal.write(iteration, {"reward/total": reward(iteration), "share": iteration / 3})
    with Journal(tmp_path / "resumed", resume_at=resume_at) as journal:
        for iteration in range(resume_at, 8):
            journal.write(iteration, {"reward/total": reward(iteration), "share": iteration / 3})
    assert (tmp_path / "resumed" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert scalars(tmp_path / "resumed") == scalars(tmp_path / "whole")


def test_a_line_that_a_kill_cut_off_is_dropped_and_other_damage_is_named(tmp_path):
    path = tmp_path / FILE
    path.write_text('{"iteration": 0, "a": 1.5}\n{"iteration": 1, "a')
    with Journal(tmp_path, resume_at=1, trackers=()) as journal:
        journal.write(1, {"a": 2.5})
    assert read(tmp_path) == [{"iteration": 0, "a": 1.5}, {"iteration": 1, "a": 2.5}]
    path.write_text('{"iteration": 0}\n{"iteration"\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match=rf"{FILE}:2: invalid JSON"):
        Journal(tmp_path, resume_at=1, trackers=())


def test_what_was_written_survives_a_kill(tmp_path):
    code = (
        "import pathlib, sys; from mmgrpo.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), trackers=())\n"
        "for i in range(10**9): journal.write(i, {'a': i / 7})"
    )
    root = Path(__file__).resolve().parent.parent
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    deadline = time.monotonic() + 60
    while len(read_when_there(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    with writer:
        writer.kill()
    lines = read(tmp_path)
    assert len(lines) >= 3 and lines == [{"iteration": i, "a": i / 7} for i in range(len(lines))]


def read_when_there(folder: Path) -> list[str]:
    path = folder / FILE
    return path.read_text().splitlines() if path.exists() else []


def test_a_new_run_does_not_overwrite_an_old_one_and_iterations_only_ascend(tmp_path):
    with Journal(tmp_path, trackers=()) as journal:
        journal.write(3, {})
        for iteration in (3, 2):
            with pytest.raises(ValueError, match=f"iteration {iteration} comes after iteration 3"):
                journal.write(iteration, {})
        with pytest.raises(ValueError, match="a metric is named 'iteration'"):
            journal.write(4, {"iteration": 4})
    with pytest.raises(ValueError, match="is there already"):
        Journal(tmp_path, trackers=())


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tracker is 'wand'; expected one of tensorboard, wandb, trackio"):
        Journal(tmp_path / "run", trackers=("wand",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else True)
    with pytest.raises(ValueError, match="tracker is 'wandb', which is not installed; expected `pip install wandb`"):
        Journal(tmp_path / "run", trackers=("tensorboard", "wandb"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_an_installed_tracker_takes_metrics_and_goes_on_after_a_resume(tmp_path, offline, name):
    pytest.importorskip(name)
    with Journal(tmp_path / "run", trackers=(name,)) as journal:
        for iteration in range(3):
            journal.write(iteration, {"reward/total": reward(iteration), "a": float("nan")})
    with Journal(tmp_path / "run", resume_at=2, trackers=(name,)) as journal:
        journal.write(2, {"reward/total": reward(2)})
    assert [line["iteration"] for line in read(tmp_path / "run")] == [0, 1, 2]
    assert any((tmp_path / ("run/wandb" if name == "wandb" else "trackio")).iterdir())


def test_phases_add_up_also_after_an_error_and_start_again_when_taken():
    watch = Stopwatch(torch.device("cpu"))
    with watch.measure("whole"):
        for _ in range(2):
            with watch.measure("rollout"):
                time.sleep(0.02)
        with pytest.raises(KeyError), watch.measure("update"):
            time.sleep(0.01)
            raise KeyError
    seconds = watch.take()
    assert list(seconds) == ["seconds/rollout", "seconds/update", "seconds/whole"]
    assert seconds["seconds/rollout"] >= 0.04 and seconds["seconds/update"] >= 0.01
    assert seconds["seconds/whole"] >= seconds["seconds/rollout"] + seconds["seconds/update"]
    assert watch.take() == {}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_peak_memory_grows_by_what_was_held_and_does_not_shrink():
    """In a forked process, whose peak begins at what it holds."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        peaks = [peak_memory()["memory/resident_bytes"]]
        held = b"x" * 2**28
        peaks.append(peak_memory()["memory/resident_bytes"])
        del held
        peaks.append(peak_memory(torch.device("cpu"))["memory/resident_bytes"])
        os.write(send, json.dumps(peaks).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        before, during, after = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert during <= after < during + 2**22  # the process itself goes on needing a little
    assert during - before == pytest.approx(2**28, rel=0.1)
