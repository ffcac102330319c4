"""The catalog with very many chunks: look-ups, inserts and opening the store."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.storage_speed.cold import drop, read_through
from benchmarks.storage_speed.filling import CHUNK_TOKENS, SMALL, TURN_CHUNKS, fill
from benchmarks.storage_speed.timing import percentile
from benchmarks.storage_speed.turns import FINGERPRINT, ROOT, SCOPE, Turns, rows_of
from kv_agent.chunks import ChunkRecord
from kv_agent.config import Fsync
from kv_agent.storage.catalog import Catalog

SAMPLED = 20_000
_OPEN = """
import json, sys, time
from pathlib import Path
from benchmarks.storage_speed.cold import bytes_from_disk
from kv_agent.storage.store import LocalStore
before, start = bytes_from_disk(), time.perf_counter()
LocalStore(Path(sys.argv[1]), host_bytes=0)
print(json.dumps([time.perf_counter() - start, bytes_from_disk() - before]))
"""


def measure(root: Path, num_chunks: int, calls: int, openings: int) -> Iterator[dict[str, Any]]:
    """``root`` is a store's folder; it is filled unless it has a catalog already."""
    path = root / "catalog.sqlite3"
    if not path.exists():
        fill(path, num_chunks)
    with_size = {"chunks": num_chunks, "catalog_bytes": path.stat().st_size}
    read_through([path])  # what a look-up then takes is not the disk's time
    for what, times in _lookups(path, calls):
        yield {"part": "look-up", "case": what, **_times(times), **with_size}
    for fsync in ("never", "always"):
        for count in (1, TURN_CHUNKS):
            for what, times in _inserts(root, count, fsync, calls):
                yield {"part": "insert", "case": what, **_times(times), **with_size}
    for is_cold in (False, True):
        yield {**_opening(root, openings, is_cold=is_cold), **with_size}


def _times(seconds: Sequence[float]) -> dict[str, Any]:
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    ms = {name: round(percentile(seconds, share) * 1e3, 3) for name, share in shares.items()}
    return {"calls": len(seconds), "ms": ms}


def _lookups(path: Path, calls: int) -> Iterator[tuple[str, list[float]]]:
    catalog = Catalog(path, "never")
    known = _sample(catalog)
    choice = random.Random(0)

    def one() -> ChunkRecord:
        return known[choice.randrange(len(known))]

    def timed(work: Callable[[Any], object], argument: Callable[[], object]) -> list[float]:
        seconds = []
        for _ in range(calls):
            given = argument()
            start = time.perf_counter()
            work(given)
            seconds.append(time.perf_counter() - start)
        return seconds

    yield "`chunks` of 1 key", timed(catalog.chunks, lambda: [one().key])
    yield "`chunks` of 32 keys", timed(catalog.chunks, lambda: [one().key for _ in range(32)])
    yield "`child_lengths` of a chunk", timed(catalog.child_lengths, lambda: one().key)
    yield "`child_lengths` of the root", timed(catalog.child_lengths, lambda: ROOT)
    times = timed(lambda keys: catalog.same_text(keys, SCOPE, FINGERPRINT), lambda: [one().content_key])
    yield "`same_text` of one chunk", times
    catalog.close()


def _sample(catalog: Catalog) -> list[ChunkRecord]:
    """Keys are digests, so those that come first in their order are a random sample."""
    return list(islice(catalog.all_chunks(), SAMPLED))


def _inserts(root: Path, count: int, fsync: Fsync, calls: int) -> Iterator[tuple[str, list[float]]]:
    turns = Turns(SMALL, seed=time.time_ns() % (1 << 32))
    catalog = Catalog(root / "catalog.sqlite3", fsync)
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
    added, synced = [], []
    for _ in range(calls):
        turn, chunks = turns.turn([CHUNK_TOKENS] * count)
        rows = rows_of(turn, chunks)
        start = time.perf_counter()
        catalog.add_turn(turn, [], *rows)
        added.append(time.perf_counter() - start)
        if fsync == "always":
            os.write(log, bytes(4096))
            start = time.perf_counter()
            os.fsync(log)
            synced.append(time.perf_counter() - start)
    os.close(log)
    catalog.close()
    yield f"turn of {count}, fsync {fsync}", added
    if synced:
        yield f"a bare fsync between them (turns of {count})", synced


def _opening(root: Path, openings: int, *, is_cold: bool) -> dict[str, Any]:
    seconds, from_disk = [], []
    for _ in range(openings):
        if is_cold:
            drop(path for path in root.iterdir() if path.is_file())
        command = [sys.executable, "-c", _OPEN, str(root)]
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        took, read = json.loads(found.stdout.splitlines()[-1])
        seconds.append(took)
        from_disk.append(read)
    case = "page cache dropped" if is_cold else "page cache warm"
    return {"part": "open", "case": case, **_times(seconds), "bytes_from_disk": max(from_disk)}
