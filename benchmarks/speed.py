"""How fast a running engine is with the plugin, against itself without it in the same run.

    python -m benchmarks.speed                 # all that needs nothing else installed, on an idle machine
    python -m benchmarks.speed --parts peers   # first tokens with other connectors beside; installs them
    python -m benchmarks.speed --quick         # three parts, and little of them; nothing is kept
    python -m benchmarks.speed --report --plot docs/speed.png    # tables of what was measured last

Results go to ``docs/speed.jsonl``, a JSON line a row. The model has Qwen2.5-0.5B's shape and random weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.engine_speed import (
    agents,
    capturing,
    engines,
    first_token,
    growth,
    loading,
    memory,
    models,
    plots,
    report,
    scheduling,
)
from benchmarks.peers import opening
from benchmarks.provenance import provenance

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "speed.jsonl"
SEARCHES = RESULTS.with_name("retrieval.jsonl")
MODEL = Path(__file__).resolve().parent.parent / "build" / "models" / "qwen-shape"

Part = Callable[[Path, Path], Iterator[dict[str, Any]]]

LENGTHS = (512, 1024, 2048, 4096, 8192)
SHORT_LENGTHS = (256, 32, 8)  # the first one finds engines that have just started
FULL: Mapping[str, Part] = {
    "first-token": lambda model, folder: first_token.measure(
        model, folder, lengths=LENGTHS, rounds=5, short=SHORT_LENGTHS, peers=opening.BUNDLED
    ),
    "peers": lambda model, folder: first_token.beside_peers(
        model, folder, lengths=LENGTHS, rounds=5, peers=opening.ALL
    ),
    "capture": lambda model, folder: capturing.measure(model, folder, num_requests=16, rounds=2),
    "loading": lambda model, folder: loading.measure(
        model, folder, plans=100, memory_tokens=4096, memories=25, rounds=1
    ),
    "agents": lambda model, folder: agents.measure(
        model, folder, counts=(1, 8, 64), memory_tokens=256, rounds=2
    ),
    "scheduling": lambda _, folder: scheduling.measure(folder, num_turns=100_000, num_waiting=1000),
    "memory": lambda model, folder: memory.measure(
        model, folder, host_bytes=72 << 20, warm_bytes=36 << 20, num_turns=12
    ),
    "growth": lambda _, folder: growth.measure(folder, counts=(100, 300, 1000, 3000, 10_000, 30_000)),
}
QUICK: Mapping[str, Part] = {
    "first-token": lambda model, folder: first_token.measure(
        model, folder, lengths=(512,), rounds=2, settings=first_token.FEW
    ),
    "peers": lambda model, folder: first_token.beside_peers(
        model, folder, lengths=(512,), rounds=2, peers=opening.ALL
    ),
    "capture": lambda model, folder: capturing.measure(model, folder, num_requests=4, rounds=2),
    "loading": lambda model, folder: loading.measure(
        model, folder, plans=8, memory_tokens=1024, memories=4, rounds=2
    ),
    "agents": lambda model, folder: agents.measure(model, folder, counts=(1, 4), memory_tokens=256, rounds=2),
    "scheduling": lambda _, folder: scheduling.measure(folder, num_turns=2000, num_waiting=200),
    "memory": lambda model, folder: memory.measure(
        model, folder, host_bytes=16 << 20, warm_bytes=8 << 20, num_turns=4
    ),
    "growth": lambda _, folder: growth.measure(folder, counts=(100, 300, 1000)),
}


# Peers have packages of their own to install, and take their time.
DEFAULT = tuple(part for part in FULL if part != "peers")
# Every engine takes 20 s to start on two cores; these need three of them.
QUICK_DEFAULT = ("first-token", "scheduling", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(FULL), help="by default all but peers, with --quick three"
    )
    parser.add_argument("--quick", action="store_true", help="for a look; results are not kept")
    parser.add_argument("--beside", default="nothing", help="what else the machine was doing, for the record")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--plot", type=Path, help="with --report: where to put the plot")
    args = parser.parse_args()
    if args.report:
        rows = report.latest(args.results)
        print(report.tables(rows))
        if args.plot:
            plots.plot(rows, report.latest_searches(SEARCHES), args.plot)
        return
    engines.pin_threads()
    model = models.make_qwen(MODEL)
    for part in args.parts or (QUICK_DEFAULT if args.quick else DEFAULT):
        with tempfile.TemporaryDirectory() as folder:
            for row in (QUICK if args.quick else FULL)[part](model, Path(folder)):
                print(json.dumps(row), flush=True)
                if not args.quick:
                    record = {"benchmark": "speed", **row, "beside": args.beside, "provenance": provenance()}
                    with args.results.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
