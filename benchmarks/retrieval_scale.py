"""How the index of one namespace behaves with many chunks, and an engine with many namespaces.

    python -m benchmarks.retrieval_scale --chunks 10000 100000 --results results.jsonl

Chunks are made-up texts: tokens of a topic and frequent ones, drawn from a table of random keys whose
directions differ in variance; a query shares most of its tokens with one chunk. What is "added" is the time
of a search less that of FAISS's first search within it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.provenance import provenance
from kv_agent.chunks import (
    ChunkKey,
    ChunkRecord,
    ContentKey,
    Fingerprint,
    IndexChange,
    Scope,
    TurnId,
    TurnRecord,
)
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.retrieval.index import NamespaceIndex
from kv_agent.retrieval.sketches import rounded, to_sketch
from kv_agent.storage.catalog import Catalog

Floats = npt.NDArray[np.float32]

FINGERPRINT = Fingerprint("0" * 32)
NUM_TOKENS = 24  # of a chunk
NUM_AGENTS = 20
CHUNKS_PER_SESSION = 50
NEAREST = 10
BLOCK = 4096


class Texts:
    """Chunks by number, the same for the same seed; none is kept."""

    def __init__(self, size: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        spectrum = np.geomspace(10, 0.1, size)
        self.keys_XV = (rng.normal(size=(8192, size)) * spectrum + 5).astype(np.float32)
        self.topics = rng.integers(500, 8192, size=(2000, 60))

    def token_ids(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """-> [end - start, NUM_TOKENS]"""
        rng = np.random.default_rng(start)
        frequent = (500 ** rng.random((end - start, NUM_TOKENS // 2))).astype(np.int64) - 1
        of_topic = rng.integers(60, size=(end - start, NUM_TOKENS // 2))
        topics = rng.integers(len(self.topics), size=(end - start, 1))
        return np.concatenate([frequent, self.topics[topics, of_topic]], axis=1)

    def pooled(self, start: int, end: int) -> Floats:
        total = np.zeros((end - start, self.keys_XV.shape[1]), dtype=np.float32)
        for column in self.token_ids(start, end).T:
            total += self.keys_XV[column]
        return total / NUM_TOKENS

    def tokens(self, number: int) -> Floats:
        block = number // BLOCK * BLOCK
        keys_TV: Floats = self.keys_XV[self.token_ids(block, block + BLOCK)[number - block]]
        return keys_TV

    def query(self, number: int) -> Floats:
        """Twelve tokens of a chunk and four of none."""
        strange = np.random.default_rng(number).integers(8192, size=4)
        keys_tV: Floats = np.concatenate([self.tokens(number)[::2], self.keys_XV[strange]])
        return keys_tV


@dataclass
class Feed:
    """Changes in memory instead of a catalog."""

    texts: Texts
    changes: list[IndexChange] = field(default_factory=list)

    def changes_since(
        self, fingerprint: Fingerprint, namespace: str, seq: int, limit: int = 1000
    ) -> list[IndexChange]:
        first = bisect_right(self.changes, seq, key=lambda change: change.seq)
        later = self.changes[first : first + limit]
        return [change for change in later if change.scope.namespace == namespace]

    def sketches(self, keys: Iterable[ChunkKey]) -> Mapping[ChunkKey, bytes]:
        return {key: to_sketch(self.texts.tokens(int(key, 16))) for key in keys}


def change(number: int, vector: Floats | None, namespace: str = "default") -> IndexChange:
    key = f"{number:032x}"
    return IndexChange(
        seq=number + 1,
        entry_id=number + 1,
        chunk_key=ChunkKey(key),
        content_key=ContentKey(key),
        turn_id=TurnId(f"turn-{number}"),
        scope=scope_of(number, namespace),
        vector=None if vector is None else vector.astype("<f4").tobytes(),
    )


def scope_of(number: int, namespace: str = "default") -> Scope:
    session = number // CHUNKS_PER_SESSION
    return Scope(namespace=namespace, agent_id=f"agent{session % NUM_AGENTS}", session_id=f"s{session}")


def fill(index: NamespaceIndex, texts: Texts, num_chunks: int) -> None:
    for start in range(0, num_chunks, BLOCK):
        block_NV = texts.pooled(start, start + BLOCK)[: num_chunks - start]
        index.apply(change(start + row, vector_V) for row, vector_V in enumerate(block_NV))


def recalls(index: NamespaceIndex, texts: Texts, num_chunks: int, queries: Sequence[int]) -> dict[str, float]:
    """Share of the exactly nearest ten that a search of ten finds: everywhere, of an agent, of a session."""
    scopes: dict[str, Callable[[int], Scope]] = {
        "all": lambda number: Scope(),
        "agent": lambda number: Scope(agent_id=scope_of(number).agent_id),
        "session": lambda number: Scope(session_id=scope_of(number).session_id),
    }
    means_QV = np.stack([texts.query(number).mean(axis=0) for number in queries])
    unit_QV = index.space.unit(means_QV)
    best: dict[str, list[list[tuple[float, int]]]] = {name: [[] for _ in queries] for name in scopes}
    agents = np.arange(num_chunks) // CHUNKS_PER_SESSION
    for start in range(0, num_chunks, BLOCK):
        block_NV = texts.pooled(start, start + BLOCK)[: num_chunks - start]
        scores_QN = unit_QV @ index.space.unit(block_NV).T
        sessions_N = agents[start : start + len(block_NV)]
        for row, number in enumerate(queries):
            session = number // CHUNKS_PER_SESSION
            admitted = {
                "all": np.ones(len(sessions_N), dtype=bool),
                "agent": sessions_N % NUM_AGENTS == session % NUM_AGENTS,
                "session": sessions_N == session,
            }
            for name, mask_N in admitted.items():
                masked_N = np.where(mask_N, scores_QN[row], -np.inf)
                top = np.argpartition(-masked_N, min(NEAREST, len(masked_N) - 1))[:NEAREST]
                best[name][row] += [(float(masked_N[i]), start + int(i)) for i in top if mask_N[i]]
    found = {}
    for name, scope in scopes.items():
        shares = []
        for row, number in enumerate(queries):
            exact = {entry for _, entry in sorted(best[name][row], reverse=True)[:NEAREST]}
            hits = index.search(means_QV[row], scope(number), NEAREST)
            shares.append(len({hit.entry_id - 1 for hit in hits} & exact) / len(exact))
        found[name] = round(float(np.mean(shares)), 4)
    return found


class Timed:
    """A FAISS index that notes how long each of its searches took, in seconds."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self.spent: list[float] = []

    def search(self, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = self._index.search(*args, **options)
        self.spent.append(time.perf_counter() - started)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


def latencies(index: NamespaceIndex, texts: Texts, queries: Sequence[int]) -> dict[str, float]:
    """Milliseconds of the index's search, of FAISS's first search in it, and of everything else in it."""
    means_QV = np.stack([texts.query(number).mean(axis=0) for number in queries])
    neighbours = index.neighbours
    assert neighbours is not None
    plain = neighbours._index
    ours, bare = [], []
    for mean_V in means_QV:
        neighbours._index = timed = Timed(plain)
        started = time.perf_counter()
        index.search(mean_V, Scope(), NEAREST)
        ours.append(time.perf_counter() - started)
        bare.append(timed.spent[0])
    neighbours._index = plain
    added = np.array(ours) - np.array(bare)
    return {
        **_percentiles("search", ours),
        **_percentiles("faiss", bare),
        **_percentiles("added", added.tolist()),
    }


def measure(num_chunks: int, size: int, num_queries: int) -> dict[str, object]:
    texts = Texts(size)
    rng = np.random.default_rng(1)
    queries = rng.integers(num_chunks, size=num_queries).tolist()
    row: dict[str, object] = {"chunks": num_chunks, "values": size}
    started = time.perf_counter()
    index = NamespaceIndex(
        FINGERPRINT, "default", lambda keys: {k: rounded(texts.tokens(int(k, 16))) for k in keys}
    )
    fill(index, texts, num_chunks)
    index.search(texts.query(0).mean(axis=0), Scope(), 1)
    row["build_s"] = round(time.perf_counter() - started, 1)
    neighbours = index.neighbours
    assert neighbours is not None
    row["kind"] = "exact" if neighbours.is_exact else f"lists, {neighbours.num_probes} probed"
    row["bytes_per_vector"] = round((index.num_bytes + len(neighbours.to_array())) / num_chunks)
    row |= {f"recall@10_{name}": share for name, share in recalls(index, texts, num_chunks, queries).items()}
    row |= latencies(index, texts, queries)
    times = []
    for number in range(num_chunks, num_chunks + 50):
        keys_tV = texts.query(number)
        started = time.perf_counter()
        index.apply([change(number, keys_tV.mean(axis=0))])
        assert index.search(keys_tV.mean(axis=0), Scope(), 1)[0].entry_id == number + 1
        times.append(time.perf_counter() - started)
    row["visible_ms_p50"], row["visible_ms_max"] = (
        round(value * 1e3, 2) for value in (float(np.median(times)), max(times))
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        started = time.perf_counter()
        index.save(path)
        row["save_s"] = round(time.perf_counter() - started, 2)
        row["snapshot_bytes"] = path.stat().st_size
        del index, neighbours
        started = time.perf_counter()
        loaded = NamespaceIndex.load(path, FINGERPRINT, "default")
        assert loaded is not None
        row["load_s"] = round(time.perf_counter() - started, 2)
        loaded.search(texts.query(1).mean(axis=0), Scope(), 1)
        row["load_and_search_s"] = round(time.perf_counter() - started, 2)
    row["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def many_namespaces(num: int, chunks_each: int, size: int) -> dict[str, object]:
    """Namespaces searched in turn by one engine that may keep a tenth of them in memory."""
    texts = Texts(size)
    vectors = texts.pooled(0, chunks_each)

    class ManyFeed(Feed):
        def changes_since(
            self, fingerprint: Fingerprint, namespace: str, seq: int, limit: int = 1000
        ) -> list[IndexChange]:
            return [change(row, vectors[row], namespace) for row in range(seq, chunks_each)][:limit]

    with tempfile.TemporaryDirectory() as folder:
        compared = NUM_TOKENS * chunks_each * (size + 8)  # the background, and as many tokens kept
        each = chunks_each * (2 * size + 88) + 4 * size**2 + 2 * compared
        kept = num // 10 * each
        engine = RetrievalEngine(ManyFeed(texts), FINGERPRINT, Path(folder), max_bytes=kept)
        times: dict[str, list[float]] = {"first": [], "again": []}
        for name, spent in times.items():
            for number in range(num):
                started = time.perf_counter()
                engine.search(texts.query(number % chunks_each), Scope(namespace=f"n{number}"), 5)
                spent.append(time.perf_counter() - started)
            assert engine.num_loaded < num // 2, name
        loaded = engine.num_loaded
        engine.close()
    row: dict[str, object] = {"namespaces": num, "chunks_each": chunks_each, "kept_in_memory": loaded}
    return row | _percentiles("first", times["first"]) | _percentiles("again", times["again"])


def through_catalog(num_turns: int, size: int) -> dict[str, object]:
    """From handing a turn to the catalog until a search finds it, with so many turns there already.

    Searches follow each other, so later ones find some of their candidates' tokens still kept.
    """
    texts = Texts(size)
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(Path(folder) / "catalog.sqlite3")
        engine = RetrievalEngine(catalog, FINGERPRINT, None)
        added: list[float] = []
        visible: list[float] = []
        searched: list[float] = []
        busy: list[float] = []  # of this process's own time, whatever else runs on the core
        for number in range(num_turns + 50):
            keys_TV = texts.tokens(number)
            started = time.perf_counter()
            _add_turn(catalog, number, keys_TV)
            added.append(time.perf_counter() - started)
            if number >= num_turns:
                search_started, busy_before = time.perf_counter(), time.process_time()
                found = engine.search(keys_TV, Scope(), 1)
                busy.append(time.process_time() - busy_before)
                searched.append(time.perf_counter() - search_started)
                assert found[0].turn_id == f"turn-{number}"
                visible.append(time.perf_counter() - started)
            elif number == num_turns - 1:
                engine.search(keys_TV, Scope(), 1)  # the first search reads all of it
        engine.close()
        catalog.close()
    return {
        "catalog_turns": num_turns,
        "values": size,
        **_percentiles("added", added[num_turns:]),
        **_percentiles("visible", visible),
        **_percentiles("search", searched),
        **_percentiles("search_cpu", busy),
    }


def _add_turn(catalog: Catalog, number: int, keys_TV: Floats) -> None:
    key = ChunkKey(f"{number:032x}")
    record = ChunkRecord(
        key=key,
        content_key=ContentKey(key),
        parent=ChunkKey("f" * 32),
        fingerprint=FINGERPRINT,
        namespace="default",
        user_id="default",
        start=0,
        token_ids=tuple(range(NUM_TOKENS)),
        blob=key,
        tensor=key,
        checksum=key,
        num_bytes=1,
    )
    turn = TurnRecord(
        turn_id=TurnId(f"turn-{number}"),
        scope=Scope(),
        fingerprint=FINGERPRINT,
        chunk_keys=(key,),
        num_tokens=NUM_TOKENS,
        text=f"Turn {number} of some.",
        created=float(number),
    )
    vector = keys_TV.mean(axis=0).astype("<f4").tobytes()
    catalog.add_turn(turn, [], [record], {key: vector}, {key: to_sketch(keys_TV)})


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{name}_ms_p{p}": round(float(np.percentile(seconds, p)) * 1e3, 3) for p in (50, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--values", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--catalog", type=int, default=0, help="turns of a catalog to be searched")
    parser.add_argument("--namespaces", type=int, default=0)
    parser.add_argument("--results", type=Path, help="file that gets a JSON line a measurement")
    args = parser.parse_args()
    rows = [lambda n=n: measure(n, args.values, args.queries) for n in args.chunks]
    if args.catalog:
        rows.append(lambda: through_catalog(args.catalog, args.values))
    if args.namespaces:
        rows.append(lambda: many_namespaces(args.namespaces, 20, args.values))
    for run in rows:
        row = run()
        print(json.dumps(row, indent=1), flush=True)
        if args.results:
            with args.results.open("a", encoding="utf-8") as lines:
                record = {"benchmark": "retrieval_scale", **row, "provenance": provenance()}
                lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
