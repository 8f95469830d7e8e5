"""Rewards for text answers: exact match, multiple choice, numbers, forms, and how near a text is to another. B samples.

All take the option `tag`: the answer is what stands in the last <tag>...</tag> (`rewards.answers.answer`), or the whole
text if it is left out. A text without an answer, or with one that cannot be read, has the lowest score, 0. A prompt
without a target is NaN, but for the forms, which need none.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend, validator_for
from rapidfuzz.distance import LCSseq, Levenshtein
from referencing import Registry
from referencing.exceptions import Unresolvable
from torch import Tensor

from mmgrpo.types import Prompt, Reward, Samples
from rewards.answers import NUMBER, accepted, answer, score_answers, tags, texts, to_number, unusable

QUOTES, STOPS = "\"'`*", ".,;:!?"
OPENED, CLOSED = r"[\s(\[{*\"'`_]{0,8}", r"[\s)\]}*\"'`_]{0,8}"
LETTER_ALONE = re.compile(rf"{OPENED}([A-Za-z]){CLOSED}[.:]?{CLOSED}")
LETTER_FIRST = re.compile(rf"{OPENED}([A-Za-z])[*\"'`_]{{0,3}}[).:\]}}]")
LETTER_ANNOUNCED = re.compile(  # not the article of "Answer: A cat"
    rf"(?i:answer|choice|option)(?i:\s{{1,4}}is)?\s{{0,4}}(?:[:=](?!\s{{0,4}}[AI]\s[a-z]))?{OPENED}([A-Z])(?![\w'’])"
)
LETTER_BOXED = re.compile(r"\\boxed\{(?:\\(?:text|mathrm|textbf)\{)?([A-Za-z])[.}]")
FRACTION = re.compile(rf"({NUMBER})(?:\s{{0,4}}/\s{{0,4}}({NUMBER}))?")
WORD = re.compile(r"[^\W_]+")


# ---- right or wrong


def normalised(text: str, case: bool = False) -> str:
    """Without case, quotes around it and stops at its end, white space as single blanks."""
    text = " ".join((text if case else text.casefold()).split())
    return text.lstrip(QUOTES + " ").rstrip(QUOTES + STOPS + " ")


def exact(samples: Samples, *, tag: str | None = None, case: bool = False) -> Tensor:
    """1 if the answer equals the target, or one of several, else 0; (B,).

    White space, quotes around it, stops at its end and, unless `case`, upper and lower case do not count. Source: the
    matching reward of Mixed-R1 (arXiv 2505.24164).
    """

    def score(found: str, right: tuple[str, ...]) -> float:
        return float(normalised(found, case) in [normalised(item, case) for item in right])

    return score_answers(samples, tag, accepted, score)


def letter(text: str) -> str | None:
    """The option that an answer names, A to Z; None if it names none. The first of these rules that applies:

    the last `\\boxed{B}`; the letter alone, in brackets or quotes or not; "answer", "choice" or "option", then perhaps
    "is" or a colon, then a capital, the last one; the letter at the start, closed by one of `) ] } . :`.
    """
    boxed, announced = LETTER_BOXED.findall(text), LETTER_ANNOUNCED.findall(text)
    alone, first = LETTER_ALONE.fullmatch(text), LETTER_FIRST.match(text)
    found = [*boxed[-1:], *([alone[1]] if alone else []), *announced[-1:], *([first[1]] if first else [])]
    return found[0].upper() if found else None


def options(prompt: Prompt) -> list[str]:
    """The column `choices` of a prompt, normalised, [] without one; raises ValueError for another type."""
    found = prompt.columns.get("choices")
    if found is None:
        return []
    if not isinstance(found, list | tuple) or not 0 < len(found) <= 26:
        raise ValueError(f"prompt {prompt.id} has choices of type {type(found).__name__}; expected a list of 1 to 26")
    return [normalised(str(item)) for item in found]


def chosen(text: str, named: Sequence[str]) -> str | None:
    """The letter of the option whose text the answer equals, else the letter that it names."""
    place = named.index(normalised(text)) if normalised(text) in named else None
    return letter(text) if place is None else chr(ord("A") + place)


def choice(samples: Samples, *, tag: str | None = None) -> Tensor:
    """1 if the answer names the target's option, by its letter (`letter`) or by its text in the column choices, else 0.

    -> (B,). The target is a letter or the text of an option; a number is refused, since it may count from 0 or from 1.
    Source: multiple choice in Mixed-R1 (arXiv 2505.24164) and VLAA-Thinker (2504.11468); the rules are ours.
    """

    def wanted(prompt: Prompt) -> tuple[str, list[str]] | None:
        if prompt.target is None:
            return None
        named = options(prompt)
        right = chosen(prompt.target.strip(), named) if isinstance(prompt.target, str) else None
        if right is None:
            raise unusable(prompt, "the letter of an option, or its text in the column choices")
        return right, named

    return score_answers(samples, tag, wanted, lambda found, target: float(chosen(found, target[1]) == target[0]))


def number(text: str) -> float | None:
    """The last number of a text, `a/b` divided, a comma only between thousands; None: there is none, or not finite.

    Units, currencies and % are passed over: 50% is 50.
    """
    found = FRACTION.findall(text.replace("−", "-"))  # the minus sign of typesetting
    above, below = (to_number(part) if part else 1.0 for part in (found[-1] if found else ("", "")))
    if not found or above is None or not below:
        return None
    value = above / below
    return value if abs(value) < float("inf") else None


def numeric(samples: Samples, *, tag: str | None = None, relative: float = 0.0, absolute: float = 0.0) -> Tensor:
    """1 if |answer - target| <= max(relative |target|, absolute), else 0; (B,). The answer's `number` is its last.

    Source: exact numbers in VLAA-Thinker (arXiv 2504.11468); with relative = 0.05 the relaxed match of ChartQA, used by
    Mixed-R1 (2505.24164). Expressions and LaTeX: `rewards.mathematics`.
    """

    def wanted(prompt: Prompt) -> float | None:
        if prompt.target is None:
            return None
        plain = isinstance(prompt.target, str | int | float) and not isinstance(prompt.target, bool)
        if not plain or (value := number(str(prompt.target))) is None:
            raise unusable(prompt, "a number")
        return value

    def score(found: str, right: float) -> float:
        value = number(found)
        return float(value is not None and abs(value - right) <= max(relative * abs(right), absolute))

    return score_answers(samples, tag, wanted, score)


# ---- how near


def nearest(samples: Samples, tag: str | None, score: Callable[[str, str], float]) -> Tensor:
    """The best score(answer, text) over the accepted texts; (B,)."""
    return score_answers(samples, tag, accepted, lambda found, right: max(score(found, item) for item in right))


def edit_similarity(samples: Samples, *, tag: str | None = None) -> Tensor:
    """1 - edit distance / length of the longer text, 1 if both are empty; in [0, 1], (B,).

    Characters as they are, but for white space at both ends. Source: the answer reward of LaV-CoT (arXiv 2509.10026).
    """
    return nearest(samples, tag, Levenshtein.normalized_similarity)


def overlap(found: str, right: str, measure: Literal["f", "precision", "recall"]) -> float:
    """ROUGE-L of two texts: longest common subsequence of words over the found, the right, or both; in [0, 1]."""
    words, target = (WORD.findall(text.lower()) for text in (found, right))
    common = LCSseq.similarity(words, target)
    parts = {"f": (len(words) + len(target)) / 2, "precision": len(words), "recall": len(target)}  # harmonic mean: f
    return common / parts[measure] if common else 0.0


def rouge_l(samples: Samples, *, tag: str | None = None, measure: Literal["f", "precision", "recall"] = "f") -> Tensor:
    """ROUGE-L F1, precision or recall over words, the best over several targets; in [0, 1], (B,).

    Words are runs of letters and digits of any script, in lower case, not stemmed; on ASCII those of the rouge-score
    package, whose figures it has. Source: Lin, ROUGE, 2004.
    """
    return nearest(samples, tag, partial(overlap, measure=measure))


# ---- form


def written(names: tuple[str, ...]) -> list[str]:
    """The tags of blocks, in order; raises ValueError without a name or if one comes twice."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names are {list(names)}; expected at least one tag, each once")
    return [form.format(name) for name in names for form in ("<{}>", "</{}>")]


