"""Embeddings of texts as a voice: what is embedded when, and what is searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import ConfigError
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.retrieval.texts import TextFeed, embedded
from kv_agent.searching import Library, Request, TextVoice, find_turns
from tests.unit.test_searching import FINGERPRINT, QUERY, Shelf

TOPICS = ("home", "food")
SYNONYMS = {"dwells": "home", "live": "home", "eats": "food", "soup": "food"}


class Embedder:
    """One dimension a topic."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, sentences: list[str], /) -> Any:
        self.texts += sentences
        return [
            [float(any(SYNONYMS.get(w.strip("?.")) == topic for w in text.split())) for topic in TOPICS]
            for text in sentences
        ]


@pytest.fixture
def shelf(tmp_path: Path) -> Any:
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.catalog.close()


def voice(shelf: Shelf, embedder: Embedder, folder: Path | None = None) -> TextVoice:
    index = RetrievalEngine(TextFeed(shelf.catalog, embedder), FINGERPRINT, folder)
    return TextVoice(index=index, embed=lambda query: embedded(embedder, [query])[0])


def test_a_synonym_is_found_by_the_embedder_alone(shelf: Shelf) -> None:
    shelf.add("home", "She dwells in Oslo.", (0, 1, 0))
    for number in range(5):
        shelf.add(f"food {number}", f"He eats soup {number}.", (0, 1, 0.1 * number))
    embedder = Embedder()
    library = Library(
        catalog=shelf.catalog,
        index=shelf.library.index,
        fingerprint=FINGERPRINT,
        texts=voice(shelf, embedder),
    )

    best, *_ = find_turns(library, shelf.probe, Request(query=QUERY, scope=Scope(), top_k=3))
    assert best.turn.turn_id == "home"
    assert best.voices["embedding"].rank == 1
    assert "lexical" not in best.voices
    for mode in ("latent", "lexical"):
        request = Request(query=QUERY, scope=Scope(), top_k=3, mode=mode)  # type: ignore[arg-type]
        assert all("embedding" not in one.voices for one in find_turns(library, shelf.probe, request))


def test_each_turn_is_embedded_once_also_over_restarts(shelf: Shelf, tmp_path: Path) -> None:
    for number in range(4):
        shelf.add(f"turn {number}", f"He eats soup {number}.", (0, 1, 0))
    embedder = Embedder()
    one = voice(shelf, embedder, tmp_path / "index")
    for _ in range(3):
        assert len(one.index.search(one.embed("soup"), Scope(), 9)) == 4
    assert sorted(set(embedder.texts)) == sorted([*(f"He eats soup {n}." for n in range(4)), "soup"])
    assert len(embedder.texts) == 4 + 3
    one.index.close()

    again = Embedder()
    other = voice(shelf, again, tmp_path / "index")
    assert len(other.index.search(np.ones(2, dtype=np.float32), Scope(), 9)) == 4
    assert len(again.texts) == 1  # the latest change, which shows that it is the same catalog


def test_what_is_forgotten_is_not_found(shelf: Shelf) -> None:
    for number in range(3):
        shelf.add(f"turn {number}", "He eats soup.", (0, 1, 0), created=float(number))
    one = voice(shelf, Embedder())
    shelf.catalog.forget([TurnId("turn 0")])
    assert {hit.turn_id for hit in one.index.search(one.embed("soup"), Scope(), 9)} == {"turn 1", "turn 2"}
    shelf.catalog.forget([TurnId("turn 1")])
    assert {hit.turn_id for hit in one.index.search(one.embed("soup"), Scope(), 9)} == {"turn 2"}


@pytest.mark.parametrize("rows", [[], [1.0], [[1.0], [2.0]], [[[1.0]]]])
def test_an_embedder_that_returns_something_else_is_refused(rows: Any) -> None:
    class Odd:
        def encode(self, sentences: list[str], /) -> Any:
            return rows

    with pytest.raises(ConfigError, match="one vector each"):
        embedded(Odd(), ["a text"])
