"""The three ways to search, over a real catalog and a real index, without an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_agent.chunks import ChunkRecord, Scope, TurnFilter, TurnId
from kv_agent.errors import ConfigError
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.retrieval.pooling import to_bytes
from kv_agent.retrieval.sketches import to_sketch
from kv_agent.searching import Found, Library, Request, find_turns
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, turn_of

QUERY = "Where does Mara live?"
QUERY_VECTOR = np.array([1, 0, 0], dtype=np.float32)


class Shelf:
    """A library whose turns have keys by hand."""

    def __init__(self, root: Path) -> None:
        catalog = Catalog(root / "c")
        self.library = Library(
            catalog=catalog,
            index=RetrievalEngine(catalog, FINGERPRINT, None),
            fingerprint=FINGERPRINT,
        )
        self.num_probes = 0

    @property
    def catalog(self) -> Catalog:
        return self.library.catalog

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
        metadata: dict[str, Any] | None = None,
    ) -> list[ChunkRecord]:
        seed = self.catalog.stats()["turns"]
        content = content or [record_of(chunk, scope) for chunk in chain(2, seed=seed, scope=scope)]
        turn = dataclasses.replace(
            turn_of(content, turn_id, scope, created), text=text, metadata=metadata or {}
        )
        keys = np.array([vector], dtype=np.float32)
        vectors = {chunk.key: to_bytes(keys) for chunk in content}
        sketches = {chunk.key: to_sketch(keys) for chunk in content}
        self.catalog.add_turn(turn, [], content, vectors, sketches)
        return content

    def search(
        self, mode: Any = "hybrid", top_k: int = 5, scope: Scope | None = None, **only: Any
    ) -> list[Found]:
        request = Request(
            query=QUERY, scope=scope or Scope(), top_k=top_k, mode=mode, only=TurnFilter(**only)
        )
        return find_turns(self.library, self.probe, request)

    def find(self, *args: Any, **kwargs: Any) -> dict[TurnId, float]:
        return {one.turn.turn_id: one.score for one in self.search(*args, **kwargs)}


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.catalog.close()


def fill(shelf: Shelf, num_others: int = 30) -> None:
    shelf.add("by words", "Mara lives in Oslo, said Mara.", (-1, 1, 0))
    shelf.add("by keys", "She moved to Norway.", (1, 0, 0))
    shelf.add("by both", "Mara went to Oslo.", (1, 0.2, 0))
    for number in range(num_others):
        shelf.add(f"other-{number}", f"Something else, number {number}.", (-1, 0, number % 7 + 1))


def test_lexical_finds_by_words_and_asks_no_engine(shelf: Shelf) -> None:
    fill(shelf)

    assert list(shelf.find("lexical")) == ["by words", "by both"]
    assert shelf.num_probes == 0
    hits = shelf.catalog.search_text(QUERY, Scope(), FINGERPRINT, 5)
    assert shelf.find("lexical") == {hit.turn_id: hit.score for hit in hits}


def test_latent_finds_by_keys_alone(shelf: Shelf) -> None:
    fill(shelf)

    assert list(shelf.find("latent", top_k=2)) == ["by keys", "by both"]
    hits = shelf.library.index.search(QUERY_VECTOR, Scope(), 2)
    assert shelf.find("latent", top_k=2) == {hit.turn_id: hit.score for hit in hits}


def test_hybrid_adds_up_reciprocal_ranks_and_says_what_each_voice_thought(shelf: Shelf) -> None:
    fill(shelf)

    found = {one.turn.turn_id: one for one in shelf.search(top_k=3)}
    lexical = list(shelf.find("lexical", top_k=100))
    latent = list(shelf.find("latent", top_k=100))
    assert lexical == ["by words", "by both"]
    assert set(found) == {"by both", "by keys", "by words"}
    assert next(iter(found)) == "by both"  # high in both
    for turn_id, one in found.items():
        ranks = [ranking.index(turn_id) + 1 for ranking in (lexical, latent) if turn_id in ranking]
        assert one.score == pytest.approx(sum(1 / (60 + rank) for rank in ranks))
        assert sorted(voice.rank for voice in one.voices.values()) == sorted(ranks)
    assert "lexical" not in found["by keys"].voices
    bm25 = {hit.turn_id: hit.score for hit in shelf.catalog.search_text(QUERY, Scope(), FINGERPRINT, 9)}
    assert found["by words"].voices["lexical"].score == bm25[TurnId("by words")]


def test_what_words_find_is_compared_by_keys_however_far_it_is(shelf: Shelf) -> None:
    """Keys alone look at some hundred chunks only."""
    shelf.add("far", "Mara", (-1, -1, 0.5))
    for number in range(900):
        shelf.add(f"near-{number}", f"Something {number}", (1, number / 900, 0))

    assert "far" not in shelf.find("latent", top_k=200)
    assert [one.turn.turn_id for one in shelf.search(top_k=200) if "lexical" in one.voices] == ["far"]


def test_among_equals_the_newer_comes_first(shelf: Shelf) -> None:
    for turn_id, text, created in (("b", "Oslo one", 2.0), ("c", "Oslo two", 3.0), ("a", "Oslo three", 1.0)):
        shelf.add(turn_id, text, (1, 0, 0), created=created)

    assert list(shelf.find("latent")) == ["c", "b", "a"]


def test_of_near_duplicates_the_newest_stands_for_all(shelf: Shelf) -> None:
    said = "Mara does live in the yellow house by the river with two cats and a dog, number"
    for number in range(6):
        shelf.add(f"again-{number}", f"{said} {number}", (1, 0, number / 100), created=float(number))
    shelf.add("other", "Mara does not live in Bergen", (0.5, 1, 0), created=9.0)

    assert set(shelf.find(top_k=2)) == {"again-5", "other"}
    assert set(shelf.find(top_k=7)) == {"other", *(f"again-{number}" for number in range(6))}


@pytest.mark.parametrize("mode", ["hybrid", "latent", "lexical"])
def test_time_and_metadata_narrow_every_mode(shelf: Shelf, mode: str) -> None:
    vectors = [(1, 0, 0), (1, 0.5, 0), (1, 0, 0.5), (0, 1, 1)]
    for day, (topic, vector) in enumerate(zip(["a", "b", "a", "b"], vectors, strict=True)):
        metadata = {"topic": topic, "day": day, "free": day == 1, "half": day / 2}
        shelf.add(f"day {day}", f"Mara, {day}", vector, created=float(day), metadata=metadata)

    def days(**only: Any) -> set[str]:
        return {turn_id.removeprefix("day ") for turn_id in shelf.find(mode, **only)}

    assert days(since=1.0) == set("123")
    assert days(until=1.0) == set("0")
    assert days(since=1.0, until=3.0) == set("12")
    assert days(metadata={"topic": "a"}) == set("02")
    assert days(metadata={"topic": "a", "day": 2}) == set("2")
    assert days(metadata={"day": 1.0}) == set("1")
    assert days(metadata={"half": 0.5}) == set("1")
    assert days(metadata={"free": True}) == set("1")
    assert days(metadata={"day": True}) == days(metadata={"free": 1}) == set()
    assert days(metadata={"topic": "c"}) == days(metadata={"nothing": "a"}) == days(since=9.0) == set()
    assert days(metadata={"topic": "a"}, scope=Scope(user_id="other")) == set()


def test_a_narrow_filter_finds_what_is_far_from_the_query(shelf: Shelf) -> None:
    shelf.add("far", "Nothing alike", (-1, -1, 0.5), metadata={"kind": "rare"})
    for number in range(900):
        shelf.add(f"near-{number}", f"Something {number}", (1, number / 900, 0))

    assert list(shelf.find("latent", metadata={"kind": "rare"})) == ["far"]


def test_hybrid_without_a_word_in_common_is_latent(shelf: Shelf) -> None:
    shelf.add("a", "Oslo", (1, 0, 0))
    shelf.add("b", "Bergen", (0, 1, 0))

    assert list(shelf.find("hybrid")) == list(shelf.find("latent")) == ["a", "b"]


@pytest.mark.parametrize("mode", ["hybrid", "latent", "lexical"])
def test_every_mode_stays_in_scope(shelf: Shelf, mode: str) -> None:
    fill(shelf)
    mine = Scope(user_id="me", session_id="s")
    shelf.add("mine", "Mara does live somewhere.", (0, 1, 0), scope=mine)
    shelf.add("mine, elsewhere", "Where Mara does live", (1, 0, 0), scope=Scope(user_id="me"))

    assert list(shelf.find(mode, scope=mine)) == ["mine"]
    assert shelf.find(mode, scope=Scope(user_id="nobody")) == {}


@pytest.mark.parametrize("revived", [False, True])
def test_both_rankings_keep_the_same_copy(shelf: Shelf, revived: bool) -> None:
    """Names against the order of time: nothing but the time of storing says which copy is newest."""
    content = shelf.add("z", "Mara", (1, 0, 0), scope=Scope(session_id="s"), created=1.0)
    shelf.add("b", "Mara", (1, 0, 0), scope=Scope(session_id="t"), content=content, created=2.0)
    shelf.add("a", "Mara", (1, 0, 0), scope=Scope(session_id="u"), content=content, created=3.0)
    if revived:
        shelf.catalog.quarantine(content[0].key, "checksum")
        assert shelf.find() == {}
        shelf.add("again", "Mara", (1, 0, 0), scope=Scope(session_id="t"), content=content, created=4.0)

    assert [list(shelf.find(mode)) for mode in ("latent", "lexical", "hybrid")] == [["a"]] * 3


@pytest.mark.parametrize(("mode", "top_k"), [("bm25", 5), (None, 5), ("hybrid", 0)])
def test_a_bad_mode_or_number_is_refused_before_anything_is_done(shelf: Shelf, mode: Any, top_k: int) -> None:
    with pytest.raises(ConfigError, match="mode must be" if top_k else "top_k must be >= 1"):
        shelf.find(mode, top_k)
    assert shelf.num_probes == 0


@pytest.mark.parametrize("mode", ["hybrid", "latent", "lexical"])
def test_an_empty_store_and_more_than_there_is_are_no_trouble(shelf: Shelf, mode: str) -> None:
    assert shelf.find(mode) == {}
    shelf.add("only", "Mara", (1, 0, 0))
    assert list(shelf.find(mode, top_k=1000)) == ["only"]


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_finds_nothing_and_asks_nobody(shelf: Shelf, query: str) -> None:
    shelf.add("only", "Mara", (1, 0, 0))
    request = Request(query=query, scope=Scope(), top_k=5)
    assert find_turns(shelf.library, shelf.probe, request) == []
    assert shelf.num_probes == 0