def blocks(text: str, names: tuple[str, ...]) -> bool:
    """Whether a text is <a>..</a><b>..</b> for the names in order, blank between them, none empty, no tag within."""
    marks = tags(text, names)
    if [mark[0] for mark in marks] != written(names):
        return False
    edges = [0, *(edge for mark in marks for edge in mark.span()), len(text)]
    parts = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return all(bool(part) == (place % 2 == 1) for place, part in enumerate(parts))  # odd ones stand inside a block


def tags_once(text: str, names: tuple[str, ...]) -> float:
    """The share of the 2N tags that occur exactly once; in [0, 1]."""
    found, wanted = Counter(mark[0] for mark in tags(text, names)), written(names)
    return sum(found[tag] == 1 for tag in wanted) / len(wanted)


def tag_format(
    samples: Samples, *, names: tuple[str, ...] = ("think", "answer"), graded: bool = False, prefix: str = ""
) -> Tensor:
    """1 if the text is one block of each name in order and nothing else (`blocks`), else 0; (B,).

    `graded`: `tags_once`, in [0, 1]. `prefix` is what the prompt has already written of the answer, such as "<think>".
    Source: strict and graded format of LaV-CoT (arXiv 2509.10026), where a tag that comes twice counts as there.
    """
    score = tags_once if graded else blocks
    return torch.tensor([score(prefix + text, names) for text in texts(samples)], dtype=torch.float32)


