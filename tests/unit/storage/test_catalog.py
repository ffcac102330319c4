"""The catalog against facts and, for what an index follows, against a brute-force model."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey, ChunkRecord, Fingerprint, Scope, TurnId
from kv_agent.errors import StorageError
from kv_agent.storage import catalog as catalog_module
from kv_agent.storage import schema
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.turn_writes import UnknownChunkError
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, turn_of, vector_for


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    yield catalog
    catalog.close()


def records(*lengths: int, seed: int = 0, scope: Scope | None = None, blob: str = "b0") -> list[ChunkRecord]:
    return [record_of(chunk, scope, blob) for chunk in chain(*lengths, seed=seed, scope=scope)]


def vectors(chunks: list[ChunkRecord]) -> dict[ChunkKey, bytes]:
    return {chunk.key: vector_for(chunk.key) for chunk in chunks}


def found(catalog: Catalog, seq: int = 0, limit: int = 10_000) -> set[tuple[str, str]]:
    """What an index that follows all changes would hold: (turn, chunk)."""
    entries: dict[int, tuple[str, str]] = {}
    while changes := catalog.changes_since(FINGERPRINT, "default", seq, limit):
        for change in changes:
            if change.vector is None:
                entries.pop(change.entry_id, None)
            else:
                assert change.vector == vector_for(change.chunk_key)
                entries[change.entry_id] = (change.turn_id, change.chunk_key)
        seq = changes[-1].seq
    assert len(set(entries.values())) == len(entries)
    return set(entries.values())


def test_a_turn_and_its_chunks_come_back_as_they_went_in(catalog: Catalog) -> None:
    scope = Scope(namespace="n", user_id="u", agent_id="a", session_id="s")
    system, *content = records(3, 4, 2, scope=scope)
    turn = turn_of(content, scope=scope)

    result = catalog.add_turn(turn, [system], content, vectors(content))

    assert result.new_turn
    assert result.turn_id == turn.turn_id
    assert result.new_chunks == {system.key, *turn.chunk_keys}
    assert catalog.turns([turn.turn_id, TurnId("no")]) == {turn.turn_id: turn}
    everything = {chunk.key: chunk for chunk in [system, *content]}
    assert catalog.chunks([*everything, ChunkKey("no")]) == everything
    assert list(catalog.all_chunks(page=2)) == [everything[key] for key in sorted(everything)]
    assert catalog.chunk_keys_of_turns([turn.turn_id]) == everything.keys()


def test_it_is_all_there_after_reopening(tmp_path: Path) -> None:
    content = records(3, 4)
    first = Catalog(tmp_path / "c")
    first.add_turn(turn_of(content), [], content, vectors(content))
    before = found(first)
    first.close()

    second = Catalog(tmp_path / "c")

    assert second.turns([TurnId("turn-1")]) == {TurnId("turn-1"): turn_of(content)}
    assert found(second) == before
    second.close()


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


def test_the_same_turn_again_is_the_same_turn_under_another_id(catalog: Catalog) -> None:
    content = records(3, 4)
    catalog.add_turn(turn_of(content), [], content, vectors(content))

    again = catalog.add_turn(turn_of(content, "turn-2", created=2.0), [], content, vectors(content))
    third = catalog.add_turn(turn_of(content, "turn-2", created=3.0), [], [], {})

    assert (again.turn_id, again.new_turn, again.new_chunks) == ("turn-1", False, frozenset())
    assert third == again
    assert catalog.stats()["turns"] == 1
    assert found(catalog) == {("turn-1", chunk.key) for chunk in content}
    assert catalog.known_turns(map(TurnId, ["turn-1", "turn-2", "turn-3"])) == {"turn-1", "turn-2"}
    assert catalog.turns([TurnId("turn-2")]) == {TurnId("turn-2"): turn_of(content)}


def test_forgetting_an_alias_forgets_the_turn_and_all_its_ids(catalog: Catalog) -> None:
    content = records(3)
    catalog.add_turn(turn_of(content), [], content, {})
    catalog.add_turn(turn_of(content, "turn-2"), [], [], {})

    assert catalog.forget([TurnId("turn-2")]) == ("b0",)
    assert catalog.known_turns([TurnId("turn-1"), TurnId("turn-2")]) == frozenset()


@pytest.mark.parametrize("field", ["agent_id", "session_id"])
def test_another_agent_or_session_is_another_turn_of_the_same_chunks(catalog: Catalog, field: str) -> None:
    content = records(3)
    other = dataclasses.replace(Scope(), **{field: "x"})
    catalog.add_turn(turn_of(content), [], content, vectors(content))

    result = catalog.add_turn(turn_of(content, "turn-2", scope=other), [], [], {})

    assert result.new_turn
    assert result.new_chunks == frozenset()
    assert found(catalog) == {("turn-1", content[0].key), ("turn-2", content[0].key)}


def test_an_id_that_names_a_different_turn_is_refused(catalog: Catalog) -> None:
    one, two = records(3), records(3, seed=1)
    catalog.add_turn(turn_of(one), [], one, {})

    with pytest.raises(StorageError, match="different turn"):
        catalog.add_turn(turn_of(two), [], two, {})
    assert catalog.stats()["chunks"] == 1


def test_a_turn_with_an_unknown_chunk_changes_nothing(catalog: Catalog) -> None:
    content = records(3, 4)

    with pytest.raises(UnknownChunkError, match=content[1].key) as caught:
        catalog.add_turn(turn_of(content), [], content[:1], vectors(content))
    assert caught.value.keys == {content[1].key}
    with pytest.raises(UnknownChunkError):
        catalog.add_turn(turn_of(content[1:]), [content[0].key], content[1:], {})
    assert set(catalog.stats().values()) == {0}


def test_another_users_chunk_is_an_unknown_chunk(catalog: Catalog) -> None:
    content = records(3)
    catalog.add_turn(turn_of(content), [], content, {})

    with pytest.raises(UnknownChunkError):
        catalog.add_turn(turn_of(content, "turn-2", scope=Scope(user_id="eve")), [], [], {})


def test_chunks_that_do_not_belong_to_the_turn_are_refused(catalog: Catalog) -> None:
    content = records(3, 4)

    with pytest.raises(ValueError, match="owner"):
        catalog.add_turn(turn_of(content, scope=Scope(namespace="other")), [], content, {})
    with pytest.raises(ValueError, match="not among"):
        catalog.add_turn(turn_of(content[:1]), [], content, {})


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


def test_context_that_comes_with_a_known_turn_is_forgotten_with_it(catalog: Catalog) -> None:
    first, second, content = records(3, 2, 4)
    catalog.add_turn(turn_of([content]), [], [content], {})

    catalog.add_turn(turn_of([content], "turn-2"), [first], [], {})
    catalog.add_turn(turn_of([content], "turn-3"), [first.key, second], [], {})
    assert catalog.chunk_keys_of_turns([TurnId("turn-1")]) == {first.key, second.key, content.key}

    catalog.forget([TurnId("turn-1")])
    assert catalog.stats()["chunks"] == 0


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

    again = [dataclasses.replace(chunk, blob="b1", sha256="1" * 64) for chunk in content]
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


def test_child_lengths_are_distinct_and_ascending(catalog: Catalog) -> None:
    for number, length in enumerate([5, 3, 9, 3]):
        content = records(length, seed=number)
        catalog.add_turn(turn_of(content, f"turn-{number}"), [], content, {})

    assert catalog.child_lengths(content[0].parent) == (3, 5, 9)
    assert catalog.child_lengths(ChunkKey("unknown")) == ()


SCOPES = [
    Scope(user_id=user, agent_id=agent, session_id=session)
    for user in ("u", "v") for agent in (None, "a", "b") for session in (None, "s")
]  # fmt: skip


def test_listing_agrees_with_scope_admits_newest_first(catalog: Catalog) -> None:
    turns = []
    for number, scope in enumerate(SCOPES):
        content = records(3, seed=number, scope=scope)
        turns.append(turn_of(content, f"turn-{number}", scope=scope, created=float(number * 7 % 12)))
        catalog.add_turn(turns[-1], [], content, {})
    turns.sort(key=lambda turn: -turn.created)

    for scope in [*SCOPES, Scope(namespace="other", user_id="u")]:
        visible = [turn for turn in turns if scope.admits(turn.scope)]
        assert catalog.list_turns(scope) == visible
        assert catalog.list_turns(scope, limit=2) == visible[:2]
        assert catalog.list_turns(scope, before_created=5.0) == [t for t in visible if t.created < 5.0]


def test_more_keys_than_sqlite_has_variables(catalog: Catalog) -> None:
    content = records(*[1] * 300)
    catalog.add_turn(turn_of(content), [], content, {})

    padding = [f"no-{number}" for number in range(300_000)]

    assert len(catalog.chunks([*map(ChunkKey, padding), *(chunk.key for chunk in content)])) == 300
    assert catalog.known_turns([*map(TurnId, padding), TurnId("turn-1")]) == {"turn-1"}


def test_a_fingerprint_keeps_its_first_details(catalog: Catalog) -> None:
    catalog.register_fingerprint(FINGERPRINT, {"model": "m", "layers": 2, "rope": {"theta": 1e4}})
    catalog.register_fingerprint(FINGERPRINT, {"model": "other"})

    assert catalog.fingerprint_details(FINGERPRINT) == {"model": "m", "layers": 2, "rope": {"theta": 1e4}}
    assert catalog.fingerprint_details(Fingerprint("unknown")) is None


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_zero_gives_nothing_and_a_negative_one_is_refused(catalog: Catalog, limit: int) -> None:
    content = records(3)
    catalog.add_turn(turn_of(content), [], content, vectors(content))

    if limit == 0:
        assert catalog.list_turns(Scope(), limit=0) == []
        assert catalog.changes_since(FINGERPRINT, "default", 0, limit=0) == []
    else:
        with pytest.raises(ValueError, match="limit"):
            catalog.list_turns(Scope(), limit=limit)
        with pytest.raises(ValueError, match="limit"):
            catalog.changes_since(FINGERPRINT, "default", 0, limit=limit)


# Trouble


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c"
    Catalog(path).close()
    newer = len(schema.MIGRATIONS) + 1
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO schema_migrations VALUES (?, 'm002_future', 0)", (newer,))
    db.close()

    with pytest.raises(StorageError, match="upgrade"):
        Catalog(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT max(version) FROM schema_migrations").fetchone() == (newer,)
    db.close()


def test_a_migration_that_fails_leaves_the_former_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    content = records(3)
    old = Catalog(path)
    old.add_turn(turn_of(content), [], content, vectors(content))
    old.close()

    def m002_broken(db: schema.Database) -> None:
        db.execute("DROP TABLE entries")
        db.execute("no SQL")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, m002_broken))
        with pytest.raises(StorageError, match="syntax error"):
            Catalog(path)

    again = Catalog(path)
    assert found(again) == {("turn-1", content[0].key)}
    again.close()


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"certainly not SQLite" * 100)

    with pytest.raises(StorageError, match="not a database"):
        Catalog(path)


def test_a_missing_folder_is_a_storage_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open"):
        Catalog(tmp_path / "no" / "c")


def test_a_locked_catalog_is_a_storage_error_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "BUSY_TIMEOUT_S", 0.05)
    content = records(3)
    catalog = Catalog(tmp_path / "c")
    holder = sqlite3.connect(tmp_path / "c", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(StorageError, match="locked"):
        catalog.add_turn(turn_of(content), [], content, {})
    assert catalog.turns([TurnId("turn-1")]) == {}

    holder.execute("ROLLBACK")
    holder.close()
    assert catalog.add_turn(turn_of(content), [], content, {}).new_turn
    catalog.close()


def test_values_sqlite_cannot_hold_are_storage_errors(catalog: Catalog) -> None:
    (chunk,) = records(3)

    with pytest.raises(StorageError):
        catalog.add_turn(dataclasses.replace(turn_of([chunk]), text="\ud800"), [], [chunk], {})
    with pytest.raises(StorageError):
        catalog.add_turn(turn_of([chunk]), [], [dataclasses.replace(chunk, start=1 << 80)], {})
    with pytest.raises(StorageError, match="NUL"):
        catalog.add_turn(turn_of([chunk], "turn\0"), [], [chunk], {})
    with pytest.raises(StorageError):
        catalog.list_turns(Scope(user_id="\ud800"))
    assert set(catalog.stats().values()) == {0}


def test_a_closed_catalog_says_so(catalog: Catalog) -> None:
    catalog.close()
    catalog.close()

    with pytest.raises(StorageError, match="closed"):
        catalog.stats()


def test_a_commit_waits_for_the_disk(catalog: Catalog) -> None:
    with catalog._connection() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_threads_add_and_read_side_by_side(catalog: Catalog) -> None:
    def work(seed: int) -> None:
        for number in range(8):
            content = records(2, 3, seed=seed * 100 + number)
            catalog.add_turn(turn_of(content, f"turn-{seed}-{number}"), [], content, vectors(content))
            assert catalog.turns([TurnId(f"turn-{seed}-{number}")])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised

    assert catalog.stats()["turns"] == 32
    assert len(found(catalog)) == 64
    assert len(catalog._connections) <= 1  # those of ended threads are gone


FORK_SCRIPT = """
import os, sys
from pathlib import Path
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import chain, record_of, turn_of

