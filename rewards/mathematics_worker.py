"""The process in which `rewards.mathematics` compares expressions: lines of JSON in, one line of JSON out for each,
as `rewards.pool` asks.

It runs as a file of its own and imports nothing of ours, so that it starts fast and can be killed at any time.
"""

import json
import logging
import re
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

KINDS = (LatexExtractionConfig(), ExprExtractionConfig())
DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")  # a word that is no LaTeX command


def expressions(text: str) -> list[Any]:
    """What a text says in mathematics. Text without delimiters is LaTeX if it holds no word of three letters."""
    whole = f"${text}$"
    several = [text] if DELIMITED.search(text) else [text, whole] if PROSE.search(text) else [whole, text]
    for form in several:
        if found := parse(form, KINDS, fallback_mode="no_fallback", parsing_timeout=None):
            return found
    return []


def compare(target: str, answer: str, digits: int) -> bool | None:
    """Whether the answer equals the target, to `digits` decimals; None: the target is no expression."""
    right = expressions(target)
    return verify(right, expressions(answer), float_rounding=digits, timeout_seconds=None) if right else None


def bound_memory(size: int) -> None:
    """No more than `size` bytes of address space, where the system knows such a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def serve() -> None:
    """Answer until the input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is no reply
    logging.disable()  # the library warns that it has no limit of time: the parent has
    bound_memory(4 << 30)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        del question["sizes"]  # of arrays, which expressions have none of
        print(json.dumps({"value": compare(**question)}), file=replies, flush=True)


if __name__ == "__main__":
    serve()
