"""Checkpoints that are whole or absent: written beside, made durable, then renamed; and exact packing of any state.

run/checkpoints/000007_iteration_12/   the seventh checkpoint of the run, after 12 iterations
    NAME.safetensors                   tensors, one file per name that the caller gave
    facts.json                         everything else
    manifest.json                      size and SHA-256 of every other file; without it a checkpoint is incomplete
The highest serial number is the newest, also when a run went back to an earlier iteration.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

TensorFiles = dict[str, dict[str, Tensor]]  # file name without suffix -> name -> tensor
UNFINISHED, REMOVED = ".unfinished_", ".removed_"


def write(
    run: Path,
    iteration: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, object],
    *,
    keep: int = 2,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write the state after `iteration` iterations and drop all but the newest `keep` checkpoints; -> its folder.

    `tensors` is file name -> name -> tensor of any layout, device and sharing; `facts` must survive JSON (see `pack`).
    `extra` may write further files into the folder it is given. A process killed at any moment leaves either the new
    checkpoint or the ones before. One process at a time may write to a run; ValueError for what cannot be stored.
    """
    if keep < 1 or iteration < 0:
        raise ValueError(f"cannot keep {keep} checkpoints of iteration {iteration}; expected at least 1, and from 0")
    text = _json(facts)
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in (*parent.glob(UNFINISHED + "*"), *parent.glob(REMOVED + "*")):  # of a process that was killed
        shutil.rmtree(leftover)
    serial = max((_serial(path) for path in _checkpoints(run)), default=0) + 1
    final = parent / f"{serial:06d}_iteration_{iteration}"
    folder = parent / (UNFINISHED + final.name)
    folder.mkdir()
    try:
        if extra is not None:
            extra(folder)
        _write_files(folder, tensors, text)
        folder.rename(final)
    finally:  # gone after a success; after a failure, a full disk say, it must not fill the disk further
        shutil.rmtree(folder, ignore_errors=True)
    _sync(parent)
    _rotate(run, keep)
    return final


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; every newer, incomplete one is named in a warning."""
    for leftover in sorted((run / "checkpoints").glob(UNFINISHED + "*")):
        warnings.warn(f"skipped {leftover}: it was never finished", stacklevel=2)
    for path in reversed(_checkpoints(run)):
        flaw = _flaw(path, thorough=True)
        if flaw is None:
            return path
        warnings.warn(f"skipped {path}: {flaw}", stacklevel=2)
    return None


def saved(run: Path) -> dict[int, Path]:
    """The checkpoints of a run that look complete, by the iterations done; of several of one iteration the newest."""
    whole = [path for path in _checkpoints(run) if _flaw(path, thorough=False) is None]
    return {int(path.name.rpartition("_")[2]): path for path in whole}


def read(path: Path) -> tuple[TensorFiles, dict[str, object]]:
    """Tensors (on the CPU) and facts of a checkpoint, as given to `write`; raises ValueError if it is not complete."""
    flaw = _flaw(path, thorough=True)
    if flaw is not None:
        raise ValueError(f"cannot read checkpoint {path}: {flaw}")
    manifest = json.loads((path / "manifest.json").read_text())
    tensors = {name: aligned(load_file(path / f"{name}.safetensors")) for name in manifest["tensors"]}
    return tensors, facts(path)


def facts(path: Path) -> dict[str, object]:
    """The facts of a checkpoint alone, without proof that it is complete."""
    found: dict[str, object] = json.loads((path / "facts.json").read_text())
    return found


def aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own: those of a file lie anywhere, and sums over such ones may round otherwise."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _write_files(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], facts: str) -> None:
    """Add tensors, facts and, after all other files are on the disk, the manifest."""
    for name, values in tensors.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or (folder / f"{name}.safetensors").exists():
            raise ValueError(f"{name!r} cannot name a file of tensors; expected unused letters, digits, '_' or '-'")
        save_file(storable(values), folder / f"{name}.safetensors")
    (folder / "facts.json").write_text(facts)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (folder / "manifest.json").write_text(json.dumps({"files": sizes, "tensors": list(tensors)}, indent=1))
    for path in (*files, folder / "manifest.json", *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors without common storage: a tied or overlapping tensor is stored once per name."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    return stored


def _json(facts: Mapping[str, object]) -> str:
    try:
        text = json.dumps(facts, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts cannot be stored: {error}; expected what JSON holds, or the facts of pack()") from None
    changed = [name for name, value in json.loads(text).items() if facts.get(name) != value]
    if changed:
        raise ValueError(
            f"fact {changed[0]!r} would change in JSON; expected lists and text keys, or the facts of pack()"
        )
    return text


def _checkpoints(run: Path) -> list[Path]:
    """Folders named like a checkpoint, oldest first."""
    return sorted((path for path in (run / "checkpoints").glob("*_iteration_*") if _serial(path)), key=_serial)


def _serial(path: Path) -> int:
    """Number of a checkpoint in its run, from 1; 0 for a folder that is none."""
    match = re.fullmatch(r"(\d+)_iteration_\d+", path.name)
    return int(match[1]) if match else 0


def _rotate(run: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` that look complete; their contents were proven when written."""
    kept = 0
    for path in reversed(_checkpoints(run)):
        if kept >= keep:
            shutil.rmtree(path.rename(path.with_name(REMOVED + path.name)))  # a kill leaves no half of a checkpoint
        elif _flaw(path, thorough=False) is None:
            kept += 1


def _flaw(path: Path, *, thorough: bool) -> str | None:
    """Why a checkpoint is not complete; None if it is. `thorough` compares contents, not only sizes."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
    except FileNotFoundError:
        return "it has no manifest.json"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "its manifest.json is damaged"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes; expected {expected['bytes']}"
        if thorough and _sha256(file) != expected["sha256"]:
            return f"{name} is damaged: its SHA-256 differs"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
