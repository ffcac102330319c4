"""Memories that went through an archive are what they were, bit for bit, or were refused as a whole."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_agent.chunks import Fingerprint, Scope, TurnId
from kv_agent.errors import ConfigError, KVAgentError, StorageError
from kv_agent.storage.archive import Archive
from kv_agent.storage.codecs import Payload
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.transfer import Exported, Imported, export_turns, import_archive
from kv_agent.storage.turn_writes import AddResult
from tests.unit.storage.builders import FINGERPRINT, chain, turn_of
from tests.unit.storage.catalogs import found
from tests.unit.storage.stores import blob_files, counts, holds, store_root

OTHER_MODEL = Fingerprint("fp-2")
ALICE = Scope(user_id="alice", agent_id="planner", session_id="monday")
BOB = Scope(namespace="acme", user_id="bob", agent_id="coder")

# Everything that is worth keeping; files, sequence numbers and row ids may differ.
TABLES = {
    "fingerprints": "*",
    "turns": "*",
    "turn_aliases": "*",
    "chunks": "key, content_key, parent, fingerprint, namespace, user_id, start, num_tokens, token_ids,"
    " tensor, checksum, num_bytes, vector, created, quarantine_reason",
    "turn_chunks": "*",
    "sketches": "*",
    "entries": "turn_id, chunk_key",
    "turn_docs JOIN turn_words ON turn_words.rowid = doc_id": "turn_id, copy_key, scope, words",
}


def dump(store: LocalStore) -> dict[str, list[Any]]:
    with store.catalog._connection() as db:
        return {
            table: sorted(db.execute(f"SELECT {columns} FROM {table}").fetchall(), key=repr)
            for table, columns in TABLES.items()
        }


@pytest.fixture
def chunks() -> dict[str, list[NewChunk]]:
    sketched = [replace(chunk, sketch=bytes(chunk.key, "ascii")) for chunk in chain(3, 4, 5, scope=ALICE)]
    return {
        "alice": sketched,
        "bob": chain(6, 2, scope=BOB, seed=1, dtype=torch.bfloat16, vectors=False),
        "other model": chain(2, scope=ALICE, seed=2, dtype=torch.float8_e4m3fn, fingerprint=OTHER_MODEL),
    }


@pytest.fixture
def source(store: LocalStore, chunks: dict[str, list[NewChunk]]) -> LocalStore:
    """Turns of two users and two models: shared chunks, context, aliases, metadata and times to live."""
    store.catalog.register_fingerprint(FINGERPRINT, {"layers": 2, "rope": None})
    system, dog, cat = chunks["alice"]
    put = store.put_turn
    put(turn_of([], "prefix", ALICE, created=0.25), [system], [])
    put(replace(turn_of([dog], "older", ALICE, created=1.5), text="The dog is brown."), [system], [dog])
    newer = replace(turn_of([dog, cat], "newer", ALICE, created=2.5), text="The cat is red.\x00 ünïcödé 🐈")
    put(replace(newer, expires=4e9, metadata={"n": 1, "x": 1.0, "ok": True, "s": "1"}), [system], [dog, cat])
    put(replace(newer, turn_id=TurnId("again"), expires=3e9, pinned=True), [], [])
    put(turn_of(chunks["bob"], "boat", BOB, created=3.5), [], chunks["bob"])
    other = replace(turn_of(chunks["other model"], "elsewhere", ALICE, created=4.5), fingerprint=OTHER_MODEL)
    put(other, [], chunks["other model"])
    return store


@pytest.fixture
def target(tmp_path: Path) -> Iterator[LocalStore]:
    target = LocalStore(tmp_path / "target", host_bytes=0)
    yield target
    target.close()


def exported(store: LocalStore, **which: str) -> tuple[io.BytesIO, Exported]:
    file = io.BytesIO()
    return file, export_turns(store, file, **which)


def moved(store: LocalStore, target: LocalStore, **which: str) -> Imported:
    return import_archive(target, Archive(exported(store, **which)[0]))


def test_everything_arrives_as_it_was(
    source: LocalStore, target: LocalStore, chunks: dict[str, list[NewChunk]]
) -> None:
    archive = Archive(exported(source)[0])
    done = import_archive(target, archive)

    assert sum(len(archived.chunks) for archived in archive.turns()) == 6  # shared ones are in it once
    assert dump(target) == dump(source)
    assert (done.num_turns, done.num_new_turns, done.num_new_chunks, done.renamed) == (5, 5, 6, {})
    assert holds(target, [chunk for some in chunks.values() for chunk in some])
    assert target.check() == []
    assert found(target.catalog) == found(source.catalog) != set()
    for turn_id in ("older", "newer", "again", "boat"):
        assert target.catalog.turns([TurnId(turn_id)]) == source.catalog.turns([TurnId(turn_id)])
    for query in ("dog", "the cat ünïcödé"):
        for scope in (ALICE, Scope(user_id="alice"), Scope(user_id="alice", agent_id="other")):
            hits = target.catalog.search_text(query, scope, FINGERPRINT, 10)
            assert [hit.turn_id for hit in hits] == [
                hit.turn_id for hit in source.catalog.search_text(query, scope, FINGERPRINT, 10)
            ]
    assert target.catalog.search_text("dog", ALICE, FINGERPRINT, 10)[0].turn_id == "older"


def test_importing_twice_stores_once(source: LocalStore, target: LocalStore) -> None:
    moved(source, target)
    before, files = dump(target), blob_files(target)

    again = moved(source, target)

    assert (again.num_turns, again.num_new_turns, again.num_new_chunks) == (5, 0, 0)
    assert dump(target) == before
    assert blob_files(target) == files


def test_an_archive_of_an_archive_is_the_same(source: LocalStore, target: LocalStore, tmp_path: Path) -> None:
    moved(source, target)
    third = LocalStore(tmp_path / "third", host_bytes=0)

    moved(target, third)

    assert dump(third) == dump(source)
    third.close()


@pytest.mark.parametrize(
    ("which", "turns"),
    [
        ({"namespace": "acme"}, {"boat"}),
        ({"user_id": "alice"}, {"prefix", "older", "newer", "elsewhere"}),
        ({"agent_id": "coder"}, {"boat"}),
        ({"namespace": "default", "user_id": "bob"}, set()),
    ],
)
def test_only_what_was_chosen_is_exported(
    source: LocalStore, target: LocalStore, which: dict[str, str], turns: set[str]
) -> None:
    moved(source, target, **which)

    assert set(target.catalog.turns_by_age(None, None, None)) == turns
    assert target.check() == []


def test_what_is_here_already_stays_and_what_was_quarantined_comes_back(
    source: LocalStore, target: LocalStore, chunks: dict[str, list[NewChunk]]
) -> None:
    system, dog, cat = chunks["alice"]
    mine = chain(3, seed=7)
    target.put_turn(turn_of(mine, "mine"), [], mine)
    target.put_turn(turn_of([dog], "older", ALICE, created=1.5), [], [dog])
    target.quarantine(dog.key, "test")
    (blob_files(target)[0]).touch()

    done = moved(source, target)

    assert (done.num_new_turns, done.num_new_chunks) == (4, 6)
    assert holds(target, [*mine, system, dog, cat])
    assert found(target.catalog) == found(source.catalog) | {("mine", mine[0].key)}
    assert target.check() == []


def test_a_turn_whose_id_names_another_one_here_gets_a_new_id_and_always_the_same(
    source: LocalStore, target: LocalStore
) -> None:
    mine = chain(3, seed=7)
    target.put_turn(turn_of(mine, "newer"), [], mine)

    renamed = moved(source, target).renamed
    assert moved(source, target).renamed == renamed

    assert list(renamed) == ["newer"]
    here = target.catalog.turns([TurnId("newer"), renamed[TurnId("newer")], TurnId("again")])
    assert here[TurnId("newer")].chunk_keys == (mine[0].key,)
    there = source.catalog.turns([TurnId("newer")])[TurnId("newer")]
    assert here[TurnId("again")] == replace(there, turn_id=renamed[TurnId("newer")])
    assert target.stats()["turns"] == 6


def flip_last_byte(store: LocalStore, chunk: NewChunk) -> None:
    path = store_root(store) / store.catalog.chunks([chunk.key])[chunk.key].blob
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_turn_with_damaged_content_is_left_out_by_name(
    source: LocalStore, target: LocalStore, chunks: dict[str, list[NewChunk]]
) -> None:
    source.quarantine(chunks["alice"][2].key, "test")
    flip_last_byte(source, chunks["other model"][0])
    file, done = exported(source)

    import_archive(target, Archive(file))

    assert done.left_out.keys() == {"newer", "elsewhere"}
    assert "is quarantined" in done.left_out[TurnId("newer")]
    assert "checksum" in done.left_out[TurnId("elsewhere")]
    assert set(target.catalog.turns_by_age(None, None, None)) == {"prefix", "older", "boat"}
    assert target.check() == []


def test_damaged_context_is_left_out_and_the_turn_is_not(
    source: LocalStore, target: LocalStore, chunks: dict[str, list[NewChunk]]
) -> None:
    system, *content = chunks["alice"]
    source.quarantine(system.key, "test")
    file, done = exported(source)

    import_archive(target, Archive(file))

    assert done.left_out == {}
    assert holds(target, content)
    assert target.catalog.chunks([system.key]) == {}


def test_of_a_damaged_or_truncated_archive_nothing_is_imported(source: LocalStore, tmp_path: Path) -> None:
    """Or all of it, if the damage is in the blocks that only fill the file up."""
    data, whole = exported(source)[0].getvalue(), dump(source)
    pick = random.Random(3)
    end = data.rindex(b"end.json")
    broken = [data[:length] for length in (0, 1, 511, 512, 1024, end, end + 512, *range(0, end, 1024))]
    for _ in range(400):
        changed = bytearray(data)
        changed[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        broken.append(bytes(changed))
    broken += [data[:start] + data[start + 512 :] for start in range(0, end, 512)]
    num_whole = 0

    for number, changed in enumerate(broken):
        try:
            archive = Archive(io.BytesIO(changed))
        except (StorageError, ConfigError):
            continue
        num_whole += 1
        target = LocalStore(tmp_path / f"target-{number}", host_bytes=0)
        import_archive(target, archive)
        assert dump(target) == whole, number
        target.close()

    assert num_whole < len(broken) / 8  # a file this small ends in many filling bytes


def test_an_import_that_is_interrupted_leaves_whole_turns_and_can_be_repeated(
    source: LocalStore, target: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., AddResult] = LocalStore.put_turn
    puts: list[str] = []

    def fail_at_the_third(*args: Any) -> AddResult:
        puts.append(args[1].turn_id)
        if len(puts) == 3:
            raise StorageError("no space left on device")
        return real(*args)

    monkeypatch.setattr(LocalStore, "put_turn", fail_at_the_third)
    with pytest.raises(StorageError, match="no space"):
        moved(source, target)
    monkeypatch.undo()

    assert set(target.catalog.turns_by_age(None, None, None)) == {"prefix", "older"}
    assert target.check() == []
    moved(source, target)
    assert dump(target) == dump(source)


def test_an_import_for_one_model_refuses_memories_of_another(source: LocalStore, target: LocalStore) -> None:
    archive = Archive(exported(source)[0])

    with pytest.raises(ConfigError, match=r"holds memories of model fp-2, not only of fp-1"):
        import_archive(target, archive, FINGERPRINT)
    assert counts(target) == {0}

    bobs = Archive(exported(source, user_id="bob")[0])
    assert import_archive(target, bobs, FINGERPRINT).num_new_turns == 1


def test_memories_whose_keys_cannot_be_compared_are_refused(source: LocalStore, target: LocalStore) -> None:
    target.catalog.register_fingerprint(FINGERPRINT, {"layers": 2, "rope": "x"})

    with pytest.raises(ConfigError, match="differ from this store's in rope"):
        moved(source, target)
    assert counts(target) == {0}


def test_models_stay_apart(source: LocalStore, target: LocalStore) -> None:
    moved(source, target)

    (turn_id,) = [hit.turn_id for hit in target.catalog.search_text("elsewhere", ALICE, OTHER_MODEL, 10)]
    assert turn_id == "elsewhere"
    assert target.catalog.search_text("elsewhere", ALICE, FINGERPRINT, 10) == []
    assert target.catalog.fingerprint_details(OTHER_MODEL) is None
    assert target.catalog.fingerprint_details(FINGERPRINT) == {"layers": 2, "rope": None}


def test_a_turn_forgotten_while_it_is_exported_is_no_error(
    source: LocalStore, target: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_stored = LocalStore.stored

    def forget_and_read(store: LocalStore, record: Any) -> Payload:
        monkeypatch.undo()
        store.forget([TurnId("prefix"), TurnId("older"), TurnId("newer")])
        return real_stored(store, record)

    monkeypatch.setattr(LocalStore, "stored", forget_and_read)
    file, done = exported(source)

    assert done.left_out == {}
    assert import_archive(target, Archive(file)).num_turns == 2
    assert dump(target)["turns"] == dump(source)["turns"]


def test_errors_are_ours(source: LocalStore) -> None:
    for data in (b"", b"no archive", bytes(5000), b"x" * 5000):
        with pytest.raises(KVAgentError, match="archive"):
            Archive(io.BytesIO(data))
