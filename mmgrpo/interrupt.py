"""Finish the step that is running when the user or the machine asks to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupts:
    """Set once a signal has arrived; a second Ctrl-C stops at once."""

    signal: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Interrupted(Exception):  # noqa: N818 - the run is sound and saved
    """A run stopped on request after saving; the message says how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number  # of the signal


@contextmanager
def listening() -> Iterator[Interrupts]:
    """Within the context SIGTERM and Ctrl-C are noted instead of ending the process; handlers are restored after it."""
    interrupts = Interrupts()
    previous = {number: signal.signal(number, interrupts.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
