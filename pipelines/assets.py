"""Where the files that demos ship lie: tiny weights and media."""

from pathlib import Path

INSTALLED = Path(__file__).parent / "shipped"  # the wheel puts assets/* here
CHECKOUT = Path(__file__).parent.parent / "assets"  # a clone, or an editable install of one


def folder(name: str) -> Path:
    """The folder of one demo's files, such as "image_demo"; raises FileNotFoundError."""
    for place in (CHECKOUT, INSTALLED):
        if (place / name).is_dir():
            return place / name
    raise FileNotFoundError(f"no assets {name!r} in {CHECKOUT} or {INSTALLED}")
