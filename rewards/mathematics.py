"""Is the answer the same mathematics as the target? Compared by the math-verify library in a process of its own.

The library evaluates what it reads, and an answer such as 9^9^9^9 keeps it busy for ever; its own limit of time is a
signal, which threads cannot use. So each comparison has a limit after which its process is killed. B samples.
"""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from torch import Tensor

from mmgrpo.types import Prompt, Reward, Samples
from rewards.answers import accepted, score_answers, unusable

log = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("mathematics_worker.py")
START = 120.0  # s, for the imports of the process on a busy machine
Process = subprocess.Popen[str]


def read_line(process: Process, limit: float, line: str = "") -> str:
    """The process's next line after it was sent one; empty if it ended, or was killed after `limit` seconds."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        if line:
            pipe(process.stdin).write(line + "\n")
            pipe(process.stdin).flush()
        reply = pipe(process.stdout).readline()
    except BrokenPipeError:
        return ""
    finally:
        timer.cancel()
        timer.join()
    return "" if late.is_set() else reply  # a process that was killed as it answered takes no further question


def pipe(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end


class Comparer:
    """One process that compares, started when it is needed and started anew after it was killed or died."""

    def __init__(self, timeout: float, digits: int) -> None:
        self.timeout, self.digits = timeout, digits
        self.process: Process | None = None
        self.lock = threading.Lock()  # one question at a time

    def start(self) -> Process:
        """A process that has said that it is ready; raises RuntimeError if it does not."""
        command = [sys.executable, "-P", "-W", "ignore", str(WORKER)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        if read_line(process, START) != "ready\n":
            self.stop(process)
            raise RuntimeError(f"the process {' '.join(command)} did not start; its error stands above")
        return process

    def stop(self, process: Process) -> None:
        """End the process, whatever it is doing."""
        process.kill()
        process.wait()
        for end in (process.stdin, process.stdout):
            try:
                pipe(end).close()
            except BrokenPipeError:  # it still held a line that the process never read
                pass

    def __call__(self, target: str, answer: str) -> tuple[bool | None, bool]:
        """Whether they are equal (None: the target is no expression), and whether an answer came in time."""
        with self.lock:
            self.process = self.process or self.start()
            question, reply = json.dumps({"target": target, "answer": answer, "digits": self.digits}), ""
            try:
                reply = read_line(self.process, self.timeout, question)
            finally:
                if not reply:  # also after an interrupt: the answer that is to come is no later question's
                    self.close()
            return (json.loads(reply), True) if reply else (False, False)

    def close(self) -> None:
        if self.process is not None:
            self.stop(self.process)
        self.process = None

    def __del__(self) -> None:
        self.close()


def equal_mathematics(*, tag: str | None = None, digits: int = 6, timeout: float = 5.0, limit: int = 2000) -> Reward:
    """1 if the answer is mathematically equal to the target, or to one of several, else 0; (B,).

    Numbers to `digits` decimals, fractions, LaTeX, equations, sets, intervals, matrices. Out of prose the library takes
    the last \\boxed{} or "final answer", or else what follows "answer", or else the last expression. Answers longer than `limit`
    characters, and those that take more than `timeout` seconds or the process's 4 GB, are 0; the latter are logged.
    A target that is no expression raises ValueError. Source: math-verify, as in VLAA-Thinker (arXiv 2504.11468).
    """
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout} s; expected more than 0")
    comparer = Comparer(timeout, digits)

    def reward(samples: Samples) -> Tensor:
        late = 0

        def score(found: str, right: tuple[Prompt, tuple[str, ...]]) -> float:
            nonlocal late
            if len(found) > limit:
                return 0.0
            for target in right[1]:
                equal, in_time = comparer(target, found)
                if equal is None:
                    raise unusable(right[0], "a mathematical expression")
                late += not in_time
                if equal:
                    return 1.0
            return 0.0

        values = score_answers(samples, tag, with_prompt, score)
        if late:
            log.warning(
                "%d comparisons of %d answers took more than %g s, or ended the process", late, len(values), timeout
            )
        return values

    return reward


def with_prompt(prompt: Prompt) -> tuple[Prompt, tuple[str, ...]] | None:
    """The accepted targets beside their prompt, which the error of an unusable one names."""
    targets = accepted(prompt)
    return None if targets is None else (prompt, targets)
