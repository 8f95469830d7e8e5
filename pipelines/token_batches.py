"""Batches of whole texts that fit a budget of tokens, the texts of a group together so that they share their prompt.

Axes: B texts, b those of one batch.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """The texts of one prompt."""

    rows: tuple[int, ...]  # of the trajectory
    kind: Hashable  # families of one kind may share a batch
    prompt: int  # tokens
    texts: tuple[int, ...]  # tokens of each row's text


def families(group: Tensor, kinds: Sequence[Hashable], prompts: Sequence[int], texts: Sequence[int]) -> list[Family]:
    """Rows by their group id, (B,) each, longest text first inside a family."""
    found = []
    for number in dict.fromkeys(group.tolist()):
        rows = sorted((group == number).nonzero().flatten().tolist(), key=lambda row: -texts[row])
        found.append(Family(tuple(rows), kinds[rows[0]], prompts[rows[0]], tuple(texts[row] for row in rows)))
    return found


def batches(families: Sequence[Family], budget: int) -> list[Tensor]:
    """Rows of each batch, (b,) int64; padded prompts and padded texts together hold at most `budget` tokens.

    Families of similar length come together. One that does not fit is cut, and its prompt read again for each part; a
    single text over the budget is a batch of its own.
    """
    order = sorted(families, key=lambda family: (repr(family.kind), family.prompt, max(family.texts)))
    parts = [part for family in order for part in cut(family, budget)]
    found: list[list[Family]] = []
    for part in parts:
        if found and found[-1][0].kind == part.kind and size([*found[-1], part]) <= budget:
            found[-1].append(part)
        else:
            found.append([part])
    return [torch.tensor([row for part in batch for row in part.rows]) for batch in found]


def size(families: Sequence[Family]) -> int:
    """Tokens of the padded prompts and texts of one batch."""
    texts = [length for family in families for length in family.texts]
    return len(families) * max(family.prompt for family in families) + len(texts) * max(texts)


def cut(family: Family, budget: int) -> Iterator[Family]:
    """The family, or parts of it that fit the budget."""
    start = 0
    while start < len(family.rows):
        room = max(1, (budget - family.prompt) // max(1, family.texts[start]))  # the first text is the longest
        stop = min(start + room, len(family.rows))
        yield Family(family.rows[start:stop], family.kind, family.prompt, family.texts[start:stop])
        start = stop
