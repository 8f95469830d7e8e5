"""TOML in and out: a file with `key=value` overrides laid over it, and a table written so that it reads back equal."""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

Table = Mapping[str, object]


class RecipeError(ValueError):
    """What is wrong with a recipe, in one line: file, dotted key, what arrived, what was expected."""


def join(where: str, key: str) -> str:
    """The dotted place of a key; `where` is a place, or a prefix such as "demo.toml: "."""
    return f"{where}.{key}" if where and not where.endswith(": ") else where + key


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, else all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(names)}" if names else ""


def refuse_unknown(table: Iterable[str], known: Iterable[str], where: str) -> None:
    """Every key of a table must be one of the known names; raises RecipeError."""
    names = list(known)
    for key in table:
        if key not in names:
            raise RecipeError(f"{join(where, key)}: unknown key{nearest(key, names)}")


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, object]:
    """The table in a file with overrides applied in order; raises RecipeError, or FileNotFoundError for the file."""
    try:
        table: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name}: not valid TOML: {error}") from error
    for override in overrides:
        key, value = parse_override(override)
        assign(table, key.split("."), value, override)
    return table


def parse_override(text: str) -> tuple[str, object]:
    """`"train.iterations=5"` -> ("train.iterations", 5); the value is TOML, and a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key.strip()):
        raise RecipeError(f"override {text!r}: expected key=value with a dotted key, such as train.iterations=5")
    return key.strip(), _override_value(value.strip(), text)


def _override_value(value: str, override: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as error:
        if not value or value[0] in "[{\"'" or "\n" in value:
            raise RecipeError(f"override {override!r}: {value!r} is not a TOML value: {error}") from error
        return value
    if parsed.keys() != {"value"}:
        raise RecipeError(f"override {override!r}: expected one value on one line")
    return parsed["value"]


def assign(table: dict[str, object], keys: Sequence[str], value: object, override: str) -> None:
    """Set a nested value in place, making the tables on the way; an array of tables is entered by `name`."""
    inner: object = table
    for depth, key in enumerate(keys[:-1]):
        inner = _enter(inner, key, f"override {override!r}: {'.'.join(keys[: depth + 1])}")
    if not isinstance(inner, dict):
        raise RecipeError(
            f"override {override!r}: {'.'.join(keys[:-1])} is {inner!r}; expected a table to set a key in"
        )
    inner[keys[-1]] = value


def _enter(outer: object, key: str, where: str) -> object:
    if isinstance(outer, dict):
        return outer.setdefault(key, {})
    if not isinstance(outer, list):
        raise RecipeError(f"{where}: its parent is {outer!r}; expected a table")
    named = {item["name"]: item for item in outer if isinstance(item, dict) and isinstance(item.get("name"), str)}
    if key not in named:
        raise RecipeError(f"{where}: no entry of that name{nearest(key, named)}")
    return named[key]


def write(table: Table) -> str:
    """TOML text of a table of strings, numbers, booleans, paths, sequences and tables; None values are left out."""
    return "\n".join(_lines(table, ())).strip() + "\n"


def _lines(table: Table, path: tuple[str, ...]) -> list[str]:
    """Plain values come first: in TOML everything after a header belongs to it."""
    present = {key: value for key, value in table.items() if value is not None}
    plain = {key: value for key, value in present.items() if not isinstance(value, Mapping) and not _is_tables(value)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in present.items():
        if key in plain:
            continue
        header = ".".join(_key(part) for part in (*path, key))
        tables, mark = ([value], f"[{header}]") if isinstance(value, Mapping) else (value, f"[[{header}]]")
        assert isinstance(tables, Sequence)
        for inner in tables:
            lines += ["", mark, *_lines(inner, (*path, key))]
    return lines


def _is_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return _string(str(value))
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return str(value)  # int, float (inf and nan are TOML's words too), dates
