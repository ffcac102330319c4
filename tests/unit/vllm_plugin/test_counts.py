"""What a plan and a capture cost in things that can be counted. A change of these numbers is to be meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_agent.chunks import ChunkRecord
from kv_agent.kv import dequantise_kernel
from kv_agent.kv.block_copy import Copying, Piece
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.codecs import Codec
from kv_agent.vllm_plugin import direct
from kv_agent.vllm_plugin.jobs import LoadJob
from kv_agent.vllm_plugin.paged_cache import Reading
from kv_agent.vllm_plugin.plan import PlacedChunk
from kv_agent.vllm_plugin.resolver import Resolver
from tests.unit.counted import Bytes, Statements, count_bytes, trace_statements
from tests.unit.storage.builders import turn_of
from tests.unit.vllm_plugin.bench import CHUNK, SCHEME, Bench, DenseCopier, capture_job, load_job
from tests.unit.vllm_plugin.builders import (
    FINGERPRINT,
    LIMITS,
    SCOPE,
    FakeCatalog,
    chain,
    plan_options,
    record,
    tokens_of,
)
from tests.unit.vllm_plugin.scheduling import Desk, request, row

FRESH = (90, 91, 92)
CHUNKS = 4  # of a plan, of a captured turn


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    return trace_statements(monkeypatch)


@pytest.fixture
def stored(statements: Statements, tmp_path: Path) -> Iterator[tuple[Catalog, list[ChunkRecord]]]:
    """A catalog with a sequence of chunks, each a turn, and one from elsewhere."""
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    records = [*chain(*(range(6 * i, 6 * i + 6) for i in range(CHUNKS))), record(range(50, 56), start=70)]
    for number, one in enumerate(records):
        catalog.add_turn(turn_of([one], f"turn-{number}", SCOPE), [], [one], {})
    yield catalog, records
    catalog.close()


def resolved(
    catalog: Catalog,
    statements: Statements,
    records: list[ChunkRecord],
    *,
    with_plan: bool,
    find_stored: bool,
) -> dict[str, int]:
    """What the look-up for a prompt of these chunks runs, on a connection that is there already."""
    prompt = (*tokens_of(records), *FRESH)
    starts = [(one, 6 * number) for number, one in enumerate(records)]
    options = plan_options(*starts, fresh_start=6 * len(records)) if with_plan else None
    resolver = Resolver(catalog, FINGERPRINT)
    resolver.limits = LIMITS
    resolver.submit((1, 2), SCOPE, None, find_stored=True).result()
    with statements.of() as ran:
        found = resolver.submit(prompt, SCOPE, options, find_stored=find_stored).result()
    resolver.close()
    assert len(found.plan.placed) == len(starts) * with_plan
    return ran


def test_a_plan_is_one_statement_whatever_its_chunks(
    stored: tuple[Catalog, list[ChunkRecord]], statements: Statements
) -> None:
    catalog, records = stored
    assert resolved(catalog, statements, records[:1], with_plan=True, find_stored=False) == {"SELECT": 1}
    assert resolved(catalog, statements, records, with_plan=True, find_stored=False) == {"SELECT": 1}


def test_a_request_that_is_captured_asks_twice_for_every_stored_chunk_it_begins_with(
    stored: tuple[Catalog, list[ChunkRecord]], statements: Statements
) -> None:
    catalog, records = stored
    sequence = records[:CHUNKS]
    # Which lengths go on from here, and whether one of them does; behind the last there are none.
    walked = 2 * CHUNKS
    behind = 1
    without_plan = resolved(catalog, statements, sequence, with_plan=False, find_stored=True)
    assert without_plan == {"WITH": CHUNKS + behind, "SELECT": walked // 2}
    # With a plan: its chunks, and what goes on behind it.
    with_plan = resolved(catalog, statements, records, with_plan=True, find_stored=True)
    assert with_plan == {"WITH": CHUNKS + behind + 1, "SELECT": walked // 2 + 1}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bytes:
    counted = count_bytes(monkeypatch, tmp_path)
    scatter, rotate = DenseCopier.scatter, direct.copy_rotated_into
    dequantised = dequantise_kernel.dequantised

    def counted_scatter(self: DenseCopier, pieces: Sequence[Piece], *arguments: Any) -> Copying:
        for piece in pieces:
            counted.note("turn and scatter" if piece.delta else "scatter", piece.kv_L2THD.nbytes)
        return scatter(self, pieces, *arguments)

    def counted_rotate(out: Tensor, *rest: Any) -> None:
        counted.note("rotate", out.nbytes)
        rotate(out, *rest)

    def counted_dequantised(*arguments: Any) -> Tensor:
        kv_L2THD = dequantised(*arguments)
        counted.note("dequantise", kv_L2THD.nbytes)
        return kv_L2THD

    monkeypatch.setattr(dequantise_kernel, "dequantised", counted_dequantised)
    monkeypatch.setattr(DenseCopier, "scatter", counted_scatter)
    monkeypatch.setattr(direct, "copy_rotated_into", counted_rotate)
    return counted


@pytest.fixture
def bench(counted: Bytes, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "store", dtype=torch.bfloat16, direct=True, host_bytes=1 << 20)
    yield bench
    bench.close()


def loaded(bench: Bench, counted: Bytes, job: LoadJob) -> dict[str, list[int]]:
    """Passes of this load over its chunks, by what was done."""
    moved = bench.worker.counters().get("moved_bytes|load", 0)
    counted.forget()
    bench.received.clear()
    assert bench.load(job) is None
    num_bytes = sum(record.num_tokens for record in job.records.values()) * bench.cache.token_bytes
    assert bench.worker.counters()["moved_bytes|load"] - moved == num_bytes
    stored = {record.num_bytes for record in job.records.values()}
    passes: dict[str, list[int]] = {}
    for what, count in counted.passes:
        if what not in ("read", "hash") or count in stored:  # no header
            passes.setdefault(what, []).append(count)
    return passes


def test_a_chunk_is_gone_through_three_times_from_disk_and_once_from_memory(
    bench: Bench, counted: Bytes
) -> None:
    records = bench.capture(capture_job(CHUNK * CHUNKS, blocks=range(1, 8)))
    chunk_bytes = CHUNK * bench.cache.token_bytes
    each = [chunk_bytes] * CHUNKS
    for one in records:
        bench.store._tiers.discard(one.key)

    job = load_job(records, blocks=range(10, 18))
    from_disk = loaded(bench, counted, job)
    assert from_disk == {"read": each, "hash": each, "scatter": each}
    assert counted.files["open rb"] == CHUNKS

    assert loaded(bench, counted, job) == {"scatter": each}

    # Keys are rotated on their way, not in a pass of their own.
    moved = load_job(records, at=3, blocks=range(10, 18))
    assert loaded(bench, counted, moved) == {"turn and scatter": each}


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
def test_few_bits_are_dequantised_and_turned_in_as_many_passes_as_others_are_read(
    counted: Bytes, tmp_path: Path, host_bytes: int
) -> None:
    codec = Codec(name="int8", scheme=SCHEME)
    benches = [
        Bench(tmp_path / "store", dtype=torch.bfloat16, direct=True, host_bytes=size, codec=codec)
        for size in (0, host_bytes)
    ]
    records = benches[0].capture(capture_job(CHUNK * CHUNKS, blocks=range(1, 8)))
    each, stored = [CHUNK * benches[0].cache.token_bytes] * CHUNKS, [records[0].num_bytes] * CHUNKS

    found = loaded(benches[1], counted, load_job(records, at=3, blocks=range(10, 18)))

    # What a tier keeps stands where it was computed, and is turned on its way into blocks.
    written = "turn and scatter" if host_bytes else "scatter"
    assert found == {"read": stored, "hash": stored, "dequantise": each, written: each}
    for one in benches:
        one.close()


def test_a_captured_turn_is_copied_off_the_cache_once_and_written_once(bench: Bench, counted: Bytes) -> None:
    reads: list[tuple[int, int]] = []
    begin_reading = bench.cache.begin_reading

    def counted_reading(blocks: Any, start: int, end: int, layers: Any = None) -> Reading:
        reads.append((start, end))
        return begin_reading(blocks, start, end, layers)

    bench.cache.begin_reading = counted_reading
    bench.capture(capture_job(CHUNK * CHUNKS, blocks=range(1, 8)))

    chunk_bytes = CHUNK * bench.cache.token_bytes
    assert reads == [(0, CHUNK * CHUNKS)]
    assert bench.worker.counters()["moved_bytes|save"] == chunk_bytes * CHUNKS
    assert counted.of("write")[:-1] == counted.of("hash") == [chunk_bytes] * CHUNKS


def test_a_finished_request_compares_none_of_its_chunks_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each was compared with all: a plan of 320 chunks held up the engine for 14 ms."""
    records = chain(*(range(6 * i, 6 * i + 6) for i in range(40)))
    compared: list[PlacedChunk] = []

    def noted(self: PlacedChunk, other: object) -> bool:
        compared.append(self)
        return self is other

    desk = Desk(FakeCatalog(records))
    prompt, plan = row(*records)
    one = request(prompt, plan=plan)
    desk.side.new_request(one)
    desk.load(one)
    monkeypatch.setattr(PlacedChunk, "__eq__", noted)
    _, answer, _ = desk.finish(one, [70])
    desk.close()

    assert answer["chunk_ids"] == [record.key for record in records]
    assert compared == []
