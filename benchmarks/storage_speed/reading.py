"""Disk to host: loading all chunks of stored turns, against reading their files from end to end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.storage_speed.cold import bytes_from_disk, drop, read_through
from benchmarks.storage_speed.timing import Arm, interleaved, ratios, spread
from benchmarks.storage_speed.turns import QWEN, Shape, Turns
from kv_agent.chunks import ChunkRecord
from kv_agent.config import PluginConfig
from kv_agent.storage.store import LocalStore

RECALL = Shape(name="the bundled model", layers=6, heads=2, head_dim=64)
THREADS = PluginConfig.model_fields["load_threads"].default


def measure(folder: Path, rounds: int, total_bytes: int) -> Iterator[dict[str, Any]]:
    """Turns of eight chunks of 128 tokens, and turns of one chunk of 20."""
    yield _row(folder, QWEN, [128] * 8, total_bytes, rounds)
    yield _row(folder, RECALL, [20], total_bytes // 16, rounds)


def _row(
    folder: Path, shape: Shape, chunk_tokens: list[int], total_bytes: int, rounds: int
) -> dict[str, Any]:
    turns = Turns(shape)
    turn_bytes = sum(chunk_tokens) * shape.token_bytes
    with tempfile.TemporaryDirectory(dir=folder) as root:
        store = LocalStore(Path(root), host_bytes=0, fsync="never")
        records: list[ChunkRecord] = []
        for _ in range(max(1, total_bytes // turn_bytes)):
            turn, chunks = turns.turn(chunk_tokens)
            store.put_turn(turn, [], chunks)
            found = store.catalog.chunks(turn.chunk_keys)
            records += [found[key] for key in turn.chunk_keys]
        files = [Path(root, blob) for blob in dict.fromkeys(record.blob for record in records)]
        file_bytes = sum(path.stat().st_size for path in files)
        cold_shares: list[float] = []

        def cold(work: Callable[[], object]) -> Arm:
            def run() -> float:
                drop(files)
                before = bytes_from_disk()
                start = time.perf_counter()
                work()
                seconds = time.perf_counter() - start
                cold_shares.append((bytes_from_disk() - before) / file_bytes)
                return seconds

            return run

        with ThreadPoolExecutor(THREADS) as pool:
            arms = {
                "raw": cold(lambda: read_through(files)),
                "load": cold(lambda: _load_all(store, records, pool)),
                "load_one_thread": cold(lambda: [store.load(record).kv_L2THD.nbytes for record in records]),
                "raw_and_checksum": cold(lambda: read_through(files, hashes=True)),
            }
            seconds = interleaved(arms, rounds)
        store.close()
    return {
        "part": "read",
        "case": f"chunks of {chunk_tokens[0]} tokens, {shape.name}",
        "bytes": file_bytes,
        "files": len(files),
        "chunks": len(records),
        "threads": THREADS,
        "share_from_disk": round(min(cold_shares), 4),
        "gb_s": {name: spread([file_bytes / one / 1e9 for one in times]) for name, times in seconds.items()},
        "of_raw": {name: ratios(seconds["raw"], times) for name, times in seconds.items() if name != "raw"},
    }


def _load_all(store: LocalStore, records: Sequence[ChunkRecord], pool: ThreadPoolExecutor) -> None:
    for _ in pool.map(lambda record: store.load(record).kv_L2THD.nbytes, records):
        pass
