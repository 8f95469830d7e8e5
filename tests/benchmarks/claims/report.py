"""The claims as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


def table(lines: Sequence[Line]) -> str:
    return ""


def picture(lines: Sequence[Line], path: Path) -> None:
    pass
