"""What the demos share: a shipped recipe with its files in place, an alignment that is timed, curves and a summary."""

import json
import time
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from mmgrpo import journal
from mmgrpo.moved import Moved
from mmgrpo.recipe import load
from mmgrpo.run import Run, start
from mmgrpo.trainer import begin

PHASES = ("seconds/rollout", "seconds/score", "seconds/update", "seconds/teach")
Points = tuple[list[float], list[float]]  # x and y of a line


def started(
    recipe: str, seed: int, places: Mapping[str, Path], overrides: Sequence[str], without: Collection[str] = ()
) -> Run:
    """The run of a shipped recipe; `places` are the paths that it leaves open, by key; the rewards `without` are left out."""
    path = Path(str(files("pipelines") / "recipes" / f"{recipe}.toml"))
    given = [f"{key}={json.dumps(str(place))}" for key, place in places.items()]
    if without:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))["rewards"]
        given.append(f"rewards=[{', '.join(inline(table) for table in tables if table['name'] not in without)}]")
    return start(load(path, [f"seed={seed}", *given, *overrides]))


def inline(table: Mapping[str, object]) -> str:
    """A flat table as TOML writes it in one line."""
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


def align(training: Run, folder: Path) -> dict[str, float]:
    """Check and train, and write the aligned weights; -> how long it took."""
    begun = time.perf_counter()
    begin(training, folder)
    seconds = time.perf_counter() - begun
    with training.averaged():
        training.policy.save(folder / "aligned")
    trained = sum(float(line.get(name) or 0) for line in journal.read(folder) for name in PHASES)
    return {"seconds": trained, "seconds_with_checks": seconds}


def points(lines: Sequence[journal.Line], name: str, start: float | None = None) -> Points:
    """How many iterations were done when a metric was written, and its values; a start stands at 0."""
    found = [(float(line["iteration"] or 0) + 1, line[name]) for line in lines if name in line]
    known = [(at, float(value)) for at, value in found if value is not None]
    known = known if start is None else [(0.0, start), *known]
    return [at for at, _ in known], [value for _, value in known]


def told(one: Moved) -> dict[str, float | bool]:
    """A change, for summary.json."""
    return {
        "before": one.before,
        "after": one.now,
        "change": one.now - one.before,
        "standard_errors": one.errors,
        "trained_on": one.trained,
    }


def conclude(folder: Path, summary: Mapping[str, object], pictures: Mapping[str, str]) -> None:
    """Write summary.json, print it, and say where each picture lies; `pictures` are file names by what they show."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    for shown, name in pictures.items():
        print(f"{shown}: {folder / name}")
