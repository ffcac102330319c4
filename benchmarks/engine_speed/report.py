"""Tables and a plot of what ``benchmarks.speed`` measured; of a row that is there twice the last counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

ARMS = ("computed", "local", "host", "warm", "disk", "ExampleConnector")
NAMES = {
    "computed": "computed",
    "local": "vLLM's own hit",
    "host": "from host",
    "warm": "from warm",
    "disk": "from disk, cold",
    "ExampleConnector": "vLLM's ExampleConnector",
}


def latest(results: Path) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    with results.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows[row["part"], row["case"]] = row
    return list(rows.values())


def tables(rows: Sequence[Row]) -> str:
    """Every table, with what it says in its head."""
    found = (list(part([row for row in rows if row["part"] == name])) for name, part in _PARTS.items())
    return "\n\n".join("\n".join(table) for table in found if table)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time to first token against memory tokens, both axes logarithmic."""
    import matplotlib.pyplot as plt

    found = sorted((int(row["case"].split()[0]), row) for row in rows if row["part"] == "first token")
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for arm in ARMS:
        lengths = [length for length, row in found if arm in row["ms"]]
        axes.plot(lengths, [row["ms"][arm]["median"] for _, row in found], marker="o", label=NAMES[arm])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([length for length, _ in found], [f"{length:,}" for length, _ in found])
    axes.set_xlabel("memory tokens before a turn of 32")
    axes.set_ylabel("ms to the first token")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _first_token(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield (
        "| memory tokens | computed, ms | vLLM's own hit, ms | host: of the hit | warm | disk, cold"
        " | ExampleConnector | host: times faster than computing |"
    )
    yield "| --- " * 8 + "|"
    for row in rows:
        cells = [
            f"{int(row['case'].split()[0]):,}",
            _value(row["ms"]["computed"]),
            _value(row["ms"]["local"]),
        ]
        cells += [_value(row["of_local"][arm], 2) for arm in ("host", "warm", "disk", "ExampleConnector")]
        yield f"| {' | '.join(cells)} | {_value(row['times_faster']['host'])} |"


def _short(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "| memory tokens | computed, ms | always put back: of computing | put back when faster |"
    yield "| --- " * 4 + "|"
    for row in rows:
        computed = row["ms"]["computed"]["median"]
        shares = [f"{row['ms'][arm]['median'] / computed:.2f}" for arm in ("host", "when faster")]
        yield f"| {int(row['case'].split()[0]):,} | {_value(row['ms']['computed'])} | {' | '.join(shares)} |"


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


def _value(found: Mapping[str, float], digits: int = 0) -> str:
    """The median, and the quartiles around it."""
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f} to {found['q3']:.{digits}f})"


_PARTS = {"first token": _first_token, "short memories": _short, "capture": _capture, "loading": _loading}
