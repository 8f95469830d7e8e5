"""Records of data files, of folders of files and of Hugging Face data sets, each with the line where it begins."""

import csv
import glob
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

FILE_KINDS = (".jsonl", ".csv", ".txt")
WILDCARDS = frozenset("*?[")


class Row(NamedTuple):
    """One record of the data, and where to look for it."""

    line: int  # where the record begins, from 1
    named_at: int  # the line that names its columns: the header of a CSV file
    values: Mapping[str, object]


class Problem(NamedTuple):
    line: int
    text: str


def read_rows(
    source: str, media_columns: Set[str], split: str, revision: str | None, beside: Mapping[str, str]
) -> Iterator[Row | Problem]:
    """Records of a .jsonl, .csv or .txt file, of files that match a pattern, of a folder of `datasets`, or of a hub data set.

    Broken ones are problems. A text file has one record a line, with the single column "prompt"; blank lines are skipped.
    Files are records in the order of their names, with the columns "file" and "prompt" (its name without the ending) and
    those of `beside`, which concerns them alone. `split`, `revision` and `media_columns` concern data sets alone: encoded
    media in `media_columns` become paths, those in other columns are left out. Raises ValueError if the source cannot be
    read at all.
    """
    path = Path(source)
    if is_pattern(source):
        return _file_rows(source, beside)
    if beside:
        raise ValueError(f"beside is {dict(beside)}, but {source} is no pattern of files such as 'noisy/*.flac'")
    if source.endswith(FILE_KINDS) and not path.is_file():
        raise ValueError(f"{source} does not exist")
    if not path.is_file():
        return _dataset_rows(source, media_columns, split, revision)
    readers = dict(zip(FILE_KINDS, (_jsonl_rows, _csv_rows, _txt_rows), strict=True))
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(readers)}")
    data = path.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text: {error.reason}") from None
    return readers[path.suffix.lower()](content)


def is_pattern(source: str) -> bool:
    """Whether the source is a pattern of files such as "noisy/*.flac", rather than one file of that name."""
    return not WILDCARDS.isdisjoint(source) and not Path(source).exists()


def folder_of(source: str) -> Path:
    """What the paths in the records are relative to: the part of a pattern before its wildcards, a file's own folder."""
    path = Path(source)
    if is_pattern(source):
        first = next(place for place, part in enumerate(path.parts) if not WILDCARDS.isdisjoint(part))
        return Path(*path.parts[:first])
    return path.parent if path.is_file() else path


def _file_rows(source: str, beside: Mapping[str, str]) -> Iterator[Row | Problem]:
    """One record a file; `beside` maps columns to folders, relative to the pattern's, with a file of the same name."""
    folder = folder_of(source)
    pattern = str(Path(source).relative_to(folder))
    names = sorted(Path(name).as_posix() for name in glob.glob(pattern, root_dir=folder, recursive=True))
    taken = {"file", "prompt"} & beside.keys()
    if taken:
        raise ValueError(f"beside names column {min(taken)!r}, which is the file's own; expected another name")
    for line, name in enumerate((name for name in names if (folder / name).is_file()), start=1):
        others = {column: (Path(other) / name).as_posix() for column, other in beside.items()}
        missing = [
            f"{column!r}: {folder / other}" for column, other in others.items() if not (folder / other).is_file()
        ]
        if missing:
            yield Problem(line, f"{name} has no file of its name for column {', '.join(missing)} does not exist")
        else:
            yield Row(line, line, {"file": name, "prompt": Path(name).stem, **others})


def _jsonl_rows(content: str) -> Iterator[Row | Problem]:
    for line, record in enumerate(io.StringIO(content, newline=None), start=1):
        if not record.strip():
            continue
        try:
            values = json.loads(record)
        except json.JSONDecodeError as error:
            yield Problem(line, f"invalid JSON: {error.msg} (column {error.colno})")
            continue
        if isinstance(values, dict):
            yield Row(line, line, values)
        else:
            yield Problem(line, f"is a JSON {type(values).__name__}; expected an object")


def _csv_rows(content: str) -> Iterator[Row | Problem]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    names: list[str] = []
    named_at = line = 1
    try:
        for cells in reader:
            if names and cells and len(cells) != len(names):
                yield Problem(line, f"has {len(cells)} cells; expected {len(names)}, as in the header")
            elif names and cells:
                yield Row(line, named_at, dict(zip(names, cells, strict=True)))
            elif cells:
                names, named_at = cells, line
                for name in {name for name in names if names.count(name) > 1}:
                    yield Problem(line, f"names column {name!r} twice")
            line = reader.line_num + 1  # a quoted cell may have spanned lines
    except csv.Error as error:
        yield Problem(line, f"invalid CSV: {error}")


def _txt_rows(content: str) -> Iterator[Row]:
    for line, record in enumerate(io.StringIO(content, newline=None), start=1):
        if record.strip():
            yield Row(line, line, {"prompt": record.rstrip("\n")})


def _dataset_rows(source: str, media_columns: Set[str], split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    folder = Path(source)
    try:
        if (folder / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(str(folder / split))
        elif (folder / "state.json").is_file():
            table = datasets.load_from_disk(str(folder))
        else:
            table = datasets.load_dataset(source, split=split, revision=revision)
    except OSError as error:  # datasets' own "not found" and every failure of disk or network
        raise ValueError(f"{source} is no file, and datasets cannot load it: {error}") from error
    kinds = (datasets.Image, datasets.Audio, datasets.Video)
    encoded = [name for name, feature in table.features.items() if isinstance(feature, kinds)]
    for name in encoded:  # keep files as files: rewards and policies open them in their own way
        table = table.cast_column(name, type(table.features[name])(decode=False))
    table = table.remove_columns([name for name in encoded if name not in media_columns])
    store = Path(datasets.config.HF_DATASETS_CACHE) / "mmgrpo_media"
    for line, values in enumerate(table, start=1):
        files = {name: _stored_file(values[name], store) for name in encoded if name in values}
        yield Row(line, line, {**values, **files})


def _stored_file(cell: Mapping[str, object] | None, store: Path) -> str | None:
    """Path of an undecoded medium; bytes that lie inside the data set are written to `store` under their own hash."""
    if cell is None or not isinstance(cell["bytes"], bytes):
        return None if cell is None else str(cell["path"])
    suffix = Path(str(cell["path"] or "")).suffix
    path = store / (hashlib.sha256(cell["bytes"]).hexdigest() + suffix)
    if not path.is_file():
        store.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(cell["bytes"])
        partial.replace(path)
    return str(path)