def read_json(text: str) -> object:
    """The value of a JSON text, 1.0 as the integer that it equals; raises ValueError, RecursionError, OverflowError."""

    def refused(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def number_of(digits: str) -> float:
        return int(value) if (value := float(digits)) == int(value) else value

    return json.loads(text, parse_constant=refused, parse_float=number_of)


def unique(validator: object, wanted: bool, items: object, schema: object) -> Iterator[ValidationError]:
    """JSON schema's uniqueItems in linear time; the library compares every two."""
    if wanted and isinstance(items, list) and len({json.dumps(item, sort_keys=True) for item in items}) < len(items):
        yield ValidationError("items are not unique")


def json_schema(*, schema: Path, tag: str | None = None, limit: int = 50_000) -> Reward:
    """1 if the answer is JSON that the schema (a file) accepts, else 0; (B,). A ```json fence around it may stand.

    The draft is the one that $schema names, else the newest; nothing is fetched. Longer answers than `limit` characters
    are 0. A `pattern` takes the time that the schema's author lets it take.
    """
    try:
        rules = json.loads(schema.read_text(encoding="utf-8"))
        validator_for(rules).check_schema(rules)
    except (OSError, ValueError, SchemaError) as error:
        raise ValueError(
            f"schema is {str(schema)!r}; expected a file with a JSON schema: {str(error)[:200]}"
        ) from error
    validator = extend(validator_for(rules), {"uniqueItems": unique})(rules, registry=Registry())

    def score(text: str) -> float:
        found = answer(text, tag)
        if found is None or len(found) > limit:
            return 0.0
        fenced = re.fullmatch(r"```(?:json)?\n(.*)```", found, re.DOTALL)
        try:
            return float(validator.is_valid(read_json(fenced[1] if fenced else found)))
        except (ValueError, RecursionError, OverflowError):
            return 0.0
        except Unresolvable as error:
            raise ValueError(f"schema {str(schema)!r} refers to {error.ref!r}; nothing is fetched") from error

    return lambda samples: torch.tensor([score(text) for text in texts(samples)], dtype=torch.float32)
