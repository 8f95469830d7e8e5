"""What the demos share: a shipped recipe with its files in place, an alignment that is timed, curves and a summary."""

import json
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from mmgrpo import journal
from mmgrpo.recipe import load
from mmgrpo.run import Run, start
from mmgrpo.trainer import begin

PHASES = ("seconds/rollout", "seconds/score", "seconds/update")
Points = tuple[list[float], list[float]]  # x and y of a line


def started(recipe: str, seed: int, places: Mapping[str, Path], overrides: Sequence[str]) -> Run:
    """The run of a shipped recipe; `places` are the paths that it leaves open, by key."""
    paths = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
    return start(
        load(Path(str(files("pipelines") / "recipes" / f"{recipe}.toml")), [f"seed={seed}", *paths, *overrides])
    )


def align(training: Run, folder: Path) -> dict[str, float]:
    """Check and train, and write the aligned weights; -> how long it took."""
    begun = time.perf_counter()
    begin(training, folder)
    seconds = time.perf_counter() - begun
    with training.averaged():
        training.policy.save(folder / "aligned")
    trained = sum(float(line[name] or 0) for line in journal.read(folder) for name in PHASES)
    return {"seconds": trained, "seconds_with_checks": seconds}


def points(lines: Sequence[journal.Line], name: str, start: float | None = None) -> Points:
    """How many iterations were done when a metric was written, and its values; a start stands at 0."""
    found = [(float(line["iteration"] or 0) + 1, line[name]) for line in lines if name in line]
    known = [(at, float(value)) for at, value in found if value is not None]
    known = known if start is None else [(0.0, start), *known]
    return [at for at, _ in known], [value for _, value in known]


def conclude(folder: Path, summary: Mapping[str, object], pictures: Mapping[str, str]) -> None:
    """Write summary.json, print it, and say where each picture lies; `pictures` are file names by what they show."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    for shown, name in pictures.items():
        print(f"{shown}: {folder / name}")
