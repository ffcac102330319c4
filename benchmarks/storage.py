"""How fast a store reads, writes, looks up and puts KV back, against the machine in the same run.

    python -m benchmarks.storage                  # everything; a catalog of a million chunks takes a while
    python -m benchmarks.storage --quick          # under a minute: less of everything, nothing is kept
    python -m benchmarks.storage --report         # Markdown tables of what was measured last

Results go to ``docs/storage.jsonl``, a JSON line a row. Times are of one thread unless a row says otherwise.
Files are made in ``--folder``, which has to be on the disk in question; a catalog that is there already is
used again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.storage_speed import cataloguing, injecting, reading, writing
from benchmarks.storage_speed.report import tables

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "storage.jsonl"

Part = Callable[[Path], Iterator[dict[str, Any]]]

FULL: Mapping[str, Part] = {
    "read": lambda folder: reading.measure(folder, rounds=9, total_bytes=512 << 20),
    "inject": lambda folder: injecting.measure(rounds=41),
    "put": lambda folder: writing.measure(folder, rounds=31),
    "catalog": lambda folder: cataloguing.measure(folder, num_chunks=1_000_000, calls=2000, openings=9),
}
QUICK: Mapping[str, Part] = {
    "read": lambda folder: reading.measure(folder, rounds=2, total_bytes=64 << 20),
    "inject": lambda folder: injecting.measure(rounds=3),
    "put": lambda folder: writing.measure(folder, rounds=3),
    "catalog": lambda folder: cataloguing.measure(folder, num_chunks=8000, calls=100, openings=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(FULL), default=tuple(FULL))
    parser.add_argument("--quick", action="store_true", help="for a look; results are not kept")
    parser.add_argument("--folder", type=Path, help="where files are made, by default a temporary folder")
    parser.add_argument("--beside", default="nothing", help="what else the machine was doing, for the record")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        print(tables(args.results))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for part in args.parts:
            for row in (QUICK if args.quick else FULL)[part](folder):
                print(json.dumps(row), flush=True)
                if not args.quick:
                    record = {
                        "benchmark": "storage",
                        **row,
                        "beside": args.beside,
                        "provenance": provenance(),
                    }
                    with args.results.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
