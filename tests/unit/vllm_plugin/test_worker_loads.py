"""KV that a worker loads: bit for bit in its place, moved, in part, and from every tier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kv_agent.chunks import ChunkRecord
from kv_agent.kv.rope import rotate_keys
from kv_agent.storage.codecs import Codec
from kv_agent.storage.tiers import Loaded
from tests.unit.storage.builders import same_bits
from tests.unit.vllm_plugin.bench import NUM_BLOCKS, SCHEME, Bench, P, capture_job, load_job, slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kv_loaded_at_its_own_position_is_the_captured_kv(
    benches: Callable[..., Bench], dtype: torch.dtype
) -> None:
    bench = benches(dtype=dtype)
    job = capture_job(16)
    captured = bench.kv(job.block_ids, 0, 16)
    records = bench.capture(job)
    target = load_job(records)
    before = bench.cache.memory_L2SHD.clone()

    assert bench.load(target) is None

    assert same_bits(bench.kv(target.block_ids, 0, 16), captured)
    written = slots(target.block_ids, 0, 16)
    untouched = [slot for slot in range(NUM_BLOCKS * P) if slot not in written]
    assert same_bits(bench.cache.memory_L2SHD[:, :, untouched], before[:, :, untouched])
    assert bench.invalid_blocks == set()


@pytest.mark.parametrize("delta", [3, 1, -5])
def test_moved_keys_are_rotated_by_the_distance_and_values_stay(bench: Bench, delta: int) -> None:
    job = capture_job(16, start=6)
    captured = bench.kv(job.block_ids, 6, 16)
    records = bench.capture(job)
    target = load_job(records, at=6 + delta)

    assert bench.load(target) is None

    loaded = bench.kv(target.block_ids, 6 + delta, 16 + delta)
    assert same_bits(loaded[:, 1], captured[:, 1])
    assert same_bits(loaded[:, 0], rotate_keys(captured[:, 0], delta, SCHEME))
    # Written out once more: planes (i, i + 3) turn by delta * inv_freq, dims 6 and 7 stay.
    for i, freq in enumerate(SCHEME.inv_freq):
        turn = torch.polar(torch.tensor(1.0), torch.tensor(delta * freq))
        plane = torch.complex(captured[:, 0, ..., i], captured[:, 0, ..., i + 3]) * turn
        torch.testing.assert_close(loaded[:, 0, ..., i], plane.real, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded[:, 0, ..., i + 3], plane.imag, rtol=0, atol=1e-5)
    assert same_bits(loaded[:, 0, ..., 6:], captured[:, 0, ..., 6:])


@pytest.mark.parametrize("skip", [1, 4, 5])
def test_skipped_tokens_are_not_written(bench: Bench, skip: int) -> None:
    job = capture_job(12)
    captured = bench.kv(job.block_ids, 0, 12)
    records = bench.capture(job)
    target = load_job(records, at=2, skip=skip)
    before = bench.kv(target.block_ids, 0, 2 + skip)

    assert bench.load(target) is None

    assert same_bits(bench.kv(target.block_ids, 0, 2 + skip), before)
    expected = rotate_keys(captured[:, 0], 2, SCHEME)
    assert same_bits(bench.kv(target.block_ids, 2 + skip, 14)[:, 0], expected[:, skip:])
    assert same_bits(bench.kv(target.block_ids, 2 + skip, 14)[:, 1], captured[:, 1, skip:])


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
@pytest.mark.parametrize("skip", [0, 4])
def test_keys_in_fewer_bits_come_to_their_new_place(
    benches: Callable[..., Bench], host_bytes: int, skip: int
) -> None:
    """By the pass that decodes them; by the one into blocks if a tier keeps what was decoded."""
    codec = Codec(name="int8", scheme=SCHEME)
    before = benches(dtype=torch.bfloat16, codec=codec)
    job = capture_job(12, start=6)
    payload = codec.encode(before.kv(job.block_ids, 6, 12), 6)
    records = before.capture(job)
    bench = benches(dtype=torch.bfloat16, host_bytes=host_bytes, codec=codec)

    for _ in range(2):  # read, and perhaps kept
        assert bench.load(load_job(records, at=1, skip=skip)) is None
        bench.received.clear()
        loaded = bench.kv(load_job(records).block_ids, 1 + skip, 7)
        if host_bytes:
            keys_LTHD = rotate_keys(codec.decode(payload, 6)[:, 0], -5, SCHEME)
        else:
            keys_LTHD = codec.decode(payload, 1)[:, 0]
        assert same_bits(loaded[:, 0], keys_LTHD[:, skip:])
        assert same_bits(loaded[:, 1], codec.decode(payload, 6)[:, 1, skip:])


@pytest.mark.parametrize("tier", ["host_bytes", "warm_bytes"])
def test_moving_a_chunk_does_not_change_the_copy_that_stays_in_memory(
    benches: Callable[..., Bench], tier: str
) -> None:
    bench = benches(**{tier: 1 << 20})
    job = capture_job(6)
    captured = bench.kv(job.block_ids, 0, 6)
    records = bench.capture(job)
    for at in (5, 0, 9, 0):
        target = load_job(records, at=at)
        assert bench.load(target) is None
        bench.received.clear()
        loaded = bench.kv(target.block_ids, at, at + 6)
        assert same_bits(loaded[:, 0], rotate_keys(captured[:, 0], at, SCHEME))
        assert same_bits(loaded[:, 1], captured[:, 1])


@pytest.mark.parametrize("tier", ["host_bytes", "warm_bytes"])
def test_a_chunk_that_is_in_memory_needs_no_blob(
    benches: Callable[..., Bench], tmp_path: Path, tier: str
) -> None:
    bench = benches(**{tier: 1 << 20})
    records = bench.capture(capture_job(6))
    assert bench.load(load_job(records)) is None
    bench.received.clear()
    (tmp_path / "store" / records[0].blob).unlink()
    assert bench.load(load_job(records)) is None


def test_everything_is_reported_once(bench: Bench) -> None:
    job = capture_job(6)
    records = bench.capture(job)
    bench.load(load_job(records))
    assert bench.worker.take_finished() == (set(), set())
    assert not bench.worker.take_report()
    assert bench.worker.take_invalid_blocks() == set()


def test_the_chunks_of_one_plan_are_read_side_by_side(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    records = bench.capture(capture_job(16))[:2]
    together = threading.Barrier(2)  # as many as there are threads: one that reads alone waits in vain
    load = bench.store.load

    def load_together(record: ChunkRecord, delta: int) -> Loaded:
        together.wait(timeout=20)
        return load(record, delta)

    monkeypatch.setattr(bench.store, "load", load_together)
    assert bench.load(load_job(records)) is None
