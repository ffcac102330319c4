"""The host cache against a list-based model."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkKey
from kv_agent.storage.lru import ChunkCache

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["get", "put", "discard"]), st.integers(0, 5), st.integers(0, 12)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(limit=st.integers(0, 20), operations=OPERATIONS)
def test_cache_behaves_like_a_list_ordered_by_use(limit: int, operations: list[tuple[str, int, int]]) -> None:
    cache = ChunkCache(limit)
    model: list[tuple[ChunkKey, torch.Tensor]] = []  # least recently used first

    for name, number, size in operations:
        key = ChunkKey(f"k{number}")
        old = next((item for item in model if item[0] == key), None)
        if name == "get":
            got = cache.get(key)
            assert got is (old[1] if old else None)
            if old:
                model.remove(old)
                model.append(old)
        elif name == "discard":
            cache.discard(key)
            model = [item for item in model if item[0] != key]
        else:
            tensor = torch.zeros(size, dtype=torch.uint8)
            cache.put(key, tensor)
            model = [item for item in model if item[0] != key]
            if size <= limit and limit:
                model.append((key, tensor))
            while sum(item[1].nbytes for item in model) > limit:
                model.pop(0)
        assert cache.used_bytes == sum(item[1].nbytes for item in model)
        assert len(cache) == len(model)


def test_a_view_of_a_large_buffer_does_not_keep_the_buffer() -> None:
    buffer = torch.arange(1000, dtype=torch.int64)
    cache = ChunkCache(100)

    cache.put(ChunkKey("k"), buffer[10:20])
    kept = cache.get(ChunkKey("k"))

    assert kept is not None
    assert kept.tolist() == list(range(10, 20))
    assert kept.untyped_storage().nbytes() == 80


def test_threads_keep_the_byte_count_exact() -> None:
    cache = ChunkCache(50)

    def work(seed: int) -> None:
        for step in range(300):
            key = ChunkKey(str((step * seed) % 7))
            cache.put(key, torch.zeros(step % 11, dtype=torch.uint8))
            cache.get(ChunkKey(str(step % 7)))
            cache.discard(ChunkKey(str((step + seed) % 7)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    left = [cache.get(ChunkKey(str(number))) for number in range(7)]
    assert cache.used_bytes == sum(tensor.nbytes for tensor in left if tensor is not None) <= 50


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_bytes"):
        ChunkCache(-1)
