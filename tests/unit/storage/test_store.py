"""The store as a whole: what was put comes back bit for bit, once, whatever interrupts it."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.storage.blobs import BlobFiles, MissingBlobError
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.turn_writes import AddResult, UnknownChunkError
from tests.unit.storage.builders import FINGERPRINT, SPAWN, chain, kv_for, same_bits, turn_of

JOIN_TIMEOUT_S = 60


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    """Without a host cache, so that every load reads the disk."""
    store = LocalStore(tmp_path / "store", host_bytes=0)
    yield store
    store.close()


def blob_files(store: LocalStore) -> list[Path]:
    return sorted(path for path in store_root(store).glob("blobs/*/*"))


def store_root(store: LocalStore) -> Path:
    return store._catalog._path.parent


def holds(store: LocalStore, chunks: list[NewChunk]) -> bool:
    records = store.catalog.chunks(chunk.key for chunk in chunks)
    return all(same_bits(store.load(records[chunk.key]), chunk.kv) for chunk in chunks)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    num_context=st.integers(0, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]),
)
def test_a_turn_comes_back_bit_for_bit_from_a_reopened_store(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], num_context: int, dtype: torch.dtype
) -> None:
    root = tmp_path_factory.mktemp("store")
    chunks = chain(*lengths, dtype=dtype)
    context, content = chunks[:num_context], chunks[num_context:]
    first = LocalStore(root, host_bytes=1 << 20)
    first.put_turn(turn_of(content), context, content)
    first.close()

    second = LocalStore(root, host_bytes=0)

    assert holds(second, chunks)
    assert second.catalog.turns([TurnId("turn-1")]) == {TurnId("turn-1"): turn_of(content)}
    assert second.check() == []
    second.close()


def test_the_directory_is_private(tmp_path: Path) -> None:
    LocalStore(tmp_path / "a" / "store", host_bytes=0).close()

    assert stat.S_IMODE((tmp_path / "a" / "store").stat().st_mode) == 0o700


def test_a_root_that_cannot_be_created_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    for root in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StorageError, match="cannot create"):
            LocalStore(root, host_bytes=0)


def test_the_same_turn_twice_is_one_turn_and_one_blob(store: LocalStore) -> None:
    system, *content = chain(3, 4, 2)
    first = store.put_turn(turn_of(content), [system], content)

    again = store.put_turn(turn_of(content, "turn-2"), [system], content)
    retry = store.put_turn(turn_of(content), [system], content)

    assert first.new_turn
    assert len(first.new_chunks) == 3
    assert (again.new_turn, again.new_chunks, again.turn_id) == (False, frozenset(), "turn-1")
    assert retry == again
    assert len(blob_files(store)) == 1
    assert store.stats()["turns"] == 1
    assert store.catalog.known_turns([TurnId("turn-1"), TurnId("turn-2")]) == {"turn-1", "turn-2"}
    assert holds(store, [system, *content])


def test_the_same_chunks_in_another_session_are_two_turns_and_one_blob(store: LocalStore) -> None:
    content = chain(3, 4)
    store.put_turn(turn_of(content), [], content)

    other = turn_of(content, "turn-2", scope=Scope(session_id="s"))
    result = store.put_turn(other, [], content)

    assert (result.new_turn, result.new_chunks) == (True, frozenset())
    assert len(blob_files(store)) == 1
    assert store.stats()["turns"] == 2
    assert store.stats()["entries"] == 4


def test_a_turn_that_goes_on_stores_only_what_is_new(store: LocalStore) -> None:
    chunks = chain(4, 4, 4)
    store.put_turn(turn_of(chunks[:2]), [], chunks[:2])

    result = store.put_turn(turn_of(chunks, "turn-2"), [], chunks[1:])

    assert result.new_chunks == {chunks[2].key}
    assert len(blob_files(store)) == 2
    assert holds(store, chunks)


@pytest.mark.parametrize("turn_id", ["../../escape", "a/b", "", "x", "é\n", "-" * 500, "..", "turn.1"])
def test_any_turn_id_is_stored_inside_the_store(store: LocalStore, turn_id: str, tmp_path: Path) -> None:
    content = chain(3)

    store.put_turn(turn_of(content, turn_id), [], content)

    assert store.catalog.known_turns([TurnId(turn_id)]) == {turn_id}
    assert len(blob_files(store)) == 1
    assert list(tmp_path.iterdir()) == [store_root(store)]
    assert holds(store, content)


def test_kv_that_does_not_fit_its_tokens_is_refused() -> None:
    (chunk,) = chain(3)

    with pytest.raises(ValueError, match="T = 2"):
        dataclasses.replace(chunk, token_ids=(1, 2))


# Reading


def test_loading_names_missing_and_damaged_blobs_apart_and_does_not_quarantine(store: LocalStore) -> None:
    (lost,), (damaged,) = chain(3), chain(3, seed=1)
    store.put_turn(turn_of([lost]), [], [lost])
    store.put_turn(turn_of([damaged], "turn-2"), [], [damaged])
    records = store.catalog.chunks([lost.key, damaged.key])
    (store_root(store) / records[lost.key].blob).unlink()
    path = store_root(store) / records[damaged.key].blob
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    with pytest.raises(MissingBlobError):
        store.load(records[lost.key])
    with pytest.raises(CorruptChunkError, match="checksum"):
        store.load(records[damaged.key])

    assert store.stats()["quarantined"] == 0
    assert [problem.split(":")[0] for problem in store.check()] == [
        f"chunk {chunk.key} is {kind}"
        for chunk, kind in sorted([(lost, "lost"), (damaged, "damaged")], key=lambda pair: pair[0].key)
    ]


def test_a_catalog_row_that_points_outside_is_refused(store: LocalStore) -> None:
    (chunk,) = chain(3)
    store.put_turn(turn_of([chunk]), [], [chunk])
    record = store.catalog.chunks([chunk.key])[chunk.key]

    with pytest.raises(CorruptChunkError, match="blob path"):
        store.load(dataclasses.replace(record, blob="../../etc/passwd"))


def test_the_host_cache_serves_what_was_stored_or_loaded_before(tmp_path: Path) -> None:
    content = chain(3, 4)
    store = LocalStore(tmp_path, host_bytes=1 << 20)
    store.put_turn(turn_of(content), [], content)
    reader = LocalStore(tmp_path, host_bytes=1 << 20)
    assert holds(reader, content)
    for path in blob_files(store):
        path.unlink()

    for cached in (store, reader):
        assert holds(cached, content)
        assert cached.stats()["host_bytes"] == sum(chunk.kv.nbytes for chunk in content)
        assert cached.stats()["host_chunks"] == 2
    store.quarantine(content[0].key, "test")
    with pytest.raises(MissingBlobError):
        store.load(store.catalog.chunks([content[0].key])[content[0].key])
    store.close()
    reader.close()


# Quarantine and forgetting


def test_recapture_replaces_quarantined_bytes_and_drops_the_old_file(store: LocalStore) -> None:
    content = chain(3)
    store.put_turn(turn_of(content), [], content)
    (old_file,) = blob_files(store)
    old_file.write_bytes(b"damaged")
    store.quarantine(content[0].key, "damaged")
    assert store.stats()["entries"] == 0
    assert store.check() == []

    result = store.put_turn(turn_of(content), [], content)

    assert result.new_chunks == {content[0].key}
    assert not old_file.exists()
    assert holds(store, content)
    assert store.stats()["entries"] == 1
    assert store.check() == []


def test_recapture_under_the_same_turn_id_keeps_the_healthy_bytes(store: LocalStore) -> None:
    content = chain(3, 4)
    store.put_turn(turn_of(content), [], content)
    store.quarantine(content[0].key, "test")

    store.put_turn(turn_of(content), [], content)

    assert len(blob_files(store)) == 2
    assert holds(store, content)


def test_forgetting_removes_a_blob_only_with_its_last_user(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, host_bytes=1 << 20)
    system, *content = chain(3, 4, 2)
    later = chain(5, seed=1, parent=content[-1].key)
    store.put_turn(turn_of(content), [system], content)
    store.put_turn(turn_of(later, "turn-2"), [system, *content], later)
    store.put_turn(turn_of(content[:1], "turn-3", scope=Scope(session_id="s")), [], content[:1])

    store.forget([TurnId("turn-1"), TurnId("unknown")])
    assert len(blob_files(store)) == 2
    assert holds(store, [system, *content, *later])

    store.forget([TurnId("turn-2")])
    assert len(blob_files(store)) == 1
    assert store.catalog.chunks([system.key, later[0].key]) == {}
    assert holds(store, content[:1])
    assert store.stats()["host_chunks"] == 1

    store.forget([TurnId("turn-3")])
    assert blob_files(store) == []
    assert set(store.stats().values()) == {0}
    assert store.check() == []
    store.close()


def test_a_forgotten_turn_can_be_stored_again(store: LocalStore) -> None:
    content = chain(3)
    store.put_turn(turn_of(content), [], content)
    store.forget([TurnId("turn-1")])

    assert store.put_turn(turn_of(content), [], content).new_turn
    assert holds(store, content)


# Races and interruptions


def test_whoever_loses_the_race_for_the_same_chunks_deletes_its_own_blob(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chain(3, 4)
    rival = LocalStore(store_root(store), host_bytes=0)
    real_write = BlobFiles.write

    def write_after_the_rival(blobs: BlobFiles, name: str, data: bytes) -> str:
        monkeypatch.setattr(BlobFiles, "write", real_write)
        rival.put_turn(turn_of(content), [], content)
        return real_write(blobs, name, data)

    monkeypatch.setattr(BlobFiles, "write", write_after_the_rival)
    result = store.put_turn(turn_of(content, "turn-2"), [], content)

    assert (result.new_turn, result.new_chunks, result.turn_id) == (False, frozenset(), "turn-1")
    assert len(blob_files(store)) == 1
    assert holds(store, content)
    rival.close()


@pytest.mark.parametrize("as_context", [True, False])
def test_a_chunk_forgotten_between_look_up_and_commit_is_written_anew(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, as_context: bool
) -> None:
    first, second = chain(3, 4)
    store.put_turn(turn_of([first]), [], [first])
    real_add = Catalog.add_turn

    def forget_first(*args: object) -> AddResult:
        monkeypatch.setattr(Catalog, "add_turn", real_add)
        store.forget([TurnId("turn-1")])
        return real_add(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "add_turn", forget_first)
    if as_context:
        store.put_turn(turn_of([second], "turn-2"), [first], [second])
    else:
        store.put_turn(turn_of([first, second], "turn-2"), [], [first, second])

    assert holds(store, [first, second])
    assert len(blob_files(store)) == 1
    assert store.check() == []


def test_a_failed_transaction_leaves_neither_rows_nor_bytes(store: LocalStore) -> None:
    content = chain(3, 4)

    with pytest.raises(UnknownChunkError):
        store.put_turn(turn_of(content), [], content[1:])
    with pytest.raises(ValueError, match="not among"):
        store.put_turn(turn_of(content[:1]), [], content)

    assert blob_files(store) == []
    assert set(store.stats().values()) == {0}


def test_an_orphan_is_reported_and_a_stored_turn_is_not(store: LocalStore) -> None:
    content = chain(3)
    store.put_turn(turn_of(content), [], content)
    orphan = store_root(store) / "blobs" / "zz" / "zz-1.safetensors"
    orphan.parent.mkdir()
    orphan.write_bytes(b"12345")

    (problem,) = store.check()

    assert problem.startswith("file blobs/zz/zz-1.safetensors (5 bytes) belongs to no chunk")


def die_while_storing(root: str, moment: str) -> None:
    """Store one turn, then be killed at ``moment`` of storing the next."""
    store = LocalStore(Path(root), host_bytes=0)
    before, during = chain(3), chain(3, 4, seed=1)
    store.put_turn(turn_of(before), [], before)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "before the rename":
        os.replace = die  # type: ignore[assignment]
    elif moment == "between blob and row":
        Catalog.add_turn = die  # type: ignore[method-assign, assignment]
    else:
        add_turn = Catalog.add_turn

        def add_and_die(*args: object) -> None:
            add_turn(*args)  # type: ignore[arg-type]
            die()

        Catalog.add_turn = add_and_die  # type: ignore[method-assign, assignment]
    store.put_turn(turn_of(during, "turn-2"), [], during)


@pytest.mark.parametrize(
    ("moment", "stored", "left_files"),
    [("before the rename", False, 2), ("between blob and row", False, 2), ("after the row", True, 2)],
)
def test_killed_at_any_moment_no_row_is_without_bytes(
    tmp_path: Path, moment: str, stored: bool, left_files: int
) -> None:
    process = SPAWN.Process(target=die_while_storing, args=(str(tmp_path), moment))
    process.start()
    process.join(JOIN_TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL

    store = LocalStore(tmp_path, host_bytes=0)
    before, during = chain(3), chain(3, 4, seed=1)

    assert holds(store, before)
    assert store.catalog.known_turns([TurnId("turn-2")]) == ({"turn-2"} if stored else set())
    assert len(store.check()) == (0 if stored else 1)  # at worst a file nobody refers to
    assert len(blob_files(store)) == left_files
    assert store.put_turn(turn_of(during, "turn-2"), [], during).new_turn == (not stored)
    assert holds(store, [*before, *during])
    store.close()


def put_many(root: str, name: str, results: object) -> None:
    """Turns that both processes store, and turns of its own."""
    store = LocalStore(Path(root), host_bytes=0)
    for number in range(12):
        shared, own = chain(2, 3, seed=number), chain(2, seed=100 + number + 50 * (name == "b"))
        store.put_turn(turn_of(shared, f"shared-{name}-{number}"), [], shared)
        store.put_turn(turn_of(own, f"own-{name}-{number}"), shared[:1], own)
    store.close()
    results.put(name)  # type: ignore[attr-defined]


def test_two_processes_store_into_one_new_directory_at_once(tmp_path: Path) -> None:
    results = SPAWN.Queue()
    processes = [SPAWN.Process(target=put_many, args=(str(tmp_path), name, results)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(JOIN_TIMEOUT_S)

    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(results.get(timeout=5) for _ in processes) == ["a", "b"]
    store = LocalStore(tmp_path, host_bytes=0)
    ids = [TurnId(f"{kind}-{name}-{n}") for kind in ("shared", "own") for name in "ab" for n in range(12)]
    assert store.catalog.known_turns(ids) == set(ids)
    assert store.stats()["turns"] == 36  # 12 shared ones, stored once, and 12 of each process
    assert store.stats()["chunks"] == 48
    for number in range(12):
        assert holds(store, chain(2, 3, seed=number))
        assert holds(store, chain(2, seed=100 + number))
        assert holds(store, chain(2, seed=150 + number))
    assert store.check() == []  # no loser left its blob behind
    changes = store.catalog.changes_since(FINGERPRINT, "default", 0)
    assert len({(change.turn_id, change.chunk_key) for change in changes}) == len(changes) == 48
    store.close()


def test_a_chunk_that_is_a_view_of_a_larger_buffer_is_stored_alone(tmp_path: Path) -> None:
    (chunk,) = chain(4)
    buffer = torch.stack([kv_for(chunk.key, 4), torch.zeros_like(chunk.kv)])
    view = dataclasses.replace(chunk, kv=buffer[0])
    store = LocalStore(tmp_path, host_bytes=1 << 20)

    store.put_turn(turn_of([view]), [], [view])
    buffer.zero_()  # the cache holds a copy of its own

    assert holds(store, [chunk])
    store.close()
