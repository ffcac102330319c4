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
_HEAD_LINES = 2  # of a table; one that has no more is left out
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
    return "\n\n".join("\n".join(table) for table in found if len(table) > _HEAD_LINES)


def _first_token(rows: Sequence[Row]) -> Iterator[str]:
    arms = [arm for arm in OURS if any(arm in row["of_local"] for row in rows)] + _peers(rows)
    names = [OURS.get(arm, arm) for arm in arms]
    yield from _head(
        "memory tokens",
        "computed, ms",
        "vLLM's own hit, ms",
        *names,
        "host: times faster than computing",
    )
    for row in rows:
        cells = [_count(row), _value(row["ms"]["computed"]), _value(row["ms"]["local"])]
        cells += [_value(row["of_local"][arm], 2) if arm in row["of_local"] else "–" for arm in arms]
        yield _line(*cells, _value(row["times_faster"]["host"]))


def _peers(rows: Sequence[Row]) -> list[str]:
    """Arms of other connectors, in the order of their names."""
    return sorted({arm for row in rows for arm in row["ms"]} - NAMES.keys())


def _beside_peers(rows: Sequence[Row]) -> Iterator[str]:
    yield from _head(
        "memory tokens",
        "peer",
        "vLLM's own hit, ms",
        "peer: of the hit",
        "host",
        "disk, cold",
        "host: of the peer",
    )
    for row in rows:
        if "host_of_peer" in row:
            arms = (row["peer"], "host", "disk")
            ratios = [*(row["of_local"][arm] for arm in arms), row["host_of_peer"]]
            hit = _value(row["ms"]["local"])
            yield _line(_count(row), row["peer"], hit, *(_value(one, 2) for one in ratios))


def _short(rows: Sequence[Row]) -> Iterator[str]:
    yield from _head("memory tokens", "computed, ms", "always put back: of computing", "put back when faster")
    for row in rows:
        computed = row["ms"]["computed"]["median"]
        shares = [f"{row['ms'][arm]['median'] / computed:.2f}" for arm in ("host", "when faster")]
        yield _line(_count(row), _value(row["ms"]["computed"]), *shares)


def _capture(rows: Sequence[Row]) -> Iterator[str]:
    of_none = "of no connector"
    yield from _head("16 chats at once", "prompt tokens/s", of_none, "ms to first token", of_none)
    for row in rows:
        yield _line(
            row["case"],
            _value(row["prompt_tokens_per_s"]),
            _value(row["throughput_of_no_connector"], 3),
            _value(row["ttft_ms"]),
            _value(row["ttft_of_no_connector"], 3),
        )


def _loading(rows: Sequence[Row]) -> Iterator[str]:
    measures = {"mean_ms": "mean", "p50_ms": "p50", "p99_ms": "p99"}
    named = [column for name in measures.values() for column in (f"{name}: hits", "loads")]
    yield from _head("ms between tokens", *named, "p99, loads of hits")
    for row in rows:
        cells = [_value(row[measure][arm], 1) for measure in measures for arm in ("hits", "loads")]
        yield _line(row["case"], *cells, _value(row["p99_of_hits"], 2))


def _agents(rows: Sequence[Row]) -> Iterator[str]:
    yield from _head(
        "agents at once",
        "requests/s: computed",
        "vLLM's own hits",
        "ours from host",
        "ours: of computed",
        "ours: of the hits",
        "ms to first token: hits",
        "ours",
    )
    for row in rows:
        cells = [_value(row["requests_per_s"][arm], 2) for arm in ("computed", "local", "host")]
        cells += [_value(row["of_computed"]["host"], 1), _value(row["of_local"]["host"], 2)]
        cells += [_value(row["ttft_ms"][arm]) for arm in ("local", "host")]
        yield _line(str(row["agents"]), *cells)


def _scheduling(rows: Sequence[Row]) -> Iterator[str]:
    yield from _head("call", "plan and turn", "ms, p50", "p99", "p99 of the thread's own time")
    for row in rows:
        call, _, told = row["case"].partition(": ")
        if call in CALLS:
            numbers = (row["ms"]["p50"], row["ms"]["p99"], row["own_ms"]["p99"])
            yield _line(f"`{CALLS[call]}`", told, *(f"{one:.2f}" for one in numbers))


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    yield from _head("what", "how much")
    for row in rows:
        if "beyond_budgets_mb" in row:
            for arm, most in row["beyond_budgets_mb"].items():
                beyond = f"{row['case']}, beyond its budgets, {arm}"
                yield _line(beyond, f"{most} MB (at most {row['most_mb']})")
        elif "mb" in row:
            yield _line(row["case"], f"{row['mb']} MB")
        else:
            yield _line(row["case"], f"{row['bytes']:,.0f} bytes ({row['of_host']:.2f} of host)")


def _growth(rows: Sequence[Row]) -> Iterator[str]:
    yield from _head(
        "turns",
        "bytes a token: catalog",
        "blobs beyond their KV",
        "ms to store a turn, median",
        "p99",
        "of a plain write",
    )
    for row in rows:
        if "turns" in row:
            beyond = row["bytes_per_token"]
            yield _line(
                f"{row['turns']:,}",
                f"{beyond['catalog']:.0f}",
                f"{beyond['blobs beyond their KV']:.0f}",
                f"{row['put_ms']['median']:.2f}",
                f"{row['put_p99_ms']:.2f}",
                f"{row['put_of_plain_write']:.1f}",
            )


def _head(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield "| --- " * len(names) + "|"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _count(row: Row) -> str:
    return f"{int(row['case'].split()[0]):,}"


def _value(found: Mapping[str, float], digits: int = 0) -> str:
    """The median, and the quartiles around it."""
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f} to {found['q3']:.{digits}f})"


_PARTS = {
    "first token": _first_token,
    "peers": _beside_peers,
    "short memories": _short,
    "capture": _capture,
    "loading": _loading,
    "agents": _agents,
    "scheduler thread": _scheduling,
    "memory": _memory,
    "growth": _growth,
}
