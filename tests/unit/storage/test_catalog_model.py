"""Any history of a catalog, and an index that follows it, against a brute-force model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_agent.chunks import Scope, TurnId
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import FINGERPRINT, turn_of, vector_for
from tests.unit.storage.catalogs import found, records, vectors

USERS = [Scope(user_id="u", session_id=session) for session in (None, "s")] + [Scope(user_id="v")]
OPERATION = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(0, 2),  # user
        st.integers(0, 1),  # chain
        st.integers(0, 2),  # chunks of context
        st.integers(1, 3),  # chunks of content
        st.booleans(),  # with vectors
        st.booleans(),  # leave out what is stored
    ),
    st.tuples(st.just("quarantine"), st.integers(0, 2), st.integers(0, 1), st.integers(0, 4)),
    st.tuples(st.just("forget"), st.lists(st.integers(0, 40), min_size=1, max_size=2)),
    st.tuples(st.just("follow"), st.integers(1, 5)),
)


class Model:
    """The rules of the catalog, as plain dictionaries."""

    def __init__(self) -> None:
        self.turns: dict[str, tuple[Scope, tuple[str, ...], set[str]]] = {}  # scope, content, context
        self.aliases: dict[str, str] = {}
        self.blobs: dict[str, str] = {}
        self.quarantined: set[str] = set()
        self.vectors: set[str] = set()

    def entries(self) -> set[tuple[str, str]]:
        return {
            (turn_id, key)
            for turn_id, (_, content, _) in self.turns.items()
            for key in content
            if key in self.vectors and key not in self.quarantined
        }

    def forget(self, ids: list[str]) -> set[str]:
        for asked in ids:
            turn_id = self.aliases.get(asked, asked)
            self.turns.pop(turn_id, None)
        self.aliases = {alias: turn_id for alias, turn_id in self.aliases.items() if turn_id in self.turns}
        used = {key for _, content, context in self.turns.values() for key in {*content, *context}}
        blobs = set(self.blobs.values())
        self.blobs = {key: blob for key, blob in self.blobs.items() if key in used}
        self.quarantined &= used
        self.vectors &= used
        return blobs - set(self.blobs.values())


class Follower:
    """An index that reads a few changes at a time and is behind most of the time."""

    def __init__(self) -> None:
        self.seq = 0
        self.entries: dict[int, tuple[str, str]] = {}

    def follow(self, catalog: Catalog, limit: int) -> bool:
        changes = catalog.changes_since(FINGERPRINT, "default", self.seq, limit)
        for change in changes:
            assert change.seq > self.seq
            self.seq = change.seq
            if change.vector is None:
                self.entries.pop(change.entry_id, None)
            else:
                assert change.vector == vector_for(change.chunk_key)
                self.entries[change.entry_id] = (change.turn_id, change.chunk_key)
        return bool(changes)


def check_add(catalog: Catalog, model: Model, number: int, operation: tuple[object, ...]) -> None:
    _, user, seed, num_context, num_content, with_vectors, leave_out = operation
    scope = USERS[user]  # type: ignore[call-overload]
    chunks = records(*[2] * 5, seed=seed, scope=scope, blob=f"b{number}")  # type: ignore[arg-type]
    chunks = chunks[: num_context + num_content]  # type: ignore[operator]
    context, content = chunks[:num_context], chunks[num_context:]  # type: ignore[misc]
    turn = turn_of(content, f"turn-{number}", scope=scope)
    live = model.blobs.keys() - model.quarantined
    left_out = model.blobs.keys() if leave_out else set()  # quarantined ones too: they stay so
    given = [chunk for chunk in content if chunk.key not in left_out]
    offered = vectors(chunks) if with_vectors else {}

    result = catalog.add_turn(
        turn, [chunk.key if chunk.key in left_out else chunk for chunk in context], given, offered
    )

    same = [
        turn_id for turn_id, (old_scope, keys, _) in model.turns.items()
        if (old_scope, keys) == (scope, turn.chunk_keys)
    ]  # fmt: skip
    new = {chunk.key for chunk in [*context, *given]} - live - left_out
    assert result.new_chunks == new
    assert result.new_turn == (not same)
    assert result.turn_id == (same[0] if same else turn.turn_id)
    before = set(model.blobs.values())
    model.blobs.update(dict.fromkeys(new, f"b{number}"))
    assert set(result.unused_blobs) == before - set(model.blobs.values())
    model.quarantined -= new
    model.vectors.update(offered)
    if same:
        model.aliases[turn.turn_id] = same[0]
        model.turns[same[0]][2].update(chunk.key for chunk in context)
    else:
        model.turns[turn.turn_id] = (scope, turn.chunk_keys, {chunk.key for chunk in context})


@settings(max_examples=35, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations=st.lists(OPERATION, min_size=15, max_size=40))
def test_an_index_that_follows_the_changes_holds_what_the_model_holds(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[object, ...]]
) -> None:
    catalog = Catalog(tmp_path_factory.mktemp("model") / "c")
    model, follower = Model(), Follower()

    for number, operation in enumerate(operations):
        match operation:
            case ("add", *_):
                check_add(catalog, model, number, operation)
            case ("quarantine", int(user), int(seed), int(idx)):
                key = records(*[2] * 5, seed=seed, scope=USERS[user])[idx].key
                catalog.quarantine(key, "test")
                model.quarantined |= {key} & model.blobs.keys()
            case ("forget", list(numbers)):
                ids = [f"turn-{number}" for number in numbers]
                assert set(catalog.forget(map(TurnId, ids))) == model.forget(ids)
            case ("follow", int(limit)):
                follower.follow(catalog, limit)
        assert catalog.known_turns([TurnId(f"turn-{n}") for n in range(50)]) == {
            *model.turns, *model.aliases,
        }  # fmt: skip

    while follower.follow(catalog, 3):
        pass
    assert set(follower.entries.values()) == model.entries()
    assert found(catalog) == model.entries()
    assert {record.key: record.blob for record in catalog.all_chunks()} == model.blobs
    assert {record.key for record in catalog.all_chunks() if record.quarantined} == model.quarantined
    stats = catalog.stats()
    assert (stats["turns"], stats["entries"]) == (len(model.turns), len(model.entries()))
    catalog.close()
