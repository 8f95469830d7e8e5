"""Work for processes that are not torch's: a file of ours runs in several of them, each answering one question at a time.

A question is a line of JSON, whose `sizes` tell how many bytes of each array follow it; the answer is a line of JSON. The
processes start when they are first needed, outlive the rewards that use them and end with this one. Nothing is pickled and
nobody's `__main__` runs again, so a script without a guard may use them.
"""

import atexit
import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
START = 120.0  # s, for the imports of a process on a busy machine
LOOK = 0.2  # s between two looks for processes that are late
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
Process = subprocess.Popen[bytes]


class Task(NamedTuple):
    """One question."""

    header: Mapping[str, object]  # what JSON can hold
    arrays: Sequence[bytes | memoryview] = ()  # of single bytes, in the order that the file expects


class Reply(NamedTuple):
    """Its answer."""

    value: Any = None  # what the file said; None: there is no answer
    problem: str = ""  # then why


def default_processes() -> int:
    """The cores that this process may use, at most 4."""
    try:
        return min(len(os.sched_getaffinity(0)), 4)
    except AttributeError:  # only Linux knows
        return min(os.cpu_count() or 1, 4)


class Worker:
    """One process, started when it is needed and started anew after it was killed or died."""

    def __init__(self, file: Path, timeout: float) -> None:
        self.command = [sys.executable, "-P", "-W", "ignore", str(file)]
        self.timeout = timeout
        self.process: Process | None = None
        self.ended = False
        self.deadline = math.inf  # of the clock `time.monotonic`, s

    def start(self) -> Process:
        """A process that has said that it is ready; raises RuntimeError if it does not."""
        pipe, environment = subprocess.PIPE, os.environ | ONE_THREAD
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, env=environment)
        if self.ended:  # by another thread, which had no process to kill yet
            self.process.kill()
        if self.converse(self.process, START, ()) != b"ready\n":
            self.close()
            raise RuntimeError(f"the process {' '.join(self.command)} did not start; its error stands above")
        return self.process

    def ask(self, task: Task) -> Reply:
        """The answer, or why there is none: the process died, or was killed after `timeout` seconds."""
        process, line = self.process or self.start(), b""
        header = {**task.header, "sizes": [len(array) for array in task.arrays]}
        try:
            line = self.converse(process, self.timeout, (json.dumps(header).encode() + b"\n", *task.arrays))
        finally:
            if not line.endswith(b"\n"):  # no answer, or half of one
                self.close()
        if not line.endswith(b"\n"):
            return Reply(problem=f"the process died or took more than {self.timeout:g} s")
        return Reply(**json.loads(line))

    def converse(self, process: Process, limit: float, message: Iterable[bytes | memoryview]) -> bytes:
        """The process's next line after it was sent a message; empty if it ended, or took more than `limit` seconds."""
        assert process.stdin is not None and process.stdout is not None
        deadline = self.deadline = time.monotonic() + limit
        try:
            for part in message:
                process.stdin.write(part)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            return b""
        finally:
            self.deadline = math.inf
        return b"" if time.monotonic() > deadline else line  # it may have been killed as it answered

    def end(self) -> None:
        """Kill the process, from any thread, for good: a question that it is working on finds it dead."""
        self.ended, process = True, self.process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Let go of a process, whatever it is doing."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:  # it still held a question that the process never read
                pass


class Pool:
    """So many processes that run one file; a process that dies costs the answer to its own question alone."""

    def __init__(self, file: Path, processes: int, timeout: float) -> None:
        if processes < 1:
            raise ValueError(f"processes is {processes}; expected at least 1")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout} s; expected more than 0")
        self.workers = [Worker(file, timeout) for _ in range(processes)]
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(processes, thread_name_prefix=file.stem)
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, task: Task) -> Future[Reply]:
        """The answer that is to come; at once, whatever the processes are doing."""
        return self.threads.submit(self._ask, task)

    def _ask(self, task: Task) -> Reply:
        worker = self.idle.get()
        try:
            return worker.ask(task)
        finally:
            self.idle.put(worker)

    def _watch(self) -> None:
        """Kill what is late; one thread looks at all, for a timer at each question costs more than the hand-over."""
        while not self.closed.wait(LOOK):
            now = time.monotonic()
            for worker in self.workers:
                process = worker.process
                if process is not None and now > worker.deadline:
                    process.kill()

    def drop(self) -> None:
        """Kill what the processes work on: those questions have no answer, the next ones start the processes anew."""
        for worker in self.workers:
            process = worker.process
            if process is not None:
                process.kill()

    def close(self) -> None:
        """End the processes; questions that wait are dropped."""
        self.closed.set()
        for worker in self.workers:
            worker.end()
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.close()


@cache
def shared(file: Path, processes: int, timeout: float) -> Pool:
    """The pool that everyone who asks with the same options shares; it closes with the interpreter."""
    pool = Pool(file, processes, timeout)
    atexit.register(pool.close)
    return pool


def collect(futures: Sequence[Future[Reply]]) -> list[Reply]:
    """The answers in the order of the questions; after an interrupt the questions that wait are dropped."""
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()  # does nothing to one that is answered


def count_problems(name: str, replies: Sequence[Reply]) -> None:
    """One line of the log that counts the questions without an answer, by cause."""
    if problems := Counter(reply.problem for reply in replies if reply.problem):
        why = ", ".join(f"{problem} ({count})" for problem, count in sorted(problems.items()))
        log.warning("%s: %d of %d samples have no score: %s", name, problems.total(), len(replies), why)
