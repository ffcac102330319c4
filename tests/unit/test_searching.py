"""The three ways to search, over a real catalog and a real index, without an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kv_agent.chunks import ChunkRecord, Scope, TurnId
from kv_agent.errors import ConfigError
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.retrieval.pooling import to_bytes
from kv_agent.searching import find_turns
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, turn_of

QUERY = "Where does Mara live?"
QUERY_VECTOR = np.array([1, 0, 0], dtype=np.float32)


class FakeManager:
    """What searching needs of a ``CacheManager``."""

    fingerprint = FINGERPRINT

    def __init__(self, root: Path) -> None:
        self.store = SimpleNamespace(catalog=Catalog(root / "c"))
        self.index = RetrievalEngine(self.store.catalog, FINGERPRINT, None)
        self.num_waits = 0
        self.num_probes = 0

    def wait_durable(self) -> None:
        self.num_waits += 1

    def probe(self, query: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        assert query == QUERY
        self.num_probes += 1
        return QUERY_VECTOR

    def add(
        self,
        turn_id: str,
        text: str,
        vector: tuple[float, ...],
        *,
        scope: Scope | None = None,
        content: list[ChunkRecord] | None = None,
        created: float = 0.0,
    ) -> list[ChunkRecord]:
        seed = self.store.catalog.stats()["turns"]
        content = content or [record_of(chunk, scope) for chunk in chain(2, seed=seed, scope=scope)]
        turn = dataclasses.replace(turn_of(content, turn_id, scope, created), text=text)
        data = to_bytes(np.array(vector, dtype=np.float32))
        self.store.catalog.add_turn(turn, [], content, {chunk.key: data for chunk in content})
        return content

    def find(self, mode: Any = "hybrid", top_k: int = 5, scope: Scope | None = None) -> dict[TurnId, float]:
        return find_turns(self, self.probe, QUERY, scope or Scope(), top_k, mode)  # type: ignore[arg-type]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeManager]:
    manager = FakeManager(tmp_path)
    yield manager
    manager.store.catalog.close()


def fill(manager: FakeManager, num_others: int = 30) -> None:
    manager.add("by words", "Mara lives in Oslo, said Mara.", (-1, 1, 0))
    manager.add("by keys", "She moved to Norway.", (1, 0, 0))
    manager.add("by both", "Mara went to Oslo.", (1, 0.2, 0))
    for number in range(num_others):
        manager.add(f"other-{number}", f"Something else, number {number}.", (-1, 0, number % 7 + 1))


def test_lexical_finds_by_words_and_asks_no_engine(manager: FakeManager) -> None:
    fill(manager)

    assert list(manager.find("lexical")) == ["by words", "by both"]
    assert manager.num_probes == 0
    hits = manager.store.catalog.search_text(QUERY, Scope(), FINGERPRINT, 5)
    assert manager.find("lexical") == {hit.turn_id: hit.score for hit in hits}


def test_latent_finds_by_keys_alone(manager: FakeManager) -> None:
    fill(manager)

    assert list(manager.find("latent", top_k=2)) == ["by keys", "by both"]
    hits = manager.index.search(QUERY_VECTOR, Scope(), 2)
    assert manager.find("latent", top_k=2) == {hit.turn_id: hit.score for hit in hits}


def test_hybrid_takes_words_first_and_fills_up_by_keys(manager: FakeManager) -> None:
    fill(manager)

    assert list(manager.find(top_k=3).items()) == [("by words", 1.0), ("by both", 1 / 2), ("by keys", 1 / 3)]


def test_hybrid_asks_no_engine_when_words_find_enough(manager: FakeManager) -> None:
    fill(manager)

    assert list(manager.find(top_k=2)) == list(manager.find("lexical", top_k=2))
    assert manager.num_probes == 0


def test_hybrid_without_a_word_in_common_is_latent(manager: FakeManager) -> None:
    manager.add("a", "Oslo", (1, 0, 0))
    manager.add("b", "Bergen", (0, 1, 0))

    assert list(manager.find("hybrid")) == list(manager.find("latent")) == ["a", "b"]


@pytest.mark.parametrize("mode", ["hybrid", "latent", "lexical"])
def test_every_mode_stays_in_scope_and_waits_for_what_was_stored(manager: FakeManager, mode: str) -> None:
    fill(manager)
    mine = Scope(user_id="me", session_id="s")
    manager.add("mine", "Mara does live somewhere.", (0, 1, 0), scope=mine)
    manager.add("mine, elsewhere", "Where Mara does live", (1, 0, 0), scope=Scope(user_id="me"))

    assert list(manager.find(mode, scope=mine)) == ["mine"]
    assert manager.find(mode, scope=Scope(user_id="nobody")) == {}
    assert manager.num_waits == 2


@pytest.mark.parametrize("revived", [False, True])
def test_both_rankings_keep_the_same_copy(manager: FakeManager, revived: bool) -> None:
    """Names against the order of time: nothing but the time of storing says which copy is newest."""
    content = manager.add("z", "Mara", (1, 0, 0), scope=Scope(session_id="s"), created=1.0)
    manager.add("b", "Mara", (1, 0, 0), scope=Scope(session_id="t"), content=content, created=2.0)
    manager.add("a", "Mara", (1, 0, 0), scope=Scope(session_id="u"), content=content, created=3.0)
    if revived:
        manager.store.catalog.quarantine(content[0].key, "checksum")
        assert manager.find() == {}
        manager.add("again", "Mara", (1, 0, 0), scope=Scope(session_id="t"), content=content, created=4.0)

    assert [list(manager.find(mode)) for mode in ("latent", "lexical", "hybrid")] == [["a"]] * 3


@pytest.mark.parametrize(("mode", "top_k"), [("bm25", 5), (None, 5), ("hybrid", 0)])
def test_a_bad_mode_or_number_is_refused_before_anything_is_done(
    manager: FakeManager, mode: Any, top_k: int
) -> None:
    with pytest.raises(ConfigError, match="mode must be" if top_k else "top_k must be >= 1"):
        manager.find(mode, top_k)
    assert (manager.num_waits, manager.num_probes) == (0, 0)
