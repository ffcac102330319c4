"""Parts of ``benchmarks.speed`` that need no engine measure what they say, here of very little."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engine_speed import growth, scheduling
from benchmarks.storage_speed.filling import CHUNK_TOKENS, TURN_CHUNKS


def test_growth_tells_the_bytes_that_are_there(tmp_path: Path) -> None:
    *rows, slopes = growth.measure(tmp_path, (5, 10, 20))

    assert [row["turns"] for row in rows] == [5, 10, 20]
    files = list((tmp_path / "store" / "blobs").rglob("*.safetensors"))
    assert len(files) == 20
    assert rows[-1]["blob_bytes"] == sum(path.stat().st_size for path in files)
    assert slopes["last_of_first"]["blob_bytes"] == 1
    # On average ten turns more add as much as they add to what is there.
    added = rows[2]["catalog_bytes"] - rows[1]["catalog_bytes"]
    assert slopes["last"]["catalog_bytes"] == added / 10


def test_every_request_that_waits_is_served_with_its_memories(tmp_path: Path) -> None:
    num_waiting = 20
    rows = {row["case"]: row for row in scheduling.measure(tmp_path, num_turns=50, num_waiting=num_waiting)}

    for num_memories, num_fresh in scheduling.CASES:
        told = f"{num_memories} memories, {num_fresh} fresh tokens"
        for call in ("new_request", "allocated", "finished", "look-ups of all that wait"):
            assert rows[f"{call}: {told}"]["calls"] == num_waiting
        match = rows[f"match: {told}"]
        assert match["calls"] >= num_waiting
        assert match["plan_chunks"] == num_memories * TURN_CHUNKS
        assert match["prompt_tokens"] == match["plan_chunks"] * CHUNK_TOKENS + num_fresh
        assert rows[f"look-ups of all that wait: {told}"]["chunks_refused_as_late"] == 0
