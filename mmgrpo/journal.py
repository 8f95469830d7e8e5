"""What a run says about itself: a line of metrics per iteration, on disk and to trackers, and where its time went."""

import importlib.util
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch

FILE = "metrics.jsonl"
Line = dict[str, float | None]


class Tracker(NamedTuple):
    """A place that shows metrics while the run goes on."""

    write: Callable[[int, Mapping[str, float]], None]  # iteration, metrics
    close: Callable[[], None]


class Journal:
    """Metrics of a run in `folder`/metrics.jsonl, one JSON object per iteration, and in the named trackers.

    A number that is not finite is written as null, which every JSON reader takes; trackers get it as it is. With
    `resume_at` = k the lines of iterations >= k are dropped, so the file goes on as that of an uninterrupted run.
    Trackers: "tensorboard" (`folder`/tensorboard), "wandb", "trackio" (project "mmgrpo", run named like the folder).
    Raises ValueError for a tracker that is unknown or not installed, and where a file would be overwritten unasked.
    """

    def __init__(
        self, folder: Path, *, resume_at: int | None = None, trackers: Sequence[str] = ("tensorboard",)
    ) -> None:
        for name in trackers:
            _require_tracker(name)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if resume_at is not None:
            _drop_from(path, resume_at)
        elif path.exists():
            raise ValueError(f"{path} is there already; expected a new folder, or a run that resumes")
        self._last = max((int(line["iteration"] or 0) for line in read(folder)), default=-1)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = [TRACKERS[name](folder, resume_at) for name in trackers]

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Add the line of an iteration and flush it; raises ValueError unless iterations ascend."""
        if iteration <= self._last:
            raise ValueError(f"iteration {iteration} comes after iteration {self._last}; expected a later one")
        if "iteration" in metrics:
            raise ValueError("a metric is named 'iteration'; expected another name, this one numbers the line")
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"iteration": iteration, **line}, allow_nan=False) + "\n")
        self._file.flush()
        self._last = iteration
        for tracker in self._trackers:
            tracker.write(iteration, numbers)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read(folder: Path) -> list[Line]:
    """The lines of a run's metrics; a last line that a kill cut off is left out. Raises ValueError for other damage."""
    path = folder / FILE
    if not path.exists():
        return []
    records = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, record in enumerate(records, start=1):
        try:
            lines += [json.loads(record)] if record else []
        except json.JSONDecodeError as error:
            if number < len(records):
                raise ValueError(f"{path}:{number}: invalid JSON: {error.msg}") from None
    return lines


class Stopwatch:
    """Seconds per named phase; on a CUDA device each phase waits for its own kernels."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase, also after an error; a phase within another counts in both."""
        begin = self._now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - begin

    def take(self) -> dict[str, float]:
        """{"seconds/PHASE": seconds} since the last call, and start again from nothing."""
        taken, self._seconds = self._seconds, {}
        return {f"seconds/{phase}": seconds for phase, seconds in taken.items()}

    def _now(self) -> float:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()


def peak_memory(device: torch.device | None = None) -> dict[str, float]:
    """Most bytes that this process held at once since it began: resident, and allocated on a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    peaks = {"memory/resident_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    if device is not None and device.type == "cuda":
        peaks["memory/cuda_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return peaks


def _drop_from(path: Path, iteration: int) -> None:
    """Keep the lines of earlier iterations; the file is replaced in one step."""
    kept = [line for line in read(path.parent) if int(line["iteration"] or 0) < iteration]
    rest = path.with_suffix(".partial")
    rest.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    rest.replace(path)


def _require_tracker(name: str) -> None:
    if name not in TRACKERS:
        raise ValueError(f"tracker is {name!r}; expected one of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"tracker is {name!r}, which is not installed; expected `pip install {name}` first, or another"
        )


# Each tracker's library is heavy and optional, so it is imported only by the run that names it.


def _tensorboard(folder: Path, resume_at: int | None) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at)

    def write(iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, iteration)
        writer.flush()

    return Tracker(write, writer.close)


def _wandb(folder: Path, resume_at: int | None) -> Tracker:
    import wandb  # type: ignore[import-not-found]

    note = folder / "wandb_run.txt"  # the id under which a resumed run goes on
    known = note.read_text() if resume_at is not None and note.exists() else None
    run = wandb.init(project="mmgrpo", name=folder.name, dir=str(folder), id=known, resume="allow")
    note.write_text(run.id)
    run.define_metric("*", step_metric="iteration")  # wandb's own steps refuse to go back, as a resumed run does

    def write(iteration: int, metrics: Mapping[str, float]) -> None:
        run.log({"iteration": iteration, **metrics})

    return Tracker(write, run.finish)


def _trackio(folder: Path, resume_at: int | None) -> Tracker:
    import trackio  # type: ignore[import-not-found]

    run = trackio.init(project="mmgrpo", name=folder.name, resume="never" if resume_at is None else "allow")

    def write(iteration: int, metrics: Mapping[str, float]) -> None:
        run.log(dict(metrics), step=iteration)

    return Tracker(write, run.finish)


TRACKERS: Mapping[str, Callable[[Path, int | None], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
