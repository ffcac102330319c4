"""Tables and plot of what ``benchmarks/reuse_quality.py``, ``_product.py`` and ``_documents.py`` measured.

    python -m benchmarks.reuse_report results.jsonl --plot docs/reuse.png

Prints one Markdown table a setting; of a setting that was measured more than once the last line counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.reuse.settings import Setting

COLUMNS = {
    "right": "right",
    "same_answer": "same answer",
    "agreed": "greedy tokens agreed",
    "logprob_difference": "logprob difference",
    "kl": "KL, nats",
    "repaired": "memory tokens computed",
}
PRODUCT_COLUMNS = {
    "right": "right",
    "same_answer": "same answer",
    "exact": "prompt exact",
    "adapted": "adapted",
    "local": "local",
    "computed": "computed",
    "repaired_tokens": "memory tokens computed before",
    "requests": "requests",
    "requests_repeated": "repeated",
    "ms": "ms to the first token",
    "ms_repeated": "repeated",
}
DOCUMENT_COLUMNS = {
    "right": "right",
    "same_answer": "same answer",
    "prompt_tokens": "prompt tokens",
    "reused": "reused",
    "adapted": "of these moved",
    "reused_again": "reused again",
    "requests": "requests",
    "requests_again": "again",
    "ms": "ms to the first token",
    "ms_again": "again",
}
_SHARES = {"reused", "reused_again", "repaired", "exact", "adapted", "local", "computed"}

T = TypeVar("T", "Product", "Documents")
Row = dict[str, Any]
Rows = dict[str, Row]  # by way or quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model in one setting of ``reuse_quality``."""

    model: str
    setting: Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A model in one setting of ``reuse_product``."""

    model: str
    memories: int
    cases: int
    agents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """A model in one setting of ``reuse_documents``."""

    model: str
    facts_per_document: int
    cases: int


def read(lines: Iterable[str]) -> dict[Measured, Rows]:
    """Lines of an older harness lack what was added since; it has its default there."""
    found: dict[Measured, Rows] = {}
    for record in map(json.loads, lines):
        if record["benchmark"] == "reuse_quality":
            values = {field.name: record[field.name] for field in fields(Setting) if field.name in record}
            measured = Measured(model=record["model"], setting=Setting(**values))
            row = record | {"repaired": _repaired_share(record)}
            found.setdefault(measured, {})[record["way"]] = row
    return found


def read_product(lines: Iterable[str]) -> dict[Product, Rows]:
    return _by_quality(lines, "reuse_product", Product)


def read_documents(lines: Iterable[str]) -> dict[Documents, Rows]:
    return _by_quality(lines, "reuse_documents", Documents)


def _by_quality(lines: Iterable[str], benchmark: str, kind: type[T]) -> dict[T, Rows]:
    found: dict[T, Rows] = {}
    for record in map(json.loads, lines):
        if record["benchmark"] == benchmark:
            setting = kind(**{name: record[name] for name in kind.__dataclass_fields__})
            found.setdefault(setting, {})[record["quality"]] = record
    return found


def table(rows: Rows, columns: Mapping[str, str] = COLUMNS, first: str = "way") -> str:
    """Rows in the order they were measured; a column that none of them has is left out."""
    names = [name for name in columns if any(name in row for row in rows.values())]
    cells = [[first, *(columns[name] for name in names)], ["---"] * (len(names) + 1)]
    for way, row in rows.items():
        cells.append([way, *(_cell(name, row) for name in names)])
    return "\n".join(f"| {' | '.join(each)} |" for each in cells)


def overview(found: Mapping[Measured, Rows], task: str) -> str:
    """All settings of a task in one table: a column for each way."""
    settings = {one: rows for one, rows in found.items() if one.setting.task == task}
    ways = list(dict.fromkeys(way for rows in settings.values() for way in rows))
    cells = [["setting", *ways], ["---"] * (len(ways) + 1)]
    for one, rows in settings.items():
        cells.append([title(one), *(_unchanged(rows[way]) if way in rows else "" for way in ways)])
    return "\n".join(f"| {' | '.join(each)} |" for each in cells)


def _unchanged(row: Row) -> str:
    """Right answers and those like computing's, or the greedy tokens agreed; and what it computed of them."""
    shown = f"{row['agreed']:.2f}"
    if "right" in row:
        shown = f"{row['right']:.3f}, {row['same_answer']:.3f}"
    return f"{shown} ({row['repaired']:.0%})" if 0 < row["repaired"] < 1 else shown


