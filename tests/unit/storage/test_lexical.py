"""Text search in the catalog against brute-force BM25, and what may be found at all."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey, ChunkRecord, Fingerprint, Scope, TurnId, TurnRecord
from kv_agent.errors import StorageError
from kv_agent.storage import documents, schema, statements
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.words import query_terms, words
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, turn_of

NUM_SCOPE_WORDS = 3


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    yield catalog
    catalog.close()


_seeds = itertools.count()


def add(
    catalog: Catalog,
    turn_id: str,
    text: str,
    scope: Scope | None = None,
    content: list[ChunkRecord] | None = None,
    created: float | None = None,
) -> list[ChunkRecord]:
    """Store a turn, with content of its own unless given -> its chunks."""
    number = next(_seeds)
    if content is None:
        content = [record_of(chunk, scope) for chunk in chain(1, seed=number, scope=scope)]
    turn = turn_of(content, turn_id, scope, number if created is None else created)
    catalog.add_turn(dataclasses.replace(turn, text=text), [], content, {})
    return content


def find(catalog: Catalog, query: str, scope: Scope | None = None, limit: int = 1000) -> list[str]:
    return [hit.turn_id for hit in catalog.search_text(query, scope or Scope(), FINGERPRINT, limit)]


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


# Ranking


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


# Scope


OTHERS = {
    "user": (Scope(user_id="u"), Scope(user_id="other")),
    "namespace": (Scope(), Scope(namespace="other")),
    "agent": (Scope(agent_id="a"), Scope(agent_id="b")),
    "session": (Scope(session_id="s"), Scope(session_id="t")),
    "no agent": (Scope(agent_id="a"), Scope()),
}


@pytest.mark.parametrize("level", OTHERS)
def test_the_scope_is_applied_before_the_cut(catalog: Catalog, level: str) -> None:
    mine, other = OTHERS[level]
    add(catalog, "mine-1", "a long text in which Oslo is one of the very many words that there are", mine)
    for number in range(1000 if level == "user" else 30):
        add(catalog, f"other-{number}", "Oslo", other)
    add(catalog, "mine-2", "another long text that says Oslo among all of the other words it has", mine)

    assert sorted(find(catalog, "Oslo", mine, limit=2)) == ["mine-1", "mine-2"]


def test_only_turns_of_the_model_in_use_are_found(catalog: Catalog) -> None:
    add(catalog, "mine", "Oslo")

    assert catalog.search_text("Oslo", Scope(), Fingerprint("another model"), 5) == []


def test_names_of_scopes_cannot_be_confused_or_searched_for(catalog: Catalog) -> None:
    victim = Scope(namespace="n", user_id="u", agent_id="a")
    add(catalog, "secret", "Oslo", victim)
    labels = documents.scope_words(victim, FINGERPRINT)

    for label in labels:
        for query in (label, f"scope : {label}", f'x") OR scope : ("{label}" OR "Oslo"'):
            assert find(catalog, query) == []
            assert find(catalog, query, Scope(namespace="n", user_id="eve")) == []
    for scope in (Scope(namespace="n", user_id='u", "a'), Scope(namespace='n", "u', user_id="a")):
        assert find(catalog, "Oslo", scope) == []
    assert find(catalog, labels[0], victim) == []


# Coming and going


def test_forgotten_turns_are_not_found_and_leave_no_word_behind(catalog: Catalog) -> None:
    for number in range(20):
        add(catalog, f"turn-{number}", f"Oslo unique{number}")

    catalog.forget([TurnId(f"turn-{number}") for number in range(20) if number != 7])

    assert find(catalog, "Oslo") == ["turn-7"]
    assert find(catalog, "unique3") == []
    with catalog._connection() as db:
        db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab (main, turn_words, col)")
        left = {term for (term,) in db.execute("SELECT term FROM vocabulary WHERE col = 'words'")}
        db.execute("DROP TABLE temp.vocabulary")
    assert left == {"oslo", "unique7"}


def test_a_turn_without_content_is_not_found(catalog: Catalog) -> None:
    system = [record_of(chunk) for chunk in chain(3)]
    turn = dataclasses.replace(turn_of([]), text="You are a helpful assistant.")
    catalog.add_turn(turn, system, [], {})

    assert find(catalog, "helpful") == []


def test_a_turn_is_found_while_any_of_its_content_can_be_used(catalog: Catalog) -> None:
    first, second = (record_of(chunk) for chunk in chain(3, 2, seed=600))
    add(catalog, "turn", "Oslo", content=[first, second])

    catalog.quarantine(first.key, "checksum")
    assert find(catalog, "Oslo") == ["turn"]
    catalog.quarantine(second.key, "checksum")
    assert find(catalog, "Oslo") == []
    catalog.quarantine(second.key, "again")
    assert find(catalog, "Oslo") == []


def test_recapture_as_anything_brings_a_turn_back(catalog: Catalog) -> None:
    (chunk,) = [record_of(chunk) for chunk in chain(3, seed=500)]
    add(catalog, "turn", "Oslo", content=[chunk])
    catalog.quarantine(chunk.key, "checksum")
    (later,) = (record_of(new) for new in chain(2, seed=501, parent=chunk.key))

    catalog.add_turn(dataclasses.replace(turn_of([later], "next"), text="Bergen"), [chunk], [later], {})

    assert find(catalog, "Oslo Bergen") == ["turn", "next"]


def test_a_failed_transaction_leaves_the_index_as_it_was(catalog: Catalog) -> None:
    content = add(catalog, "turn", "Oslo")
    stray = dataclasses.replace(turn_of(content, "bad", Scope(user_id="eve")), text="Oslo")

    with pytest.raises(StorageError):
        catalog.add_turn(stray, [], [], {})

    assert find(catalog, "Oslo") == ["turn"]
    assert find(catalog, "Oslo", Scope(user_id="eve")) == []


def test_another_connection_finds_a_turn_at_once_and_after_vacuum(tmp_path: Path) -> None:
    first, second = Catalog(tmp_path / "c"), Catalog(tmp_path / "c")
    for number in range(6):
        add(first, f"turn-{number}", f"Oslo unique{number}")
        assert find(second, f"unique{number}") == [f"turn-{number}"]
    first.forget([TurnId("turn-0"), TurnId("turn-3")])

    with first._connection() as db:
        db.execute("VACUUM")

    assert find(second, "unique4") == ["turn-4"]
    assert find(second, "Oslo") == ["turn-5", "turn-4", "turn-2", "turn-1"]
    add(second, "turn-6", "unique6")
    assert find(first, "unique6") == ["turn-6"]
    first.close()
    second.close()


def test_after_any_history_exactly_the_usable_turns_are_found(catalog: Catalog) -> None:
    rng = random.Random(0)
    sessions = [Scope(session_id=session) for session in ("s", "t")]
    chunks = [[record_of(chunk) for chunk in chain(1, 1, 1, seed=900 + number)] for number in range(4)]
    turns: dict[str, TurnRecord] = {}
    for number in range(250):
        match rng.choice(["add", "add", "quarantine", "forget"]):
            case "add":
                start, end = sorted(rng.sample(range(4), 2))
                every = rng.choice(chunks)
                turn = turn_of(every[start:end], f"turn-{number}", rng.choice(sessions), float(number))
                turn = dataclasses.replace(turn, text="Oslo")
                result = catalog.add_turn(turn, every[:start], every[start:end], {})
                turns.setdefault(result.turn_id, turn)
            case "quarantine":
                catalog.quarantine(rng.choice(rng.choice(chunks)).key, "test")
            case "forget" if turns:
                turns.pop(gone := rng.choice(list(turns)))
                catalog.forget([TurnId(gone)])

        stored = catalog.chunks(chunk.key for every in chunks for chunk in every)
        usable = {
            turn_id
            for turn_id, turn in turns.items()
            if not all(stored[key].quarantined for key in turn.chunk_keys)
        }
        for scope in sessions:  # a session has no copies: the same turn again is the same turn
            assert set(find(catalog, "Oslo", scope)) == {t for t in usable if turns[t].scope == scope}
    assert len(turns) > 3
    with catalog._connection() as db:
        db.execute("INSERT INTO turn_words (turn_words) VALUES ('integrity-check')")


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
    turn_id = f"turn-{next(_seeds)}"
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


# Older catalogs, other SQLites


def document_rows(catalog: Catalog) -> list[tuple[object, ...]]:
    with catalog._connection() as db:
        return db.execute(
            "SELECT d.turn_id, d.copy_key, w.scope, w.words FROM turn_docs d"
            " JOIN turn_words w ON w.rowid = d.doc_id ORDER BY d.doc_id"
        ).fetchall()


def fill(catalog: Catalog) -> None:
    scope = Scope(namespace="n", user_id="ü", agent_id="a", session_id="s")
    for number, owner in enumerate([Scope(), scope, Scope(session_id="t")]):
        content = [record_of(chunk, owner) for chunk in chain(2, 3, seed=number % 2, scope=owner)]
        text = f"José {number} 東京"
        add(catalog, f"turn-{number}", text, owner, content, created=float(number))
    hidden = [record_of(chunk) for chunk in chain(2, seed=7)]
    add(catalog, "quarantined", "José", content=hidden, created=9.0)
    catalog.quarantine(hidden[0].key, "checksum")
    catalog.add_turn(turn_of([], "no content"), hidden, [], {})
    catalog.quarantine(hidden[0].key, "checksum")


def test_a_catalog_of_the_first_schema_gets_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first_release:
        first_release.setattr(schema, "MIGRATIONS", (schema.m001_initial,))
        first_release.setattr(documents, "add_missing", lambda db, keys: None)
        first_release.setattr(documents, "remove_dead", lambda db, key: None)
        first_release.setattr(statements, "INSERT_SKETCH", statements.INSERT_ALIAS)  # a table that is there
        old = Catalog(tmp_path / "old")
        fill(old)
        old.close()
    new = Catalog(tmp_path / "new")
    fill(new)

    migrated = Catalog(tmp_path / "old")

    assert len(document_rows(new)) == 3
    assert document_rows(migrated) == document_rows(new)
    assert find(migrated, "jose") == find(new, "jose") == ["turn-2"]  # of two copies
    (added,) = add(migrated, "later", "José")
    assert find(migrated, "jose") == ["later", "turn-2"]
    migrated.forget([TurnId("turn-2")])
    migrated.quarantine(added.key, "checksum")
    assert find(migrated, "jose") == ["turn-0"]
    migrated.close()
    new.close()


def test_a_sqlite_without_full_text_search_is_refused_at_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Catalog(tmp_path / "c").close()
    monkeypatch.setattr(schema, "_USES_FTS5", "SELECT fts5_function_that_is_not_there()")

    for path in (tmp_path / "c", tmp_path / "new"):
        with pytest.raises(StorageError, match="built without FTS5"):
            Catalog(path)
