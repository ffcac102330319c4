"""Cuts that the text chooses: the same text is cut alike wherever it stands, but for its edges."""

from __future__ import annotations

import random
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunking import cut_lengths

MOST = 64


def cuts(token_ids: list[int], start: int = 0) -> set[int]:
    """Positions of the cuts when the text begins at ``start``."""
    return {start + end for end in accumulate(cut_lengths(token_ids, MOST))}


def text(seed: int, size: int) -> list[int]:
    return random.Random(seed).choices(range(30_000), k=size)


@given(tokens=st.lists(st.integers(0, 2**31 - 1), max_size=300), most=st.integers(1, 90))
@settings(max_examples=150, deadline=None)
def test_chunks_hold_all_tokens_and_none_is_too_long_or_too_short(tokens: list[int], most: int) -> None:
    lengths = cut_lengths(tokens, most)
    assert sum(lengths) == len(tokens)
    assert all(1 <= length <= most for length in lengths)


def test_most_chunks_end_where_the_text_says_and_few_are_short() -> None:
    lengths = [length for seed in range(20) for length in cut_lengths(text(seed, 2000), MOST)[:-1]]
    assert sum(length == MOST for length in lengths) < 0.1 * len(lengths)
    assert sum(length < MOST // 4 for length in lengths) < 0.05 * len(lengths)
    assert 0.4 * MOST < sum(lengths) / len(lengths) < 0.6 * MOST


def test_the_same_text_behind_another_beginning_is_cut_alike_after_a_while() -> None:
    for seed in range(50):
        shared = text(seed, 600)
        one, other = cuts(shared), cuts(text(1000 + seed, 37) + shared, start=-37)
        later = {cut for cut in one if cut > 2 * MOST}
        assert later == {cut for cut in other if cut > 2 * MOST}


def test_an_inserted_token_moves_only_the_cuts_around_it() -> None:
    for seed in range(50):
        tokens = text(seed, 800)
        before, after = cuts(tokens), cuts([*tokens[:300], 7, *tokens[300:]])
        assert {cut for cut in before if cut <= 300 - MOST} == {cut for cut in after if cut <= 300 - MOST}
        assert {cut + 1 for cut in before if cut > 300 + MOST} == {cut for cut in after if cut > 301 + MOST}


def test_a_text_without_variety_and_small_chunks_are_cut_by_length() -> None:
    lengths = cut_lengths([5] * 200, MOST)
    assert lengths == [MOST, MOST, MOST, 200 - 3 * MOST]
    assert cut_lengths(text(0, 20), 7) == [7, 7, 6]
