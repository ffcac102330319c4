"""The scale benchmark measures what it says, on few chunks."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.retrieval_scale import BLOCK, NUM_TOKENS, Texts, many_namespaces, measure, through_catalog
from kv_agent.retrieval import neighbours


def test_pooled_keys_are_the_means_of_a_chunk_s_tokens() -> None:
    texts = Texts(32)
    block = texts.pooled(BLOCK, 2 * BLOCK)
    for number in (BLOCK, BLOCK + 77):
        assert texts.tokens(number).shape == (NUM_TOKENS, 32)
        assert np.allclose(block[number - BLOCK], texts.tokens(number).mean(axis=0), atol=1e-4)


@pytest.mark.parametrize("most_exact", [10_000, 500])
def test_a_measurement_finds_nearly_everything_exact_or_not(
    monkeypatch: pytest.MonkeyPatch, most_exact: int
) -> None:
    monkeypatch.setattr(neighbours, "MOST_EXACT", most_exact)
    row = measure(2000, 32, 20)
    assert (row["kind"] == "exact") == (most_exact > 2000)
    for scope in ("all", "agent", "session"):
        assert row[f"recall@10_{scope}"] >= 0.95  # type: ignore[operator]


def test_namespaces_come_and_go() -> None:
    row = many_namespaces(40, 5, 16)
    assert 1 <= row["kept_in_memory"] < 20  # type: ignore[operator]


def test_turns_of_a_catalog_are_found_as_soon_as_they_are_there() -> None:
    row = through_catalog(30, 16)
    assert 0 < row["added_ms_p50"] < row["visible_ms_p50"]  # type: ignore[operator]
