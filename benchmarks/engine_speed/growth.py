"""How a store grows: its bytes and the time to store a turn against the number of turns; does that bend?

Turns are small and nothing is synced, so that what grows with the store is not lost in what does not.
"""

from __future__ import annotations

import itertools
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.storage_speed.filling import SMALL
from benchmarks.storage_speed.timing import percentile, spread
from benchmarks.storage_speed.turns import Turns
from kv_agent.chunks import TurnId
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.store import LocalStore

TURN_CHUNKS = (24, 24)  # tokens of each
TURN_TOKENS = sum(TURN_CHUNKS)
KV_BYTES = TURN_TOKENS * SMALL.token_bytes  # of a turn
PLAIN_WRITES = 100  # of as many bytes as a turn's KV, in each stretch


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A store once ``num_turns`` are in it, and the times of the turns that came last."""

    num_turns: int
    catalog_bytes: int
    log_bytes: int
    blob_bytes: int
    put_s: Sequence[float]
    plain_s: Sequence[float]


def measure(folder: Path, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each of ``counts``, which ascend, and one of the slopes at both ends; two at least."""
    found = list[Stretch]()
    for stretch in _stretches(folder, counts):
        found.append(stretch)
        yield _row(stretch)
    yield _slopes(found)


def _stretches(folder: Path, counts: Sequence[int]) -> Iterator[Stretch]:
    turns = Turns(SMALL)
    (folder / "plain").mkdir(parents=True)
    with closing(LocalStore(folder / "store", host_bytes=0, fsync="never")) as store:
        for before, after in itertools.pairwise((0, *counts)):
            put_s = [_put(store, turns) for _ in range(before, after)]
            yield Stretch(
                num_turns=after,
                catalog_bytes=_pages_bytes(folder / "store" / "catalog.sqlite3"),
                log_bytes=(folder / "store" / "catalog.sqlite3-wal").stat().st_size,
                blob_bytes=sum(file.num_bytes for file in BlobFiles(folder / "store").files().values()),
                put_s=put_s,
                plain_s=[_write(folder / "plain" / f"{after}-{i}") for i in range(PLAIN_WRITES)],
            )


def _put(store: LocalStore, turns: Turns) -> float:
    turn, chunks = turns.turn(list(TURN_CHUNKS))
    turn = replace(turn, turn_id=TurnId(uuid.uuid4().hex))  # as an engine names them: over many folders
    start = time.perf_counter()
    store.put_turn(turn, [], chunks)
    return time.perf_counter() - start


def _write(path: Path) -> float:
    content = bytes(KV_BYTES)
    start = time.perf_counter()
    path.write_bytes(content)
    return time.perf_counter() - start


def _pages_bytes(path: Path) -> int:
    """Of the catalog as whoever reads it sees it, whatever part of it is in the log still."""
    with closing(sqlite3.connect(path)) as db:
        (num_pages,), (page_bytes,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
        )
        return int(num_pages) * int(page_bytes)


def _row(stretch: Stretch) -> dict[str, Any]:
    num_tokens = stretch.num_turns * TURN_TOKENS
    return {
        "part": "growth",
        "case": f"{stretch.num_turns:,} turns",
        "turns": stretch.num_turns,
        "tokens": num_tokens,
        "catalog_bytes": stretch.catalog_bytes,
        "log_bytes": stretch.log_bytes,
        "blob_bytes": stretch.blob_bytes,
        "bytes_per_token": {
            "catalog": round(stretch.catalog_bytes / num_tokens, 1),
            "blobs beyond their KV": round(
                stretch.blob_bytes / num_tokens - SMALL.token_bytes,
                1,
            ),
        },
        "put_ms": spread([1e3 * one for one in stretch.put_s]),
        "put_p99_ms": round(1e3 * percentile(stretch.put_s, 0.99), 3),
        "plain_write_ms": spread([1e3 * one for one in stretch.plain_s]),
        "put_of_plain_write": round(median(stretch.put_s) / median(stretch.plain_s), 2),
    }


def _slopes(found: Sequence[Stretch]) -> dict[str, Any]:
    """What a turn adds at either end; a store that grows evenly has ratios of 1."""
    ends = {"first": found[:2], "last": found[-2:]}
    added = {
        name: {
            "catalog_bytes": (after.catalog_bytes - before.catalog_bytes)
            / (after.num_turns - before.num_turns),
            "blob_bytes": (after.blob_bytes - before.blob_bytes) / (after.num_turns - before.num_turns),
            "put_ms": 1e3 * median(after.put_s),
            "put_of_plain_write": median(after.put_s) / median(after.plain_s),
        }
        for name, (before, after) in ends.items()
    }
    return {
        "part": "growth",
        "case": f"a turn more, at {found[1].num_turns:,} and at {found[-1].num_turns:,}",
        "first": {what: round(value, 3) for what, value in added["first"].items()},
        "last": {what: round(value, 3) for what, value in added["last"].items()},
        "last_of_first": {
            what: round(value / added["first"][what], 3) for what, value in added["last"].items()
        },
    }
