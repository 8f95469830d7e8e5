"""Prompts: reading and checking them before training, and choosing which of them an iteration uses.

Axes: P prompts of an iteration, G samples per prompt, B = P * G.
"""

import functools
import itertools
import mimetypes
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmgrpo.rows import Problem, Row, folder_of, read_rows
from mmgrpo.seeds import derive
from mmgrpo.types import Batch, Prompt

SHOWN_PROBLEMS = 20
# Pillow raises one of these, depending on the format and on which part of the file is damaged.
DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


FileFlaw = Callable[[str, Path], str | None]  # medium, path -> what is wrong


class Columns(NamedTuple):
    """Which column holds what; the names that the user typed."""

    text: str
    id: str | None
    media: Mapping[str, str]
    target: str | None

    def named(self) -> list[str]:
        return [name for name in (self.text, self.id, *self.media.values(), self.target) if name is not None]


def load_prompts(
    source: str,
    *,
    text: str = "prompt",
    id: str | None = None,
    media: Mapping[str, str] | None = None,
    target: str | None = None,
    beside: Mapping[str, str] | None = None,
    split: str = "train",
    revision: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read prompts from a .jsonl, .csv or .txt file, a folder of Hugging Face `datasets`, or a hub dataset's name.

    The source may also be a pattern of files ("noisy/*.flac"; "noisy/**/*.flac" with all folders inside): a prompt per
    file, with the columns "file" and "prompt", the file's name without its ending; `beside` adds columns with the file of
    the same name in other folders, {clean = "../clean"}.
    `text`, `id`, `target` and the values of `media` (medium -> column) name columns; a .txt file has one prompt a line
    and the single column "prompt". The text may be the messages of a chat, a medium a list of paths, empty for a prompt
    without it. Without `id`, ids count the rows from 0. Media paths are relative to the data file
    (or folder). Blank lines are skipped. `limit` keeps the first rows; `split` and `revision` concern data sets alone,
    of which encoded pictures, sounds and videos are kept only where `media` names them.

    Raises one ValueError that lists every problem with its line: missing column, empty prompt, missing or damaged
    medium, broken record, id used twice.
    """
    columns = Columns(text, id, media or {}, target)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    read = read_rows(source, set(columns.media.values()), split, revision, beside or {})
    entries = list(itertools.islice(read, limit))
    rows = [entry for entry in entries if isinstance(entry, Row)]
    broken = [entry for entry in entries if isinstance(entry, Problem)]
    if not entries:
        raise ValueError(f"{source} holds no prompts")
    folder = folder_of(source)
    found = (_missing_columns(rows, columns), _bad_cells(rows, columns, folder), _repeated_ids(rows, columns.id))
    problems = sorted(itertools.chain(broken, *found), key=lambda problem: problem.line)
    if problems:
        raise ValueError(_listing(source, problems))
    return [_prompt(number, row.values, columns, folder) for number, row in enumerate(rows)]


def choose(count: int, per_iteration: int, seed: int, iteration: int) -> list[int]:
    """Which of `count` prompts iteration `iteration` uses; -> `per_iteration` indices in [0, count).

    Each epoch is a permutation of its own, cut into consecutive slices that run on over the border between epochs, so
    every prompt is used once per epoch. The answer depends on the arguments alone: the iteration is the position in the
    data. No prompt comes twice in one iteration, unless `per_iteration` exceeds `count`; its uses are then separate
    groups. Raises ValueError for an empty data set or iteration.
    """
    if count < 1 or per_iteration < 1 or iteration < 0:
        raise ValueError(
            f"cannot choose {per_iteration} of {count} prompts for iteration {iteration}; "
            "expected at least 1 of at least 1, and an iteration from 0"
        )
    start, stop = iteration * per_iteration, (iteration + 1) * per_iteration
    epochs = range(start // count, (stop - 1) // count + 1)
    orders = {epoch: _epoch_order(count, per_iteration, seed, epoch) for epoch in epochs}
    return [orders[position // count][position % count] for position in range(start, stop)]


def requests(
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    *,
    group_size: int,
    seed: int,
    iteration: int,
    first_group: int | None = None,
) -> Batch:
    """Ask for `group_size` samples of each chosen prompt, a group in consecutive rows; -> Batch of B = P * G.

    Group ids count on from `first_group`, by default iteration * P, so they are unique in a run whose iterations have
    equal P; sample ids are group * G + member. Two equal prompts are two groups. Raises ValueError for an index outside
    the prompts.
    """
    if group_size < 1 or not indices:
        raise ValueError(f"{len(indices)} prompts of {group_size} samples make no batch; expected at least 1 of each")
    outside = [index for index in indices if not 0 <= index < len(prompts)]
    if outside:
        raise ValueError(f"prompt {outside[0]} does not exist; expected an index in [0, {len(prompts)})")
    first = iteration * len(indices) if first_group is None else first_group
    groups = torch.arange(first, first + len(indices))  # (P,)
    samples = groups[:, None] * group_size + torch.arange(group_size)  # (P, G)
    repeated = tuple(prompts[index] for index in indices for _ in range(group_size))
    return Batch(repeated, groups.repeat_interleave(group_size), samples.flatten(), seed, iteration)


def _epoch_order(count: int, per_iteration: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch; what an iteration took from the end of the epoch before is not at its beginning."""
    first = epoch
    if per_iteration <= count:
        while first * count % per_iteration:  # back to an epoch that begins together with an iteration
            first -= 1
    if count >= 2 * per_iteration:  # repairing the beginning leaves the end as drawn: no chain to follow
        first = max(first, epoch - 1)
    order = _permutation(count, seed, first)
    for later in range(first + 1, epoch + 1):
        taken = set(order[count - later * count % per_iteration :])
        order = _permutation(count, seed, later)
        order[:per_iteration] = sorted(order[:per_iteration], key=taken.__contains__)  # stable: the taken ones last
    return order


def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive(seed, "prompts", epoch))
    return torch.randperm(count, generator=generator).tolist()


