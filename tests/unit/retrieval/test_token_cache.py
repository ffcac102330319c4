"""Tokens kept between searches are those that would be made again, and within their budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kv_agent.chunks import ChunkKey, Scope
from kv_agent.retrieval import index as index_module
from kv_agent.retrieval.index import NamespaceIndex
from kv_agent.retrieval.token_cache import TokenCache
from tests.unit.retrieval.histories import DIM, FINGERPRINT, Vector, change


def keys(*numbers: int) -> list[ChunkKey]:
    return [ChunkKey(f"chunk{number}") for number in numbers]


def test_the_latest_used_stay_within_the_budget() -> None:
    cache = TokenCache(3 * 40)
    for key in keys(1, 2, 3):
        cache.put(key, np.zeros((10, 1), np.float32))
    cache.get(keys(1))
    cache.put(*keys(4), np.zeros((10, 1), np.float32))
    assert list(cache.get(keys(1, 2, 3, 4))) == keys(1, 3, 4)
    cache.put(*keys(4), np.zeros((20, 1), np.float32))
    assert list(cache.get(keys(1, 2, 3, 4))) == keys(3, 4)
    assert cache.num_bytes == 120
    cache.put(*keys(5), np.zeros((31, 1), np.float32))
    assert cache.get(keys(3, 4, 5)) == {}
    assert cache.num_bytes == 0


class Tokens:
    """Random tokens of every chunk, and which chunks were asked for."""

    def __init__(self) -> None:
        self.asked: list[ChunkKey] = []

    def of(self, key: ChunkKey) -> Vector:
        rng = np.random.default_rng(int(key.removeprefix("chunk")))
        return rng.normal(size=(1 + int(rng.integers(5)), DIM)).astype(np.float32) + 2

    def __call__(self, wanted: Sequence[ChunkKey]) -> dict[ChunkKey, Vector]:
        self.asked += wanted
        return {key: self.of(key) for key in wanted if key != "chunk3"}


def grown(tokens: Tokens, index: NamespaceIndex | None = None, upto: int = 8) -> NamespaceIndex:
    index = index or NamespaceIndex(FINGERPRINT, "default", tokens)
    for number in range(index.seq + 1, upto + 1):
        index.apply([change(number, tokens.of(ChunkKey(f"chunk{number}")).mean(axis=0))])
    index.search(np.ones(DIM, np.float32), Scope(), 1)
    return index


def test_tokens_are_made_once_for_each_space_and_are_those_of_the_space() -> None:
    tokens = Tokens()
    index = grown(tokens)
    tokens.asked.clear()
    for _ in range(2):
        found = index.tokens(keys(5, 3, 1))
        assert set(found) == set(keys(5, 1))
        for key, tokens_TV in found.items():
            np.testing.assert_allclose(tokens_TV, index.space.unit(tokens.of(key)), atol=1e-6)
            assert tokens_TV.base is None
    assert tokens.asked == [*keys(5, 3, 1), *keys(3)]

    before = index.space
    grown(tokens, index, upto=20)  # fitted anew
    assert index.space is not before
    (again,) = index.tokens(keys(5)).values()
    np.testing.assert_allclose(again, index.space.unit(tokens.of(*keys(5))), atol=1e-6)


def test_kept_tokens_count_as_the_index_s_own() -> None:
    index = grown(Tokens())
    before = index.num_bytes
    (tokens_TV,) = index.tokens(keys(2)).values()
    assert index.num_bytes == before + tokens_TV.nbytes
    assert tokens_TV.nbytes < index_module._KEPT_TOKEN_BYTES
