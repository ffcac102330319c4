"""The report says what the lines say, the latest of each."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.reuse_report import plot, read, table, title


def line(way: str, *, memories: int = 5, right: float = 0.5, **changes: object) -> str:
    record = {
        "benchmark": "reuse_quality", "model": "m", "task": "recall", "memories": memories, "cases": 9,
        "system": None, "before": 0, "shuffled": False, "chunk_tokens": 256, "way": way, "right": right,
        "same_answer": 1.0, "agreed": 1.0, "exact_tokens": 10, "adapted_tokens": 70, "memory_tokens": 80,
        "repaired_tokens": 8,
    }  # fmt: skip
    return json.dumps(record | changes)


def test_a_table_has_the_latest_row_of_each_way_and_only_filled_columns() -> None:
    lines = [
        line("computed", exact_tokens=0, adapted_tokens=0, repaired_tokens=0),
        line("adapted", right=0.1),
        json.dumps({"benchmark": "another"}),
        line("adapted", right=0.4),
    ]
    ((setting, ways),) = read(lines).items()
    assert title(setting) == "m, recall: 5 memories, 9 cases"
    assert table(ways).splitlines() == [
        "| way | right | same answer | greedy tokens agreed | memory tokens computed |",
        "| --- | --- | --- | --- | --- |",
        "| computed | 0.5 | 1 | 1 | 100% |",
        "| adapted | 0.4 | 1 | 1 | 10% |",
    ]


def test_settings_stand_apart_and_are_drawn(tmp_path: Path) -> None:
    changed = {"system": "Be brief.", "before": 3, "shuffled": True, "chunk_tokens": 32}
    found = read([line("a"), line("a", memories=20), line("a", **changed)])
    assert [title(setting).partition("cases")[2] for setting in found] == [
        "",
        "",
        ", a system prompt, computed behind 3 turns, in any order, chunks of 32 tokens",
    ]
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
