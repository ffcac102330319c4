"""Chunks in the catalog: when an index is told of them, and how quarantine and recapture change that."""

from __future__ import annotations

import dataclasses

from kv_agent.chunks import ChunkKey, Fingerprint, Scope, TurnId
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import FINGERPRINT, turn_of, vector_for
from tests.unit.storage.catalogs import found, records, vectors


def test_changes_name_their_entry_in_full(catalog: Catalog) -> None:
    scope = Scope(user_id="u", agent_id="a", session_id="s")
    content = records(3, scope=scope)
    catalog.add_turn(turn_of(content, scope=scope), [], content, vectors(content))
    (added,) = catalog.changes_since(FINGERPRINT, "default", 0)
    catalog.forget([TurnId("turn-1")])
    stale, removed = catalog.changes_since(FINGERPRINT, "default", 0)

    assert (added.chunk_key, added.content_key) == (content[0].key, content[0].content_key)
    assert (added.turn_id, added.scope) == ("turn-1", scope)
    assert added.vector == vector_for(content[0].key)
    assert stale == dataclasses.replace(added, vector=None)
    assert removed == dataclasses.replace(stale, seq=removed.seq)
    assert catalog.last_seq(FINGERPRINT, "default") == removed.seq
    assert catalog.last_seq(FINGERPRINT, "other") == 0
    assert catalog.last_seq(Fingerprint("other"), "default") == 0


def test_a_vector_given_later_makes_the_chunk_findable_in_every_turn_that_has_it(catalog: Catalog) -> None:
    content = records(3, 4)
    catalog.add_turn(turn_of(content), [], content, {})
    assert found(catalog) == set()

    catalog.add_turn(turn_of(content[:1], "turn-2"), [], [], vectors(content[:1]))

    assert found(catalog) == {("turn-1", content[0].key), ("turn-2", content[0].key)}


def test_context_is_never_found_even_with_a_vector(catalog: Catalog) -> None:
    system, content = records(3, 4)

    catalog.add_turn(turn_of([content]), [system], [content], vectors([system, content]))

    assert found(catalog) == {("turn-1", content.key)}


def test_quarantine_hides_a_chunk_and_keeps_the_rest(catalog: Catalog) -> None:
    content = records(3, 4)
    catalog.add_turn(turn_of(content), [], content, vectors(content))

    catalog.quarantine(content[0].key, "checksum")
    seq = catalog.last_seq(FINGERPRINT, "default")
    catalog.quarantine(content[0].key, "again")
    catalog.quarantine(ChunkKey("unknown"), "never stored")

    assert found(catalog) == {("turn-1", content[1].key)}
    assert catalog.last_seq(FINGERPRINT, "default") == seq
    assert catalog.chunks([content[0].key]) == {
        content[0].key: dataclasses.replace(content[0], quarantined=True)
    }
    assert catalog.child_lengths(content[0].parent) == ()
    assert catalog.stats()["quarantined"] == 1


def test_recapture_brings_a_quarantined_chunk_back_to_every_turn(catalog: Catalog) -> None:
    content = records(3, 4)
    catalog.add_turn(turn_of(content), [], content, vectors(content))
    other = Scope(session_id="other")
    catalog.add_turn(turn_of(content, "turn-2", scope=other), [], [], {})
    before = found(catalog)
    for chunk in content:
        catalog.quarantine(chunk.key, "checksum")
    assert found(catalog) == set()

    again = [dataclasses.replace(chunk, blob="b1", checksum="1" * 64) for chunk in content]
    first = catalog.add_turn(turn_of(content, "turn-3"), [], again[:1], {})
    second = catalog.add_turn(turn_of(content, "turn-4"), [], again, {})

    assert (first.new_chunks, first.unused_blobs) == ({content[0].key}, ())
    assert (second.new_chunks, second.unused_blobs) == ({content[1].key}, ("b0",))
    assert found(catalog) == before
    assert catalog.chunks([content[0].key]) == {content[0].key: again[0]}


def test_a_live_row_stays_as_it_is(catalog: Catalog) -> None:
    (chunk,) = records(3)
    catalog.add_turn(turn_of([chunk]), [], [chunk], {})

    again = dataclasses.replace(chunk, blob="b1")
    result = catalog.add_turn(turn_of([chunk], "turn-2"), [], [again], {})

    assert result.new_chunks == frozenset()
    assert catalog.chunks([chunk.key]) == {chunk.key: chunk}


def test_child_lengths_are_those_of_all_usable_children(catalog: Catalog) -> None:
    lengths = [7, 2, 2, 5, 7, 11, 5, 2]
    children = [records(length, seed=number)[0] for number, length in enumerate(lengths)]
    for number, child in enumerate(children):
        catalog.add_turn(turn_of([child], f"turn-{number}"), [], [child], {})
    bad = {0, 3, 6, 1}
    for number in bad:
        catalog.quarantine(children[number].key, "bad")

    usable = {length for number, length in enumerate(lengths) if number not in bad}
    assert catalog.child_lengths(children[0].parent) == tuple(sorted(usable)) == (2, 7, 11)


def test_child_lengths_are_distinct_and_ascending(catalog: Catalog) -> None:
    for number, length in enumerate([5, 3, 9, 3]):
        content = records(length, seed=number)
        catalog.add_turn(turn_of(content, f"turn-{number}"), [], content, {})

    assert catalog.child_lengths(content[0].parent) == (3, 5, 9)
    assert catalog.child_lengths(ChunkKey("unknown")) == ()
