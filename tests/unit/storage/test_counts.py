"""What storing and loading cost in things that can be counted. A change of these numbers is to be meant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kv_agent.chunks import ChunkRecord
from kv_agent.storage import blob_content
from kv_agent.storage.store import LocalStore, NewChunk
from tests.unit.counted import Bytes, Statements, count_bytes, trace_statements
from tests.unit.storage.builders import chain, turn_of

TOKENS = 5  # of a chunk
CHUNK_BYTES = TOKENS * 64
PREFIX_BYTES = 8  # a blob's first bytes: how long its header is

# A turn of one new chunk. Reads: its limits before and after it is stored, that nobody has the chunk already
# (before the blob is written and again within the transaction), that all its chunks are known, that neither
# the turn nor its id is there, its context, the last entry, which turn has no document, which blob is left
# over, what its namespace holds and how the disk is filled.
TURN_SELECTS = 14
# One that writes; three look at limits, two at what is held.
TURN_TRANSACTIONS = 6
# The turn, its document and the words in it, entries and changes (each for all chunks at once).
TURN_INSERTS = 5
# A chunk, its sketch, and that it is the turn's; its vector if there was none.
CHUNK_INSERTS, CHUNK_UPDATES = 3, 1


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    return trace_statements(monkeypatch)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bytes:
    return count_bytes(monkeypatch, tmp_path)


@pytest.fixture
def store(statements: Statements, counted: Bytes, tmp_path: Path) -> Iterator[LocalStore]:
    store = LocalStore(tmp_path / "store", host_bytes=1 << 20)
    store.put_turn(turn_of(new_chunks(1, seed=99), "turn-0"), [], new_chunks(1, seed=99))  # connected
    counted.forget()
    yield store
    store.close()


def new_chunks(count: int, seed: int) -> list[NewChunk]:
    return [replace(chunk, sketch=b"sketch") for chunk in chain(*[TOKENS] * count, seed=seed)]


def put(store: LocalStore, count: int, seed: int) -> list[ChunkRecord]:
    chunks = new_chunks(count, seed)
    store.put_turn(turn_of(chunks, f"turn-{seed}"), [], chunks)
    records = store.catalog.chunks([chunk.key for chunk in chunks])
    return [records[chunk.key] for chunk in chunks]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_statements_of_a_stored_turn(store: LocalStore, statements: Statements, count: int) -> None:
    chunks = new_chunks(count, seed=count)
    with statements.of() as ran:
        store.put_turn(turn_of(chunks, "turn-1"), [], chunks)

    assert ran == {
        "BEGIN": TURN_TRANSACTIONS,
        "COMMIT": TURN_TRANSACTIONS,
        "SELECT": TURN_SELECTS,
        "INSERT": TURN_INSERTS + CHUNK_INSERTS * count,
        "UPDATE": CHUNK_UPDATES * count,
    }


def test_a_turn_that_is_stored_already_writes_no_file(
    store: LocalStore, statements: Statements, counted: Bytes
) -> None:
    put(store, 8, seed=1)
    counted.forget()
    chunks = new_chunks(8, seed=1)
    with statements.of() as ran:
        store.put_turn(turn_of(chunks, "turn-again"), [], chunks)

    assert (counted.passes, counted.files) == ([], {})
    assert ran["INSERT"] == 3 + 8  # its other id, entries and changes, and whether the sketches are there
    assert ran["UPDATE"] == 2 + 8  # how long it is kept and when it was used, and whether vectors are there


@pytest.mark.parametrize("count", [1, 8])
def test_a_stored_turn_is_one_file_its_bytes_written_once_and_hashed_once(
    store: LocalStore, counted: Bytes, count: int
) -> None:
    put(store, count, seed=1)

    header_bytes = counted.of("write")[-1]
    each_chunk = [("write", CHUNK_BYTES), ("hash", CHUNK_BYTES)]
    assert counted.passes == each_chunk * count + [("write", header_bytes)]  # which has the hashes
    # The folder has another file already, else the folders that name it are synced, too.
    assert counted.files == {"open xb": 1, "fsync of a file": 1, "fsync of a folder": 1}


def test_the_first_file_of_a_folder_syncs_the_folders_above_it(store: LocalStore, counted: Bytes) -> None:
    chunks = new_chunks(1, seed=1)
    store.put_turn(turn_of(chunks, "another"), [], chunks)

    assert counted.files["fsync of a folder"] == 3


def test_with_fsync_never_nothing_is_synced(counted: Bytes, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store", host_bytes=0, fsync="never")
    put(store, 2, seed=1)
    store.close()

    assert counted.files == {"open xb": 1}


def test_a_chunk_from_disk_is_read_once_and_hashed_once_and_from_memory_not_at_all(
    store: LocalStore, statements: Statements, counted: Bytes, tmp_path: Path
) -> None:
    records = put(store, 8, seed=1)
    cold = LocalStore(tmp_path / "store", host_bytes=1 << 20)
    counted.forget()
    with statements.of() as ran:
        from_disk = [cold.load(record).kv_L2THD for record in records]

    header_bytes = counted.of("read")[1]
    each_chunk = [
        ("read", PREFIX_BYTES),
        ("read", header_bytes),
        ("read", CHUNK_BYTES),
        ("hash", CHUNK_BYTES),
    ]
    assert counted.passes == each_chunk * 8
    assert counted.files == {"open rb": 8}
    assert ran == {}  # the record has said where it is

    counted.forget()
    from_host = [cold.load(record).kv_L2THD for record in records]
    cold.close()
    assert (counted.passes, counted.files) == ([], {})
    # Neither keeping nor giving is a copy.
    assert [one.data_ptr() for one in from_host] == [one.data_ptr() for one in from_disk]


def test_a_header_is_read_once_for_all_chunks_of_its_blob(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = put(store, 8, seed=3)
    assert len({record.blob for record in records}) == 1
    parsed: list[str | bytes] = []

    def loads(text: str | bytes) -> object:
        parsed.append(text)
        return json.loads(text)

    monkeypatch.setattr(blob_content, "json", SimpleNamespace(loads=loads))
    cold = LocalStore(tmp_path / "store", host_bytes=0)
    for record in records:
        cold.load(record)
    cold.close()
    assert len(parsed) == 3  # the header, and what its metadata has of layout and coding
