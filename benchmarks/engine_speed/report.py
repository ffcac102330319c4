"""Tables of what ``benchmarks.speed`` measured; of a row that is there twice the last counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

OURS = {"host": "host: of the hit", "warm": "warm", "disk": "disk, cold"}
NAMES = {
    "computed": "computed",
    "local": "vLLM's own hit",
    "host": "from host",
    "warm": "from warm",
    "disk": "from disk, cold",
}
# Calls of the scheduler thread, and what vLLM calls them.
CALLS = {
    "new_request": "on_new_request",
    "match": "get_num_new_matched_tokens",
    "allocated": "update_state_after_alloc",
    "finished": "request_finished",
}


def latest(results: Path) -> list[Row]:
    return list({(row["part"], row["case"]): row for row in _lines(results)}.values())


def latest_searches(results: Path) -> list[Row]:
    """Of ``benchmarks.retrieval_scale``, through a flat number of chunks."""
    return list({row["chunks"]: row for row in _lines(results) if "chunks" in row}.values())


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def tables(rows: Sequence[Row]) -> str:
    """Every table, with what it says in its head."""
    found = (list(part([row for row in rows if row["part"] == name])) for name, part in _PARTS.items())
    return "\n\n".join("\n".join(table) for table in found if table)


def _first_token(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    arms = [arm for arm in OURS if any(arm in row["of_local"] for row in rows)] + _peers(rows)
    names = [OURS.get(arm, arm) for arm in arms]
    heads = [
        "memory tokens",
        "computed, ms",
        "vLLM's own hit, ms",
        *names,
        "host: times faster than computing",
    ]
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for row in rows:
        cells = [_count(row), _value(row["ms"]["computed"]), _value(row["ms"]["local"])]
        cells += [_value(row["of_local"][arm], 2) if arm in row["of_local"] else "–" for arm in arms]
        yield f"| {' | '.join(cells)} | {_value(row['times_faster']['host'])} |"


def _peers(rows: Sequence[Row]) -> list[str]:
    """Arms of other connectors, in the order of their names."""
    return sorted({arm for row in rows for arm in row["ms"]} - NAMES.keys())


def _short(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "| memory tokens | computed, ms | always put back: of computing | put back when faster |"
    yield "| --- " * 4 + "|"
    for row in rows:
        computed = row["ms"]["computed"]["median"]
        shares = [f"{row['ms'][arm]['median'] / computed:.2f}" for arm in ("host", "when faster")]
        yield f"| {_count(row)} | {_value(row['ms']['computed'])} | {' | '.join(shares)} |"


def _capture(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "| 16 chats at once | prompt tokens/s | of no connector | ms to first token | of no connector |"
    yield "| --- " * 5 + "|"
    for row in rows:
        yield (
            f"| {row['case']} | {_value(row['prompt_tokens_per_s'])}"
            f" | {_value(row['throughput_of_no_connector'], 3)} | {_value(row['ttft_ms'])}"
            f" | {_value(row['ttft_of_no_connector'], 3)} |"
        )


def _loading(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "| meanwhile | ms between tokens, p50: hits | loads | p99: hits | loads | p99, loads of hits |"
    yield "| --- " * 6 + "|"
    for row in rows:
        cells = [_value(row[share][arm], 1) for share in ("p50_ms", "p99_ms") for arm in ("hits", "loads")]
        yield f"| {row['case']} | {' | '.join(cells)} | {_value(row['p99_of_hits'], 2)} |"


def _agents(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield (
        "| agents at once | requests/s: computed | vLLM's own hits | ours from host | ours: of computed"
        " | ours: of the hits | ms to first token: hits | ours |"
    )
    yield "| --- " * 8 + "|"
    for row in rows:
        cells = [_value(row["requests_per_s"][arm], 2) for arm in ("computed", "local", "host")]
        cells += [_value(row["of_computed"]["host"], 1), _value(row["of_local"]["host"], 2)]
        cells += [_value(row["ttft_ms"][arm]) for arm in ("local", "host")]
        yield f"| {row['agents']} | {' | '.join(cells)} |"


def _scheduling(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "| call | plan and turn | ms, p50 | p99 | p99 of the thread's own time |"
    yield "| --- " * 5 + "|"
    for row in rows:
        call, _, told = row["case"].partition(": ")
        if call in CALLS:
            numbers = (row["ms"]["p50"], row["ms"]["p99"], row["own_ms"]["p99"])
            yield f"| `{CALLS[call]}` | {told} | {' | '.join(f'{one:.2f}' for one in numbers)} |"


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "| what | how much |"
    yield "| --- | --- |"
    for row in rows:
        if "beyond_budgets_mb" in row:
            for arm, most in row["beyond_budgets_mb"].items():
                yield f"| {row['case']}, beyond its budgets, {arm} | {most} MB (at most {row['most_mb']}) |"
        elif "mb" in row:
            yield f"| {row['case']} | {row['mb']} MB |"
        else:
            yield f"| {row['case']} | {row['bytes']:,.0f} bytes ({row['of_host']:.2f} of host) |"


def _growth(rows: Sequence[Row]) -> Iterator[str]:
    stretches = [row for row in rows if "turns" in row]
    if not stretches:
        return
    yield (
        "| turns | bytes a token: catalog | blobs beyond their KV | ms to store a turn, median | p99"
        " | of a plain write |"
    )
    yield "| --- " * 6 + "|"
    for row in stretches:
        beyond = row["bytes_per_token"]
        yield (
            f"| {row['turns']:,} | {beyond['catalog']:.0f} | {beyond['blobs beyond their KV']:.0f}"
            f" | {row['put_ms']['median']:.2f} | {row['put_p99_ms']:.2f} | {row['put_of_plain_write']:.1f} |"
        )


def _count(row: Row) -> str:
    return f"{int(row['case'].split()[0]):,}"


def _value(found: Mapping[str, float], digits: int = 0) -> str:
    """The median, and the quartiles around it."""
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f} to {found['q3']:.{digits}f})"


_PARTS = {
    "first token": _first_token,
    "peers": _first_token,
    "short memories": _short,
    "capture": _capture,
    "loading": _loading,
    "agents": _agents,
    "scheduler thread": _scheduling,
    "memory": _memory,
    "growth": _growth,
}
