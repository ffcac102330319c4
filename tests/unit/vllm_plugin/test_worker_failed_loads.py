"""Loads that fail or take long: which blocks are given up, what is quarantined, and what goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kv_agent.chunks import ChunkRecord, TurnId
from kv_agent.errors import StorageError
from kv_agent.vllm_plugin import loading
from kv_agent.vllm_plugin.jobs import LoadFailure
from tests.unit.storage.builders import same_bits
from tests.unit.vllm_plugin.bench import WAIT_S, Bench, capture_job, load_job, slots
from tests.unit.vllm_plugin.builders import ROOT


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 4
    path.write_bytes(bytes(data))


def swap_heads_and_head_size(path: Path) -> None:
    """In both places of the header; the bytes, and so their checksum, stay."""
    data = path.read_bytes()
    swapped = re.sub(rb"\[3,( ?)2,( ?)(\d),( ?)2,( ?)8\]", rb"[3,\g<1>2,\g<2>\g<3>,\g<4>8,\g<5>2]", data)
    assert swapped != data
    path.write_bytes(swapped)


@pytest.fixture
def three(bench: Bench) -> list[ChunkRecord]:
    """Chunks of 6, 6 and 4 tokens in blobs of their own."""
    records: list[ChunkRecord] = []
    for index, (start, end) in enumerate([(0, 6), (6, 12), (12, 16)]):
        parent = records[-1].key if records else ROOT
        records += bench.capture(capture_job(end, name=f"turn {index}", start=start, parent=parent))
    return records


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (delete, "blob is missing"),
        (truncate, "blob is corrupt"),
        (flip_one_bit, "blob is corrupt"),
        (swap_heads_and_head_size, "blob is corrupt"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize(
    ("failed", "start", "invalid"),
    [(0, 1, (20, 12, 17, 11, 14)), (1, 7, (12, 17, 11, 14)), (2, 13, (11, 14))],
)
def test_a_lost_chunk_ends_the_load_and_is_quarantined(
    bench: Bench,
    three: list[ChunkRecord],
    tmp_path: Path,
    damage: Callable[[Path], None],
    reason: str,
    failed: int,
    start: int,
    invalid: tuple[int, ...],
) -> None:
    damage(tmp_path / "store" / three[failed].blob)
    target = load_job(three, at=1)
    before = bench.kv(target.block_ids, 0, 20)

    failure = bench.load(target)

    assert failure == LoadFailure(key=three[failed].key, start=start, reason=reason)
    assert bench.invalid_blocks == set(invalid)  # from the failed token's block to the last one
    after = bench.kv(target.block_ids, 0, 20)
    lost_end, end = target.chunks[failed].end, target.chunks[-1].end
    assert same_bits(after[:, :, start:lost_end], before[:, :, start:lost_end])
    assert same_bits(after[:, :, end:], before[:, :, end:])  # what is between is in blocks that are invalid
    assert not same_bits(after[:, :, 1:start], before[:, :, 1:start]) or start == 1
    found = bench.store.catalog.chunks([one.key for one in three])
    assert [found[one.key].quarantined for one in three] == [index == failed for index in range(3)]


def test_a_lost_chunk_that_is_needed_in_part_fails_where_its_tokens_were_needed(
    bench: Bench, three: list[ChunkRecord], tmp_path: Path
) -> None:
    delete(tmp_path / "store" / three[0].blob)
    failure = bench.load(load_job(three, skip=4))
    assert failure == LoadFailure(key=three[0].key, start=4, reason="blob is missing")
    assert bench.invalid_blocks == {12, 17, 11}


def test_blocks_behind_the_last_chunk_stay_valid(
    bench: Bench, three: list[ChunkRecord], tmp_path: Path
) -> None:
    delete(tmp_path / "store" / three[1].blob)
    bench.load(load_job(three[:2], blocks=(20, 12, 17, 11, 14)))
    assert bench.invalid_blocks == {12, 17}


def test_a_chunk_that_cannot_be_read_right_now_is_not_quarantined(
    bench: Bench, three: list[ChunkRecord]
) -> None:
    bench.store.load_error = StorageError("too many open files")
    failure = bench.load(load_job(three))
    assert failure == LoadFailure(key=three[0].key, start=0, reason="blob could not be read")
    found = bench.store.catalog.chunks([one.key for one in three])
    assert not any(one.quarantined for one in found.values())


def test_bytes_lost_of_a_chunk_that_was_stored_anew_meanwhile_do_not_quarantine_it(
    bench: Bench, three: list[ChunkRecord], tmp_path: Path
) -> None:
    old = three[0]
    bench.store.forget([TurnId("turn 0"), TurnId("turn 1"), TurnId("turn 2")])
    (new,) = bench.capture(capture_job(6, name="again"))
    assert (new.key, new.blob != old.blob) == (old.key, True)
    failure = bench.load(load_job([old]))
    assert failure is not None
    assert not bench.store.catalog.chunks([new.key])[new.key].quarantined


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_an_unexpected_error_fails_the_load_and_not_the_engine(
    bench: Bench, three: list[ChunkRecord], where: str
) -> None:
    if where == "reading":
        bench.store.load_error = RuntimeError("a bug")
    else:
        bench.cache.broken = RuntimeError("a kernel failed")
    failure = bench.load(load_job(three, at=1))
    assert failure is not None
    assert (failure.key, failure.start) == (three[0].key, 1)
    assert bench.invalid_blocks == {20, 12, 17, 11, 14}

    bench.store.load_error = bench.cache.broken = None
    bench.received.clear()
    assert bench.load(load_job(three)) is None


def test_a_load_that_takes_too_long_is_given_up_and_never_written(
    bench: Bench, three: list[ChunkRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LOAD_TIMEOUT_S", 0.02)
    bench.store.may_load.clear()
    target = load_job(three, at=2)
    before = bench.cache.memory_L2SHD.clone()

    failure = bench.load(target)

    assert failure == LoadFailure(key=three[0].key, start=2, reason="load took too long")
    assert bench.invalid_blocks == {20, 12, 17, 11, 14}
    assert not any(one.quarantined for one in bench.store.catalog.chunks([three[0].key]).values())
    bench.store.may_load.set()
    monkeypatch.setattr(loading, "LOAD_TIMEOUT_S", WAIT_S)
    bench.received.clear()
    other = replace(load_job(three), request_id="other", block_ids=(2, 6, 7, 8))
    assert bench.load(other) is None  # the readers are free again, so the late result is there, too
    bench.step()
    assert bench.received == {"other"}
    late = slots(target.block_ids, 0, 20)
    assert same_bits(bench.cache.memory_L2SHD[:, :, late], before[:, :, late])


def test_loads_go_on_in_the_background_while_steps_run(bench: Bench, three: list[ChunkRecord]) -> None:
    bench.store.may_load.clear()
    bench.step(loads=[load_job(three)])
    for _ in range(5):
        bench.step()
    assert bench.received == set()
    assert bench.report.loaded == {}
    bench.store.may_load.set()
    bench.step_until(lambda: "loading" in bench.received)
    assert bench.report.loaded == {"loading": None}
