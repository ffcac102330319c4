"""What the storage benchmark calls cold, a ratio and a percentile, and what its report shows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.storage_speed import cold
from benchmarks.storage_speed.filling import CHUNK_TOKENS, TURN_CHUNKS, fill
from benchmarks.storage_speed.report import tables
from benchmarks.storage_speed.timing import against_median, interleaved, percentile, ratios, spread
from benchmarks.storage_speed.turns import FINGERPRINT, QWEN, ROOT, SCOPE, Turns, rows_of
from kv_agent.chunks import content_key
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore


def test_a_dropped_file_is_read_from_the_disk_and_another_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 << 20))
    cold.drop([path])
    before = cold.bytes_from_disk()
    cold.read_through([path])
    first = cold.bytes_from_disk() - before
    cold.read_through([path], hashes=True)

    if not first:
        pytest.skip("this file system has no disk behind it")
    assert first >= 4 << 20
    assert cold.bytes_from_disk() - before == first


def test_arms_run_as_often_as_said_in_turns() -> None:
    calls: list[str] = []

    def arm(name: str, seconds: float) -> Callable[[], float]:
        return lambda: (calls.append(name), seconds)[1]

    seconds = interleaved({"a": arm("a", 1.0), "b": arm("b", 2.0)}, rounds=4)

    assert seconds == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert "".join(calls) == "ab" + "abba" * 2


def test_ratios_are_those_of_each_round() -> None:
    assert ratios([1.0, 2.0, 9.0], [2.0, 4.0, 9.0]) == {"median": 0.5, "q1": 0.5, "q3": 0.75, "min": 0.5}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0])["q1"] == 2.0
    assert set(spread([3.0]).values()) == {3.0}


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in reversed(range(1, 101))]

    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [51.0, 100.0, 100.0]


def test_multiples_are_of_the_yardstick_s_median() -> None:
    assert against_median([1.0, 2.0, 30.0], [4.0, 8.0]) == {"median": 3.0, "q1": 2.5, "q3": 3.5, "min": 2.0}


def test_made_up_turns_can_be_stored_and_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, host_bytes=0, fsync="never")
    turn, chunks = Turns(QWEN).turn([5, 3])

    assert store.put_turn(turn, [], chunks).new_chunks == set(turn.chunk_keys)

    stored = store.catalog.chunks(turn.chunk_keys)
    assert all(store.load(stored[chunk.key]).kv_L2THD.equal(chunk.kv) for chunk in chunks)
    assert sum(chunk.kv.nbytes for chunk in chunks) == 8 * QWEN.token_bytes
    assert {record.key for record in rows_of(turn, chunks)[0]} == set(stored)
    store.close()


def test_a_filled_catalog_is_a_sound_one(tmp_path: Path) -> None:
    fill(tmp_path / "catalog.sqlite3", 3 * TURN_CHUNKS)
    catalog = Catalog(tmp_path / "catalog.sqlite3")

    assert catalog.stats()["chunks"] == catalog.stats()["entries"] == 3 * TURN_CHUNKS
    assert catalog.damage() == []
    assert catalog.child_lengths(ROOT) == (CHUNK_TOKENS,)
    for record in catalog.all_chunks():
        found = catalog.same_text([content_key(FINGERPRINT, record.token_ids)], SCOPE, FINGERPRINT)
        assert [same.key for same, _ in found] == [record.key]
    catalog.close()


def test_the_report_shows_the_last_line_of_each_case(tmp_path: Path) -> None:
    provenance = {
        "cpu": "a processor",
        "cores": 1,
        "memory_gib": 2,
        "time": "2026-01-01T00:00",
        "commit": "c",
    }
    common = {"benchmark": "storage", "part": "look-up", "calls": 7, "chunks": 1000, "beside": "nothing"}
    rows = [
        {
            **common,
            "case": case,
            "ms": dict.fromkeys(("p50", "p95", "p99", "max"), ms),
            "provenance": provenance,
        }
        for case, ms in (("one", 5.0), ("two", 2.0), ("one", 1.0))
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert tables(results).splitlines() == [
        "| catalog with 1,000 chunks | p50, ms | p95 | p99 | max | calls |",
        "| --- | --- | --- | --- | --- | --- |",
        "| look-up: one | 1.00 | 1.00 | 1.00 | 1.00 | 7 |",
        "| look-up: two | 2.00 | 2.00 | 2.00 | 2.00 | 7 |",
        "",
        "a processor, 1 core used, 2 GiB; beside it: nothing. 2026-01-01, commit c.",
    ]