def title(measured: Measured) -> str:
    setting = measured.setting
    parts = [f"{measured.model}, {setting.task}: {setting.memories} memories, {setting.cases} cases"]
    if setting.system:
        parts.append("a system prompt")
    if setting.before_tokens:
        parts.append(f"computed behind {setting.before_tokens} tokens")
    if setting.filler_tokens:
        parts.append(f"put back behind {setting.filler_tokens} other tokens")
    if setting.shuffled:
        parts.append("in any order")
    if setting.facts_per_memory != 1:
        parts.append(f"{setting.facts_per_memory} facts each")
    if setting.story_tokens != 48:
        parts.append(f"{setting.story_tokens} tokens each")
    if setting.chunk_tokens != 256:
        parts.append(f"chunks of {setting.chunk_tokens} tokens")
    return ", ".join(parts)


def product_title(product: Product) -> str:
    return (
        f"{product.model}, AgentMemory: {product.memories} memories of {product.agents} other agents, "
        f"{product.cases} cases"
    )


def document_title(documents: Documents) -> str:
    return (
        f"{documents.model}, two documents of {documents.facts_per_document} facts in a question, "
        f"{documents.cases} cases"
    )


def plot(found: Mapping[Measured, Rows], path: Path) -> None:
    """Share of answers, or of greedy tokens, that stay the same, by number of memories."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    plain = {one: rows for one, rows in found.items() if one.setting == _plain(one.setting)}
    tasks = list(dict.fromkeys((one.model, one.setting.task) for one in plain))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        of_task = {one: rows for one, rows in plain.items() if (one.model, one.setting.task) == task}
        for way in dict.fromkeys(way for rows in of_task.values() for way in rows):
            points = sorted(
                (one.setting.memories, rows[way].get("same_answer", rows[way]["agreed"]))
                for one, rows in of_task.items()
                if way in rows
            )
            axes.plot(*zip(*points, strict=True), "o-", label=way)
        axes.set(xlabel="memories", ylabel="unchanged", title=", ".join(task), ylim=(0, 1.02), xscale="log")
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def _plain(setting: Setting) -> Setting:
    return Setting(task=setting.task, memories=setting.memories, cases=setting.cases)


def _repaired_share(record: Row) -> float:
    if record["way"] == "no memory":
        return 0.0
    if not record["exact_tokens"] and not record["adapted_tokens"]:
        return 1.0
    return float(record["repaired_tokens"] / record["memory_tokens"])


def _cell(name: str, row: Row) -> str:
    if name not in row:
        return ""
    return f"{row[name]:.0%}" if name in _SHARES else f"{row[name]:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    lines = args.results.read_text(encoding="utf-8").splitlines()
    found = read(lines)
    for task in dict.fromkeys(one.setting.task for one in found):
        print(f"{overview(found, task)}\n")
    for measured, rows in found.items():
        print(f"{title(measured)}\n\n{table(rows)}\n")
    for product, rows in read_product(lines).items():
        print(f"{product_title(product)}\n\n{table(rows, PRODUCT_COLUMNS, 'quality')}\n")
    for documents, rows in read_documents(lines).items():
        print(f"{document_title(documents)}\n\n{table(rows, DOCUMENT_COLUMNS, 'quality')}\n")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
