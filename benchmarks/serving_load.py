"""How long a query takes while a crowd uses the server, beside the probe that it waits for.

    python -m benchmarks.serving_load             # 100 clients, 1,000 listeners, on a server of its own
    python -m benchmarks.serving_load --quick     # under a minute: less of everything, nothing is kept
    python -m benchmarks.serving_load --report    # a Markdown table of what was measured last

Results go to ``docs/serving.jsonl``, a JSON line a row. Clients and server share the machine, so what the
clients need is part of what is measured; their connections are kept. ``answer`` is until a client has its
answer, ``service`` the ``took_ms`` of that answer, ``probe`` its ``probe_ms``; between answer and service are
HTTP and, with more than 32 clients, waiting for a thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.serving_speed.crowd import Crowd, Member, allow_open_files
from benchmarks.serving_speed.measuring import measure
from benchmarks.serving_speed.server import Served, served

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "serving.jsonl"
MODEL = ROOT / "examples" / "models" / "recall"
NAMESPACES = ("north", "east", "south", "west")
OPEN_FILES = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="for a look; results are not kept")
    parser.add_argument("--seconds", type=float, default=20.0, help="that each row takes")
    parser.add_argument("--beside", default="nothing", help="what else the machine was doing, for the record")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        print("\n".join(table(args.results)))
        return
    allow_open_files(OPEN_FILES)
    with tempfile.TemporaryDirectory() as folder, served(MODEL, Path(folder), NAMESPACES) as server:
        for row in asyncio.run(_rows(server, 2.0 if args.quick else args.seconds, args.quick)):
            print(json.dumps(row), flush=True)
            if not args.quick:
                record = {"benchmark": "serving", **row, "beside": args.beside, "provenance": provenance()}
                with args.results.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(record) + "\n")


async def _rows(server: Served, seconds: float, is_quick: bool) -> list[dict[str, Any]]:
    levels, num_listeners = ((1, 8), 100) if is_quick else ((1, 16, 100), 1000)
    members = [
        Member(
            namespace=NAMESPACES[number % len(NAMESPACES)],
            key=server.keys[number % len(NAMESPACES)],
            user_id=f"user-{number}",
        )
        for number in range(levels[-1])
    ]
    async with Crowd.at(server.base_url) as crowd:
        rows: AsyncIterator[dict[str, Any]] = measure(
            crowd, members, levels=levels, num_listeners=num_listeners, seconds=seconds
        )
        return [row async for row in rows]


def table(results: Path) -> Iterator[str]:
    """The last row of each kind, p50 / p95 / p99 in milliseconds."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    with results.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows[row["part"], row["mode"], row["clients"]] = row
    yield "| `/memory/query` | clients | a second | answer, ms | service, ms | probe, ms |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows.values():
        what = row["mode"]
        if chats := row.get("chats"):
            what += f", beside {chats['clients']} chatting clients"
        times = " | ".join(_written(row[name]) for name in ("answer_ms", "service_ms", "probe_ms"))
        yield f"| {what} | {row['clients']} | {row['per_s']:.0f} | {times} |"
        if chats:
            answered = _written(chats["answer_ms"])
            yield f"| (those chats) | {chats['clients']} | {chats['per_s']:.0f} | {answered} | | |"


def _written(times: dict[str, float]) -> str:
    return " / ".join(f"{value:.0f}" for value in times.values()) if any(times.values()) else "none"


if __name__ == "__main__":
    main()
