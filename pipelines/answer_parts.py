"""Answers of texts and images as data hold them: what an interleaved policy is taught.

An answer is a list of {"text": ...} and {"image": path} in the order of reading, in the column that `prompts.target` names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmgrpo.types import Prompt

EXPECTED = 'a list of {"text": ...} and {"image": path}'


def parts_of(prompt: Prompt, folder: Path) -> tuple[str | Path, ...]:
    """The parts of a prompt's answer, images as files in the folder; raises ValueError naming the prompt if it has none."""
    if not isinstance(prompt.target, Sequence) or isinstance(prompt.target, str) or not prompt.target:
        raise ValueError(f"prompt {prompt.id} has the target {prompt.target!r}; expected {EXPECTED}")
    return tuple(_part(prompt, item, folder) for item in prompt.target)


def _part(prompt: Prompt, item: Any, folder: Path) -> str | Path:
    match item:
        case {"text": str(text)} if len(item) == 1 and text:
            return text
        case {"image": str(path)} if len(item) == 1 and path:
            return folder / path
    raise ValueError(f"prompt {prompt.id} has the part {item!r} in its target; expected {EXPECTED}")


def check(prompts: Sequence[Prompt], folder: Path) -> None:
    """Open every image of the answers that are lists; raises ValueError naming the files that cannot be used."""
    taught = [prompt for prompt in prompts if is_answer(prompt.target)]
    files = {part: prompt.id for prompt in taught for part in parts_of(prompt, folder) if isinstance(part, Path)}
    flaws = [f"  {path} of prompt {number}: {flaw}" for path, number in files.items() if (flaw := _flaw(path))]
    if flaws:
        raise ValueError("\n".join([f"images of answers that cannot be used: {len(flaws)}", *flaws[:16]]))


def _flaw(path: Path) -> str | None:
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_answer(target: object) -> bool:
    """Whether a target is an answer of parts rather than one of text."""
    return isinstance(target, list | tuple) and bool(target) and all(isinstance(item, Mapping) for item in target)