def _missing_columns(rows: Sequence[Row], columns: Columns) -> Iterator[Problem]:
    """Columns that a row lacks; one that every row of the data lacks is reported once."""
    known = {name for row in rows for name in row.values}
    for wanted in dict.fromkeys(columns.named()):
        lacking = [row for row in rows if wanted not in row.values]
        for row in lacking if wanted in known else lacking[:1]:
            near = get_close_matches(wanted.lower(), {name.lower(): name for name in row.values}, n=1, cutoff=0.5)
            spelled = [name for name in row.values if near and name.lower() == near[0]]
            hint = f"; did you mean {spelled[0]!r}?" if spelled else f"; there are {', '.join(map(repr, row.values))}"
            yield Problem(row.named_at, f"no column {wanted!r}{hint}")


def _bad_cells(rows: Sequence[Row], columns: Columns, folder: Path) -> Iterator[Problem]:
    file_flaw = functools.cache(_file_flaw)  # a file that many rows share is opened once
    checks: list[tuple[str, str, Callable[[object], str | None]]] = [("prompt", columns.text, _prompt_flaw)]
    for medium, column in columns.media.items():
        checks.append((medium, column, functools.partial(_path_flaw, medium, folder, file_flaw)))
    if columns.id is not None:
        checks.append(("id", columns.id, _id_flaw))
    for row in rows:
        for what, column, check in checks:
            flaw = check(row.values[column]) if column in row.values else None
            if flaw is not None:
                yield Problem(row.line, f"{what} in column {column!r} {flaw}")


def _repeated_ids(rows: Sequence[Row], column: str | None) -> Iterator[Problem]:
    first: dict[int, int] = {}  # id -> line
    for row in rows:
        number = None if column is None else _integer(row.values.get(column))
        if number is not None and first.setdefault(number, row.line) != row.line:
            yield Problem(
                row.line, f"id in column {column!r} is {number}, as in line {first[number]}; expected unique ids"
            )


