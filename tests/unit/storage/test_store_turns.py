"""Turns in a store: what was put comes back bit for bit, once, and lies inside the directory."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import StorageError
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import chain, kv_for, turn_of
from tests.unit.storage.stores import blob_files, holds, store_root


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


def test_a_part_goes_with_the_turn_that_it_was_stored_for(store: LocalStore) -> None:
    chunks, (part,) = chain(3, 4), chain(2, seed=5)
    turn = dataclasses.replace(turn_of(chunks), expires=9.0)
    store.put_turn(turn, [], chunks)

    def put_part() -> None:
        again = dataclasses.replace(turn, turn_id=TurnId("part"), text="", expires=None)
        store.put_turn(again, [part], [], is_part=True)

    put_part()
    put_part()  # a retry
    assert holds(store, [*chunks, part])
    assert store.catalog.turns([TurnId("part")]) == {TurnId("part"): turn}  # as it was
    assert [one.turn_id for one in store.catalog.list_turns(Scope())] == ["turn-1"]

    store.put_turn(turn_of(chunks, "elsewhere", Scope(agent_id="other")), [], chunks)
    store.forget([TurnId("turn-1")])
    assert holds(store, chunks)
    with pytest.raises(StorageError, match="not, or no longer, stored"):
        put_part()
    assert len(blob_files(store)) == 1
    assert store.stats()["chunks"] == len(chunks)


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


def test_a_chunk_that_is_a_view_of_a_larger_buffer_is_stored_alone(tmp_path: Path) -> None:
    (chunk,) = chain(4)
    buffer = torch.stack([kv_for(chunk.key, 4), torch.zeros_like(chunk.kv)])
    view = dataclasses.replace(chunk, kv=buffer[0])
    store = LocalStore(tmp_path, host_bytes=1 << 20)

    store.put_turn(turn_of([view]), [], [view])
    buffer.zero_()  # the cache holds a copy of its own

    assert holds(store, [chunk])
    store.close()


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