def add(catalog, seed):
    content = [record_of(chunk) for chunk in chain(3, seed=seed)]
    catalog.add_turn(turn_of(content, f"turn-{seed}"), [], content, {})

path = Path(sys.argv[1])
catalog = Catalog(path)
add(catalog, 0)
to_child, to_parent = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    try:
        own = Catalog(path)  # as an engine forked from a user's process opens its own
        add(own, 1)
        add(catalog, 2)
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)  # the parent has closed everything meanwhile
        assert own.stats()["turns"] == 4, own.stats()
        add(own, 4)
        assert catalog.stats()["turns"] == 5
    except BaseException as err:
        print(repr(err), flush=True)
        os._exit(1)
    os._exit(0)
os.read(to_parent[0], 1)
add(catalog, 3)
catalog.close()
# Were the child's locks an illusion, this one would take itself for the last user and delete the log.
wal = path.with_name(path.name + "-wal")
assert wal.exists(), "the write-ahead log was deleted under the child"
os.write(to_child[1], b"x")
assert os.waitpid(child, 0)[1] == 0
again = Catalog(path)
assert again.stats()["turns"] == 5, again.stats()
with again._connection() as db:
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"""


def test_a_forked_child_and_its_parent_do_not_share_locks(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]

    done = subprocess.run(
        [sys.executable, "-c", FORK_SCRIPT, str(tmp_path / "c")],
        cwd=root, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr


# A brute-force model

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
