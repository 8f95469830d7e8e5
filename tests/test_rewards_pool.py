"""The pool of processes: order, what dies, what hangs, and how it ends. The processes are real, their files are toys."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from rewards import pool
from rewards.pool import Pool, Reply, Task, collect, count_problems, default_processes, shared

TOY = """
import json, os, sys, time

print("ready", flush=True)
for line in sys.stdin.buffer:
    asked = json.loads(line)
    arrays = [sys.stdin.buffer.read(size) for size in asked["sizes"]]
    time.sleep(asked.get("sleep", 0))
    if asked.get("die"):
        os._exit(3)
    if asked.get("half"):
        print('{"value": ', end="", flush=True)
        os._exit(0)
    print(json.dumps(asked.get("reply") or {"value": [os.getpid(), *map(sum, arrays)]}), flush=True)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path


@pytest.fixture
def two(toy: Path) -> Iterator[Pool]:
    made = Pool(toy, processes=2, timeout=20)
    yield made
    made.close()


def ask(made: Pool, *headers: dict[str, object], arrays: tuple[bytes, ...] = ()) -> list[Reply]:
    return collect([made.submit(Task(header, arrays)) for header in headers])


def gone(pid: int) -> bool:
    """Whether a process has ended, given a few seconds."""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.05)
    return False


def test_answers_come_in_the_order_of_the_questions_whichever_is_ready_first(two: Pool):
    futures = [two.submit(Task({"sleep": 0.4 if row == 0 else 0}, [bytes([row])])) for row in range(9)]
    replies = collect(futures)
    assert [reply.value[1] for reply in replies] == list(range(9))
    assert len({reply.value[0] for reply in replies}) == 2  # both processes worked


def test_arrays_arrive_whole_also_those_larger_than_a_pipe_and_empty_ones(two: Pool):
    (reply,) = ask(two, {}, arrays=(b"\x01" * 300_000, b"", bytes([7])))
    assert reply.value[1:] == [300_000, 0, 7]


def test_a_process_that_dies_costs_one_answer_and_is_replaced(two: Pool):
    replies = ask(two, {}, {"die": True}, {"half": True}, {}, {}, {})
    assert [reply.value is None for reply in replies] == [False, True, True, False, False, False]
    assert replies[1].problem == replies[2].problem == "the process died or took more than 20 s"


def test_a_process_that_is_killed_from_outside_costs_one_answer(two: Pool):
    future = two.submit(Task({"sleep": 30}))
    while two.workers[0].process is None and two.workers[1].process is None:
        time.sleep(0.01)
    (busy,) = [worker.process for worker in two.workers if worker.process is not None]
    os.kill(busy.pid, signal.SIGKILL)
    assert future.result().problem and ask(two, {})[0].value is not None


def test_a_process_that_hangs_is_ended_after_the_limit(toy: Path):
    made = Pool(toy, processes=1, timeout=1)
    begin = time.monotonic()
    replies = ask(made, {"sleep": 60}, {})
    assert time.monotonic() - begin < 20
    assert replies[0].problem == "the process died or took more than 1 s" and replies[1].value is not None
    made.close()


def test_a_file_that_does_not_start_raises(tmp_path: Path):
    path = tmp_path / "broken.py"
    path.write_text("print('hello')")
    made = Pool(path, processes=1, timeout=1)
    with pytest.raises(RuntimeError, match=r"the process .*broken\.py did not start"):
        ask(made, {})
    made.close()


def test_an_interrupt_drops_the_questions_that_wait(toy: Path):
    made, interrupted = Pool(toy, processes=1, timeout=20), Future[Reply]()
    interrupted.set_exception(KeyboardInterrupt())
    waiting = [made.submit(Task({"sleep": 5})) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        collect([interrupted, *waiting])
    assert sum(future.cancelled() for future in waiting) >= 2
    made.close()


def test_closing_ends_the_processes(two: Pool):
    pids = {reply.value[0] for reply in ask(two, *[{"sleep": 0.2}] * 2)}
    two.close()
    assert len(pids) == 2 and all(map(gone, pids))


def test_who_asks_with_the_same_options_shares_the_processes(toy: Path):
    assert shared(toy, 1, 5.0) is shared(toy, 1, 5.0)
    assert shared(toy, 1, 5.0) is not shared(toy, 2, 5.0)


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_script_without_a_guard_may_use_it_and_however_it_ends_no_process_is_left(toy: Path, end: str):
    code = f"""
import os, signal, sys
from pathlib import Path
from rewards.pool import Task, collect, shared

pool = shared(Path({str(toy)!r}), 2, 20.0)
print(*[reply.value[0] for reply in collect([pool.submit(Task({{"sleep": 0.2}})) for _ in range(2)])], flush=True)
{end}
"""
    root = str(Path(pool.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": root}
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(set(pids)) == 2, done.stderr
    assert all(map(gone, pids))


@pytest.mark.parametrize(
    ("processes", "timeout", "message"),
    [(0, 1.0, "processes is 0; expected at least 1"), (1, 0.0, "timeout is 0.0 s; expected more than 0")],
)
def test_a_pool_of_nothing_and_a_limit_of_nothing_are_refused(toy: Path, processes: int, timeout: float, message: str):
    with pytest.raises(ValueError, match=message):
        Pool(toy, processes, timeout)


def test_the_cores_of_this_process_are_counted_up_to_four():
    assert 1 <= default_processes() <= 4


def test_problems_are_counted_by_cause_in_one_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "rewards.pool"):
        count_problems(
            "stoi", [Reply(value=[1.0]), Reply(problem="late"), Reply(problem="E: x"), Reply(problem="late")]
        )
        count_problems("stoi", [Reply(value=[1.0])])
    assert [record.message for record in caplog.records] == ["stoi: 3 of 4 samples have no score: E: x (1), late (2)"]
