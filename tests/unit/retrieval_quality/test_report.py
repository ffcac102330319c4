"""The report holds the latest numbers of every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.retrieval_report import main, read


def line(corpus: str, **recall_at_5: float) -> str:
    methods = {
        name: {"all": {"recall@1": value / 2, "recall@5": value, "recall@10": value}, "direct": {}}
        for name, value in recall_at_5.items()
    }
    return json.dumps({"benchmark": "retrieval_quality", "corpus": corpus, "methods": methods})


def test_rows_are_methods_best_first_and_later_lines_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    other = json.dumps({"benchmark": "retrieval_scale", "chunks": 9})
    lines = [line("one", words=0.25, keys=0.5), other, line("two", words=0.75), line("one", keys=0.125)]
    results.write_text("\n".join(lines) + "\n")

    main([str(results), "--plot", str(tmp_path / "plot.png")])

    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| method | one: @1 / @5 / @10 | two")
    assert rows[2:] == [
        "| words | 0.125 / 0.250 / 0.250 | 0.375 / 0.750 / 0.750 |",
        "| keys | 0.062 / 0.125 / 0.125 |  |",
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert read([]) == {}
