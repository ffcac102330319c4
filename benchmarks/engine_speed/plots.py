"""Plots of what ``benchmarks.speed`` and ``benchmarks.retrieval_scale`` measured: how each thing grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_speed.report import NAMES

Row = Mapping[str, Any]


def plot(rows: Sequence[Row], searches: Sequence[Row], path: Path) -> None:
    """Time to first token, throughput, a store's growth and searching, each against what it grows with."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    parts: list[tuple[Callable[[Any, Sequence[Row]], None], Sequence[Row]]] = [
        (_first_token, [row for row in rows if row["part"] == "first token"]),
        (_agents, [row for row in rows if row["part"] == "agents"]),
        (_growth, [row for row in rows if row["part"] == "growth" and "turns" in row]),
        (_searching, [row for row in searches if "chunks" in row]),
    ]
    for one, (draw, found) in zip(axes.flat, parts, strict=True):
        if found:
            one.set_xscale("log", base=2 if draw in (_first_token, _agents) else 10)
            one.set_yscale("log")
            draw(one, found)
            one.grid(visible=True, which="both", alpha=0.3)
            one.legend(fontsize=8)
        else:
            one.set_axis_off()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def _first_token(axes: Any, rows: Sequence[Row]) -> None:
    found = sorted((int(row["case"].split()[0]), row) for row in rows)
    arms = list(NAMES) + sorted({arm for _, row in found for arm in row["ms"]} - NAMES.keys())
    for arm in arms:
        points = [(length, row["ms"][arm]["median"]) for length, row in found if arm in row["ms"]]
        axes.plot(*zip(*points, strict=True), marker="o", label=NAMES.get(arm, arm))
    axes.set_xticks([length for length, _ in found], [f"{length:,}" for length, _ in found])
    axes.set_xlabel("memory tokens before a turn of 32")
    axes.set_ylabel("ms to the first token")


def _agents(axes: Any, rows: Sequence[Row]) -> None:
    counts = [row["agents"] for row in rows]
    for arm in ("computed", "local", "host"):
        axes.plot(
            counts, [row["requests_per_s"][arm]["median"] for row in rows], marker="o", label=NAMES[arm]
        )
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel(f"agents at once, {rows[0]['memory_tokens']:,} memory tokens each")
    axes.set_ylabel("requests a second")


def _growth(axes: Any, rows: Sequence[Row]) -> None:
    counts = [row["turns"] for row in rows]
    axes.plot(counts, [row["put_ms"]["median"] for row in rows], marker="o", label="ms to store a turn")
    axes.plot(counts, [row["catalog_bytes"] / 1e6 for row in rows], marker="o", label="MB of catalog")
    axes.plot(counts, [row["blob_bytes"] / 1e6 for row in rows], marker="o", label="MB of blobs")
    axes.set_xlabel("turns of 48 tokens in the store")


def _searching(axes: Any, rows: Sequence[Row]) -> None:
    counts = [row["chunks"] for row in rows]
    axes.plot(counts, [row["search_ms_p50"] for row in rows], marker="o", label="search, p50")
    axes.plot(counts, [row["search_ms_p99"] for row in rows], marker="o", label="search, p99")
    axes.plot(counts, [row["added_ms_p50"] for row in rows], marker="o", label="of that not FAISS, p50")
    axes.set_xlabel("chunks searched, 1,024 values each")
    axes.set_ylabel("ms")
