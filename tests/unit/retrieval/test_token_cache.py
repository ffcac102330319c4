"""Tokens kept between searches are those that would be made again, and within their budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kv_agent.chunks import ChunkKey, Scope
from kv_agent.retrieval import index as index_module
from kv_agent.retrieval.index import NamespaceIndex
from kv_agent.retrieval.sketches import Sketch, rounded
from kv_agent.retrieval.token_cache import TokenCache
from kv_agent.retrieval.token_space import Tokens
from tests.unit.retrieval.histories import DIM, FINGERPRINT, change


def keys(*numbers: int) -> list[ChunkKey]:
    return [ChunkKey(f"chunk{number}") for number in numbers]


def tokens_of(num_bytes: int) -> Tokens:
    """Without values a token has a scale and a length: eight bytes."""
    num_tokens = num_bytes // 8
    zeros_T = np.zeros(num_tokens, np.float32)
    return Tokens(np.zeros((num_tokens, 0), np.int8), zeros_T, zeros_T)


def test_the_latest_used_stay_within_the_budget() -> None:
    cache = TokenCache(3 * 40)
    for key in keys(1, 2, 3):
        cache.put(key, tokens_of(40))
    cache.get(keys(1))
    cache.put(*keys(4), tokens_of(40))
    assert list(cache.get(keys(1, 2, 3, 4))) == keys(1, 3, 4)
    cache.put(*keys(4), tokens_of(80))
    assert list(cache.get(keys(1, 2, 3, 4))) == keys(3, 4)
    assert cache.num_bytes == 120
    cache.put(*keys(5), tokens_of(128))
    assert cache.get(keys(3, 4, 5)) == {}
    assert cache.num_bytes == 0


class KnownTokens:
    """Random tokens of every chunk, and which chunks were asked for."""

    def __init__(self) -> None:
        self.asked: list[ChunkKey] = []

    def of(self, key: ChunkKey) -> Sketch:
        rng = np.random.default_rng(int(key.removeprefix("chunk")))
        return rounded(rng.normal(size=(1 + int(rng.integers(5)), DIM)).astype(np.float32) + 2)

    def __call__(self, wanted: Sequence[ChunkKey]) -> dict[ChunkKey, Sketch]:
        self.asked += wanted
        return {key: self.of(key) for key in wanted if key != "chunk3"}


def grown(tokens: KnownTokens, index: NamespaceIndex | None = None, upto: int = 8) -> NamespaceIndex:
    index = index or NamespaceIndex(FINGERPRINT, "default", tokens)
    for number in range(index.seq + 1, upto + 1):
        index.apply([change(number, tokens.of(ChunkKey(f"chunk{number}")).keys().mean(axis=0))])
    index.search(np.ones(DIM, np.float32), Scope(), 1)
    return index


def test_tokens_are_made_once_for_each_space_and_are_those_of_the_space() -> None:
    tokens = KnownTokens()
    index = grown(tokens)
    tokens.asked.clear()
    for _ in range(2):
        found = index.tokens(keys(5, 3, 1))
        assert set(found) == set(keys(5, 1))
        for key, placed in found.items():
            (expected,) = index.token_space.place([tokens.of(key)])
            np.testing.assert_array_equal(placed.levels_TV, expected.levels_TV)
            np.testing.assert_allclose(placed.inverse_T, expected.inverse_T, rtol=1e-4)
            assert placed.inverse_T.base is None
    assert tokens.asked == [*keys(5, 3, 1), *keys(3)]

    before = index.token_space
    grown(tokens, index, upto=20)  # fitted anew
    assert index.token_space is not before
    (again,) = index.tokens(keys(5)).values()
    (expected,) = index.token_space.place([tokens.of(*keys(5))])
    np.testing.assert_allclose(again.inverse_T, expected.inverse_T, rtol=1e-4)


def test_kept_tokens_count_as_the_index_s_own() -> None:
    index = grown(KnownTokens())
    before = index.num_bytes
    (tokens,) = index.tokens(keys(2)).values()
    assert index.num_bytes == before + tokens.nbytes
    assert tokens.nbytes < index_module._KEPT_TOKEN_BYTES
