"""Words of a text and of a query: what a user types is never syntax, and never too long."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_agent.chunks import Scope
from kv_agent.storage import documents
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.words import query_terms, words
from tests.unit.storage.builders import FINGERPRINT
from tests.unit.storage.text_turns import add, find, seeds

# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mara's flat, No. 12-b: 3.5 km!", ["mara", "s", "flat", "no", "12", "b", "3", "5", "km"]),
        ("snake_case and\tCamelCase\n\0x", ["snake", "case", "and", "camelcase", "x"]),
        ("Ünïcödé – CAFÉ, STRASSE straße", ["unicode", "cafe", "strasse", "strasse"]),
        ("e\u0301 é İ ﬁ ２", ["e", "e", "i", "fi", "2"]),
        ("Ἀθήνα Йод", ["αθηνα", "иод"]),
        ("東京tower 12階", ["東", "京", "tower", "12", "階"]),
        ("がぎ カー", ["が", "ぎ", "カ", "ー"]),
        ("한국어", ["한", "국", "어"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("\ud800 🙂 …", []),
        ("", []),
    ],
)
def test_words_of_a_text(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_a_query_asks_for_neighbours_where_no_spaces_are_written() -> None:
    assert query_terms("Tokyo 東京都 茶 TOKYO 東京") == ["tokyo", "東 京", "京 都", "茶"]


@given(st.text())
def test_words_hold_nothing_that_the_index_would_split_or_read_as_syntax(text: str) -> None:
    found = words(text)

    assert all(word and all(not c.isascii() or c.isalnum() for c in word) for word in found)
    assert words(" ".join(found)) == found
    assert {part for term in query_terms(text) for part in term.split(" ")} == set(found)


# Hostile queries


@pytest.mark.parametrize(
    "query",
    ["", " ", '"', '""', "'", "*", "oslo*", "^oslo", "NEAR", "NEAR(oslo, 2)", "AND", "oslo AND", "OR OR",
     "NOT oslo", "oslo NOT", "words:oslo", "{words scope}:oslo", "-words:oslo", "(((", ")", "a + b",
     "oslo;DROP TABLE turns", "\0", "oslo\0", "\ud800", "%_", "--", "/*", "?1", ":x", "...", "🙂", "\u0301",
     "rank MATCH 'x'", "x" * 100_000, '"' * 100_000, "NOT " * 50_000],
    ids=lambda query: repr(query[:20]),
)  # fmt: skip
def test_nothing_a_user_types_is_syntax(catalog: Catalog, query: str) -> None:
    add(catalog, "turn", "Oslo")

    assert find(catalog, query) == (["turn"] if "oslo" in words(query) else [])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_finds_itself_and_no_query_fails(catalog: Catalog, text: str) -> None:
    turn_id = f"turn-{next(seeds)}"
    storable = text.encode(errors="ignore").decode()
    add(catalog, turn_id, storable)

    assert (turn_id in find(catalog, text, limit=10_000)) == bool(words(storable))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_zero_finds_nothing_and_a_negative_one_is_refused(catalog: Catalog, limit: int) -> None:
    add(catalog, "turn", "Oslo")

    if limit == 0:
        assert find(catalog, "Oslo", limit=0) == []
    else:
        with pytest.raises(ValueError, match="limit"):
            find(catalog, "Oslo", limit=limit)


# Long queries


def test_of_a_long_query_the_rare_words_are_looked_for(catalog: Catalog) -> None:
    common = " ".join(f"common{number}" for number in range(documents.MAX_TERMS))
    for number in range(3):
        add(catalog, f"turn-{number}", common)
    add(catalog, "rare", f"{common} Zanzibar")
    add(catalog, "other", "Zanzibar", Scope(user_id="other"))
    unknown = " ".join(f"unknown{number}" for number in range(500))

    hits = catalog.search_text(f"{unknown} {common} Zanzibar?", Scope(), FINGERPRINT, 10)

    assert hits[0].turn_id == "rare"
    assert len(hits) == 4


def test_a_hundred_kilobytes_of_query_give_a_bounded_one(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(f"w{number}" for number in range(20_000))
    add(catalog, "all", text)
    asked: list[str] = []
    match = documents._match

    def watched(admitted: str, terms: list[str]) -> str:
        asked.append(match(admitted, terms))
        return asked[-1]

    monkeypatch.setattr(documents, "_match", watched)

    assert len(text) > 100_000
    assert find(catalog, text) == ["all"]
    assert len(asked) < 1100
    assert len(asked[-1]) < 2000