def _text_flaw(cell: object) -> str | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return "is empty"
    return None if isinstance(cell, str) else f"is a {type(cell).__name__}; expected text"


def _prompt_flaw(cell: object) -> str | None:
    """Text, or the messages of a chat: each with a role, and as content a text or a list of typed blocks."""
    if not isinstance(cell, list):
        return _text_flaw(cell)
    for message in cell:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return f"holds {message!r}; expected messages with 'role' and 'content'"
        blocks = message["content"]
        if not isinstance(blocks, str) and not (isinstance(blocks, list) and all(map(_is_block, blocks))):
            return f"holds the content {blocks!r}; expected text, or a list of blocks with 'type' and, for text, 'text'"
    return None if cell and said(cell).strip() else "is empty"


def _is_block(block: object) -> bool:
    return (
        isinstance(block, Mapping)
        and "type" in block
        and (block["type"] != "text" or isinstance(block.get("text"), str))
    )


def said(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a chat, a line for each message."""
    parts = [
        [{"type": "text", "text": one["content"]}] if isinstance(one["content"], str) else one["content"]
        for one in messages
    ]
    return "\n".join(" ".join(block["text"] for block in blocks if block["type"] == "text") for blocks in parts)


def _path_flaw(medium: str, folder: Path, file_flaw: FileFlaw, cell: object) -> str | None:
    """What is wrong with one path, or with the first bad one of a list; an empty list is a prompt without the medium."""
    paths = cell if isinstance(cell, list) else [cell]
    flaws = (_text_flaw(path) or file_flaw(medium, folder / str(path)) for path in paths)
    return next((flaw for flaw in flaws if flaw is not None), None)


def _id_flaw(cell: object) -> str | None:
    return f"is {cell!r}; expected an integer" if _integer(cell) is None else None


def _integer(cell: object) -> int | None:
    if isinstance(cell, str) and re.fullmatch(r"-?[0-9]+", cell):
        return int(cell)
    return cell if isinstance(cell, int) and not isinstance(cell, bool) else None


def _file_flaw(medium: str, path: Path) -> str | None:
    """What is wrong with a file; one that is or ought to be an image is decoded, any other must not be empty."""
    if not path.is_file():
        return f"does not exist: {path}"
    if medium == "image" or (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
        try:
            with Image.open(path) as image:
                image.verify()
            with Image.open(path) as image:  # verify leaves the file unusable and does not decode the pixels
                image.load()
        except DAMAGED_IMAGE as error:
            return f"is no readable image: {path} ({error})"
    return None if path.stat().st_size else f"is an empty file: {path}"


def _prompt(number: int, values: Mapping[str, object], columns: Columns, folder: Path) -> Prompt:
    """A row whose cells were found good, as a prompt."""
    named = _integer(values[columns.id]) if columns.id is not None else number
    media = {medium: _paths(folder, values[column]) for medium, column in columns.media.items()}
    cell = values[columns.text]
    text, messages = (said(cell), tuple(cell)) if isinstance(cell, list) else (str(cell), ())
    further = {name: value for name, value in values.items() if name not in columns.named()}
    target = None if columns.target is None else values[columns.target]
    assert named is not None
    return Prompt(
        named, text, {name: paths for name, paths in media.items() if paths}, target, further, messages=messages
    )


def _paths(folder: Path, cell: object) -> tuple[Path, ...]:
    return tuple(folder / str(path) for path in (cell if isinstance(cell, list) else [cell]))


def _listing(source: str, problems: Sequence[Problem]) -> str:
    shown = [f"  {source}:{line}: {text}" for line, text in problems[:SHOWN_PROBLEMS]]
    more = [f"  and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
    return "\n".join([f"{source} cannot be used, problems: {len(problems)}", *shown, *more])
