"""Is the answer the same mathematics as the target? Compared by the math-verify library in a process of its own.

The library evaluates what it reads, and an answer such as 9^9^9^9 keeps it busy for ever; its own limit of time is a
signal, which threads cannot use. So each comparison has a limit after which its process is killed. B samples.
"""

import logging
import weakref
from pathlib import Path

from torch import Tensor

from mmgrpo.types import Prompt, Reward, Samples
from rewards.answers import accepted, score_answers, unusable
from rewards.pool import Pool, Task

log = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("mathematics_worker.py")


class Comparer:
    """One process that compares; it ends with this object, and is started anew after it was killed or died."""

    def __init__(self, timeout: float, digits: int) -> None:
        self.digits = digits
        self.pool = Pool(WORKER, 1, timeout)
        weakref.finalize(self, self.pool.close)

    def __call__(self, target: str, answer: str) -> tuple[bool | None, bool]:
        """Whether they are equal (None: the target is no expression), and whether an answer came in time."""
        future = self.pool.submit(Task({"target": target, "answer": answer, "digits": self.digits}))
        try:
            reply = future.result()
        except KeyboardInterrupt:  # nobody waits for the answer that is to come
            self.pool.drop()
            raise
        return (False, False) if reply.problem else (reply.value, True)


def equal_mathematics(*, tag: str | None = None, digits: int = 6, timeout: float = 5.0, limit: int = 2000) -> Reward:
    """1 if the answer is mathematically equal to the target, or to one of several, else 0; (B,).

    Numbers to `digits` decimals, fractions, LaTeX, equations, sets, intervals, matrices. Out of prose the library takes
    the last \\boxed{} or "final answer", or else what follows "answer", or else the last expression. Answers longer than `limit`
    characters, and those that take more than `timeout` seconds or the process's 4 GB, are 0; the latter are logged.
    A target that is no expression raises ValueError. Source: math-verify, as in VLAA-Thinker (arXiv 2504.11468).
    """
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
