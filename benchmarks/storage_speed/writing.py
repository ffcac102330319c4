"""Putting a turn, against writing the same bytes to a file and syncing it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.storage_speed.timing import interleaved, ratios, spread
from benchmarks.storage_speed.turns import QWEN, Turns, rows_of
from kv_agent.storage import blob_content
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore

TURN_TOKENS = (256, 1024, 4096)
CHUNK_TOKENS = 128


def measure(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    for num_tokens in TURN_TOKENS:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            yield _row(Path(root), num_tokens, rounds if num_tokens < max(TURN_TOKENS) else rounds // 2 + 1)


def _row(root: Path, num_tokens: int, rounds: int) -> dict[str, Any]:
    turns = Turns(QWEN)
    chunk_tokens = [CHUNK_TOKENS] * (num_tokens // CHUNK_TOKENS)
    _, chunks = turns.turn(chunk_tokens)
    content = blob_content.encode({chunk.key: chunk.kv for chunk in chunks}, turns.turn([1])[0].fingerprint)
    store = LocalStore(root / "store", host_bytes=0)
    lazy_store = LocalStore(root / "lazy", host_bytes=0, fsync="never")
    rows_only = Catalog(root / "rows.sqlite3")
    plain = root / "plain"
    plain.mkdir()
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT)

    def write_and_sync() -> float:
        path = plain / f"{time.monotonic_ns()}"
        start = time.perf_counter()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        written = 0
        while written < len(content):
            written += os.write(descriptor, memoryview(content)[written:])
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - start

    def put(into: LocalStore) -> float:
        turn, new = turns.turn(chunk_tokens)
        start = time.perf_counter()
        into.put_turn(turn, [], new)
        return time.perf_counter() - start

    def commit() -> float:
        turn, new = turns.turn(chunk_tokens)
        rows = rows_of(turn, new)
        start = time.perf_counter()
        rows_only.add_turn(turn, [], *rows)
        return time.perf_counter() - start

    def append_and_sync() -> float:
        os.write(log, bytes(4096))
        start = time.perf_counter()
        os.fsync(log)
        return time.perf_counter() - start

    arms = {
        "write_fsync": write_and_sync,
        "put_turn": lambda: put(store),
        "rows_alone": commit,
        "bare_fsync": append_and_sync,
    }
    try:
        seconds = interleaved(arms, rounds)
        # On its own: what nobody has synced yet is written by whoever syncs next.
        seconds |= interleaved({"put_turn_fsync_never": lambda: put(lazy_store)}, rounds // 2 + 1)
    finally:
        os.close(log)
        for closable in (store, lazy_store, rows_only):
            closable.close()
    put_ratio = ratios(seconds["put_turn"], seconds["write_fsync"])
    added = [one / other - 1 for one, other in zip(seconds["put_turn"], seconds["write_fsync"], strict=True)]
    return {
        "part": "put",
        "case": f"{num_tokens} tokens, {QWEN.name}",
        "bytes": len(content),
        "rounds": rounds,
        "ms": {name: spread([one * 1e3 for one in times]) for name, times in seconds.items()},
        "time_of_write_fsync": put_ratio,
        "added": spread(added),
    }
