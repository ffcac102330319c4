"""The report says what the lines say, the latest of each."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.reuse.settings import Setting
from benchmarks.reuse_report import (
    DOCUMENT_COLUMNS,
    PRODUCT_COLUMNS,
    document_title,
    overview,
    plot,
    product_title,
    read,
    read_documents,
    read_product,
    table,
    title,
)


def line(way: str, *, right: float = 0.5, setting: Setting | None = None, **changes: object) -> str:
    record = {
        "benchmark": "reuse_quality", "model": "m", **asdict(setting or Setting(memories=5, cases=9)),
        "way": way, "right": right, "same_answer": 1.0, "agreed": 1.0, "exact_tokens": 10,
        "adapted_tokens": 70, "memory_tokens": 80, "repaired_tokens": 8,
    }  # fmt: skip
    return json.dumps(record | changes)


def test_a_table_has_the_latest_row_of_each_way_and_only_filled_columns() -> None:
    lines = [
        line("computed", exact_tokens=0, adapted_tokens=0, repaired_tokens=0),
        line("adapted", right=0.1),
        json.dumps({"benchmark": "another"}),
        line("adapted", right=0.4),
    ]
    ((measured, ways),) = read(lines).items()
    assert title(measured) == "m, recall: 5 memories, 9 cases"
    assert table(ways).splitlines() == [
        "| way | right | same answer | greedy tokens agreed | memory tokens computed |",
        "| --- | --- | --- | --- | --- |",
        "| computed | 0.5 | 1 | 1 | 100% |",
        "| adapted | 0.4 | 1 | 1 | 10% |",
    ]


def test_settings_stand_apart_and_are_drawn(tmp_path: Path) -> None:
    changed = Setting(
        memories=5, system="Be brief.", before_tokens=3, filler_tokens=7, shuffled=True, chunk_tokens=32
    )
    many = Setting(memories=20, facts_per_memory=4, story_tokens=99)
    found = read([line("a"), line("a", setting=many), line("a", setting=changed)])
    assert [title(measured).partition("cases")[2] for measured in found] == [
        "",
        ", 4 facts each, 99 tokens each",
        ", a system prompt, computed behind 3 tokens, put back behind 7 other tokens, in any order, "
        "chunks of 32 tokens",
    ]
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_lines_from_before_a_setting_was_added_have_its_default() -> None:
    record = json.loads(line("a"))
    for name in ("filler_tokens", "facts_per_memory", "story_tokens"):
        del record[name]
    assert read([json.dumps(record)]).keys() == read([line("a")]).keys()


def test_qualities_have_a_table_of_their_own() -> None:
    record = {"benchmark": "reuse_product", "model": "m", "memories": 5, "cases": 9, "agents": 3}
    lines = [line("a"), *(json.dumps(record | {"quality": q, "requests": 2.0, "exact": 0.25}) for q in "ab")]
    ((product, rows),) = read_product(lines).items()
    assert product_title(product) == "m, AgentMemory: 5 memories of 3 other agents, 9 cases"
    assert table(rows, PRODUCT_COLUMNS, "quality").splitlines() == [
        "| quality | prompt exact | requests |",
        "| --- | --- | --- |",
        "| a | 25% | 2 |",
        "| b | 25% | 2 |",
    ]


def test_documents_have_a_table_of_their_own() -> None:
    record = {"benchmark": "reuse_documents", "model": "m", "facts_per_document": 20, "cases": 9}
    lines = [line("a"), *(json.dumps(record | {"quality": q, "reused": 0.5, "ms": 2.0}) for q in "ab")]
    ((documents, rows),) = read_documents(lines).items()
    assert document_title(documents) == "m, two documents of 20 facts in a question, 9 cases"
    assert table(rows, DOCUMENT_COLUMNS, "quality").splitlines() == [
        "| quality | reused | ms to the first token |",
        "| --- | --- | --- |",
        "| a | 50% | 2 |",
        "| b | 50% | 2 |",
    ]


def test_the_overview_has_a_row_for_each_setting_of_a_task() -> None:
    shuffled = Setting(memories=5, cases=9, shuffled=True)
    stories = Setting(task="stories", memories=2, cases=9)
    lines = [
        line("computed", exact_tokens=0, adapted_tokens=0, right=1.0),
        line("links"),
        line("links", setting=shuffled, repaired_tokens=0, same_answer=0.75),
        line("links", setting=stories),
    ]
    assert overview(read(lines), "recall").splitlines() == [
        "| setting | computed | links |",
        "| --- | --- | --- |",
        "| m, recall: 5 memories, 9 cases | 1.000, 1.000 | 0.500, 1.000 (10%) |",
        "| m, recall: 5 memories, 9 cases, in any order |  | 0.500, 0.750 |",
    ]
