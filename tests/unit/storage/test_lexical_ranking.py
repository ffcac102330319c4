"""Scores and order of a text search against brute-force BM25; of copies, one is found."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from kv_agent.chunks import ChunkKey, Scope, TurnId
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.words import query_terms, words
from tests.unit.storage.builders import FINGERPRINT, chain, record_of
from tests.unit.storage.text_turns import add, find

NUM_SCOPE_WORDS = 3


def occurrences(term: str, document: list[str]) -> int:
    parts = term.split(" ")
    return sum(document[i : i + len(parts)] == parts for i in range(len(document)))


def brute_force_bm25(corpus: dict[str, str], query: str) -> dict[str, float]:
    """Scores above zero; k1 = 1.2, b = 0.75. The words that name a scope make every document longer."""
    tokens = {name: words(text) for name, text in corpus.items()}
    lengths = {name: len(document) + NUM_SCOPE_WORDS for name, document in tokens.items()}
    average = sum(lengths.values()) / len(lengths)
    scores = dict.fromkeys(corpus, 0.0)
    for term in dict.fromkeys(query_terms(query)):
        counts = {name: occurrences(term, document) for name, document in tokens.items()}
        having = sum(count > 0 for count in counts.values())
        idf = math.log((len(corpus) - having + 0.5) / (having + 0.5))
        idf = idf if idf > 0 else 1e-6
        for name, count in counts.items():
            norm = 1.2 * (1 - 0.75 + 0.75 * lengths[name] / average)
            scores[name] += idf * count * (1.2 + 1) / (count + norm)
    return {name: score for name, score in scores.items() if score > 0}


VOCABULARY = [
    *("the", "a", "is", "where", "lives", "likes", "Mara", "Jonas", "café", "Straße", "7", "42", "n2048"),
    "東京",
    "京都",
    "日本語",
]


@pytest.mark.parametrize("seed", range(4))
def test_scores_and_order_are_those_of_brute_force_bm25(catalog: Catalog, seed: int) -> None:
    rng = random.Random(seed)
    scopes = [
        Scope(user_id=u, agent_id=a, session_id=s) for u in "uv" for a in (None, "a") for s in (None, "s")
    ]
    weights = [1 / (rank + 1) for rank in range(len(VOCABULARY))]
    corpus: dict[str, str] = {}
    scope_of: dict[str, Scope] = {}
    for number in range(60):
        name = f"turn-{number}"
        corpus[name] = " ".join(rng.choices(VOCABULARY, weights, k=rng.randint(0, 12)))
        scope_of[name] = rng.choice(scopes)
        add(catalog, name, corpus[name], scope_of[name])

    for _ in range(25):
        query = " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 5))) + "?"
        scope, limit = rng.choice(scopes), rng.randint(1, 30)
        expected = {
            name: score
            for name, score in brute_force_bm25(corpus, query).items()
            if scope.admits(scope_of[name])
        }

        hits = catalog.search_text(query, scope, FINGERPRINT, limit)

        assert {hit.turn_id: hit.score for hit in hits} == pytest.approx(
            {hit.turn_id: expected[hit.turn_id] for hit in hits}
        )
        assert [hit.score for hit in hits] == pytest.approx(sorted(expected.values(), reverse=True)[:limit])
        assert len({hit.turn_id for hit in hits}) == len(hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_among_equals_the_newer_comes_first(catalog: Catalog) -> None:
    for number in range(5):
        add(catalog, f"turn-{number}", "Mara lives in Oslo.")

    assert find(catalog, "oslo", limit=3) == ["turn-4", "turn-3", "turn-2"]


def test_case_diacritics_and_punctuation_do_not_count(catalog: Catalog) -> None:
    add(catalog, "a", "José moved to Århus; invoice no. 2048-B.")
    add(catalog, "b", "nothing of the kind")

    for query in ("jose", "JOSÉ?", "invoice #2048", "ARHUS", "«århus»", "'b'"):
        assert find(catalog, query) == ["a"]


@pytest.mark.parametrize("query", ["東京", "茶", "私は東京が好き", "ラーメン", "서울에서"])
def test_words_are_found_inside_sentences_without_spaces(catalog: Catalog, query: str) -> None:
    add(catalog, "a", "昨日東京でラーメンと茶を。서울에")
    add(catalog, "b", "京東大阪")

    assert find(catalog, query) == ["a"]


# Copies


def test_of_copies_the_newest_is_found_with_the_score_of_the_best(catalog: Catalog) -> None:
    scopes = [Scope(session_id=f"s{number}") for number in range(3)]
    content = [record_of(chunk) for chunk in chain(3, 2, seed=700)]
    add(catalog, "copy-0", "Oslo", scopes[0], content)
    add(catalog, "copy-1", "Oslo and a lot of other words", scopes[1], content)
    # The same tokens after another system prompt: other chain keys, the same content keys.
    moved = [
        dataclasses.replace(chunk, key=ChunkKey(f"moved-{chunk.key}"), parent=ChunkKey("p"))
        for chunk in content
    ]
    add(catalog, "copy-2", "Oslo with words", scopes[2], moved)
    add(catalog, "prefix", "Oslo again and again", content=content[:1])
    texts = ["Oslo", "Oslo and a lot of other words", "Oslo with words", "Oslo again and again"]
    best = max(brute_force_bm25({text: text for text in texts}, "Oslo").values())

    hits = catalog.search_text("Oslo", Scope(), FINGERPRINT, 2)

    assert [hit.turn_id for hit in hits] == ["copy-2", "prefix"]
    assert hits[0].score == pytest.approx(best)
    assert [find(catalog, "Oslo", scope) for scope in scopes] == [["copy-0"], ["copy-1"], ["copy-2"]]


def test_when_the_newest_copy_goes_the_next_takes_its_place(catalog: Catalog) -> None:
    content = add(catalog, "old", "Oslo", Scope(session_id="s"))
    add(catalog, "new", "Oslo", Scope(session_id="t"), content)

    assert find(catalog, "Oslo") == ["new"]
    catalog.forget([TurnId("new")])
    assert find(catalog, "Oslo") == ["old"]
