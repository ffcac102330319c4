"""Which turns a text search may find: those in scope, as long as some of their content can be used."""

from __future__ import annotations

import dataclasses
import random

import pytest

from kv_agent.chunks import Fingerprint, Scope, TurnId, TurnRecord
from kv_agent.storage import documents
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, turn_of
from tests.unit.storage.text_turns import add, find

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
