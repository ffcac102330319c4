"""Markdown tables of what ``benchmarks.storage`` measured; of a row that is there twice the last counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

INJECTED = {
    "memcpy_two_threads": "the same bytes by two threads at once, a half each",
    "direct_moved": "chunks moved, two threads",
    "direct_in_place": "chunks in their own place, two threads",
    "direct_moved_one_thread": "chunks moved, one thread",
    "direct_in_place_one_thread": "chunks in their own place, one thread",
    "direct_moved_across": "chunks moved to 37 tokens into a block, one thread",
    "moved": "chunks moved, gathered for vLLM's writer",
    "in_place": "chunks in their own place, gathered for vLLM's writer",
    "writer_alone": "vLLM's writer alone, one call a layer",
    "writer_chunk_by_chunk": "vLLM's writer alone, one call a layer and chunk",
    "rotation_alone": "rotating the keys alone",
    "rotation_by_torch": "rotating the keys alone, by torch",
    "values_alone": "copying the values alone",
}


def tables(results: Path) -> str:
    """Every table, with what it says in its head."""
    rows: dict[tuple[str, str], Row] = {}
    with results.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows[row["part"], row["case"]] = row
    parts = (_read, _inject, _put, _catalog, _machine)
    return "\n\n".join("\n".join(table) for part in parts if (table := list(part(list(rows.values())))))


def _of(rows: Sequence[Row], *parts: str) -> list[Row]:
    return [row for row in rows if row["part"] in parts]


def _read(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "read")
    if not found:
        return
    yield (
        f"| disk to host, cold | MB | raw read, GB/s | of that: all chunks, {found[-1]['threads']} threads"
        " | one thread | raw read and checksum |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in found:
        shares = [_ratio(row["of_raw"][arm]) for arm in ("load", "load_one_thread", "raw_and_checksum")]
        raw = _value(row["gb_s"]["raw"], 2)
        yield f"| {row['case']} | {row['bytes'] / 1e6:.0f} | {raw} | {' | '.join(shares)} |"


def _inject(rows: Sequence[Row]) -> Iterator[str]:
    for row in _of(rows, "inject"):
        yield f"| host to paged blocks: {row['case']}, {row['bytes'] / 1e6:.0f} MB | ms | of `memcpy` |"
        yield "| --- | --- | --- |"
        yield f"| `memcpy` (one `copy_`) | {_value(row['ms']['memcpy'], 1)} | 1 |"
        for arm, name in INJECTED.items():
            if arm not in row["ms"]:
                continue
            yield f"| {name} | {_value(row['ms'][arm], 1)} | {_ratio(row['of_memcpy'][arm])} |"


def _put(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "put")
    if not found:
        return
    yield (
        "| putting a turn of | MB | write and fsync, ms | `put_turn`, ms | adds | rows alone, ms"
        ' | a bare fsync, ms | `fsync="never"`, ms |'
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in found:
        names = ("write_fsync", "put_turn", "rows_alone", "bare_fsync", "put_turn_fsync_never")
        plain, put, alone, bare, never = (_value(row["ms"][name], 1) for name in names)
        added = row["added"]
        adds = f"{added['median']:+.0%} ({added['q1']:+.0%} to {added['q3']:+.0%})"
        size = f"{row['bytes'] / 1e6:.0f}"
        yield f"| {row['case']} | {size} | {plain} | {put} | {adds} | {alone} | {bare} | {never} |"


def _catalog(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "look-up", "insert", "open")
    if not found:
        return
    yield f"| catalog with {found[0]['chunks']:,} chunks | p50, ms | p95 | p99 | max | calls |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in found:
        times = " | ".join(f"{row['ms'][name]:.2f}" for name in ("p50", "p95", "p99", "max"))
        yield f"| {row['part']}: {row['case']} | {times} | {row['calls']} |"


def _machine(rows: Sequence[Row]) -> Iterator[str]:
    if rows:
        last = rows[-1]
        came = last["provenance"]
        yield (
            f"{came['cpu']}, {came['cores']} core used, {came['memory_gib']} GiB;"
            f" beside it: {last['beside']}. {came['time'][:10]}, commit {came['commit']}."
        )


def _value(spread: Mapping[str, float], digits: int) -> str:
    """Median and quartiles."""
    return f"{spread['median']:.{digits}f} ({spread['q1']:.{digits}f} to {spread['q3']:.{digits}f})"


def _ratio(spread: Mapping[str, float]) -> str:
    return _value(spread, 2)
