"""Texts are batched within a budget of tokens, whole groups where they fit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.token_batches import batches, families, size

LISTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=30)


@given(LISTS, st.integers(1, 300))
def test_every_text_is_in_one_batch_that_fits_or_is_alone(rows: list[tuple[int, int]], budget: int) -> None:
    group, texts = torch.tensor([number for number, _ in rows]), [length for _, length in rows]
    kinds, prompts = [number % 2 for number, _ in rows], [10 + 7 * number for number, _ in rows]
    found = batches(families(group, kinds, prompts, texts), budget)
    assert sorted(torch.cat(found).tolist()) == list(range(len(rows)))
    for part in found:
        assert len({kinds[row] for row in part.tolist()}) == 1
        groups = group[part].unique().tolist()
        padded = len(groups) * max(10 + 7 * number for number in groups) + len(part) * max(texts[row] for row in part)
        assert padded <= budget or len(part) == 1


def test_a_group_stays_together_where_it_fits_and_is_cut_where_not() -> None:
    group = torch.tensor([4, 9, 4, 9, 4, 9])
    whole = families(group, ["x"] * 6, [10] * 6, [5, 1, 3, 2, 4, 1])
    assert [family.rows for family in whole] == [(0, 4, 2), (3, 1, 5)]  # the longest text first
    assert size(whole) == 2 * 10 + 6 * 5
    assert [part.tolist() for part in batches(whole, 50)] == [[3, 1, 5, 0, 4, 2]]
    assert [part.tolist() for part in batches(whole, 49)] == [[3, 1, 5], [0, 4, 2]]
    assert [part.tolist() for part in batches(whole, 20)] == [[3, 1, 5], [0, 4], [2]]
