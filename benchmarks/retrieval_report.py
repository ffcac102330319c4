"""Table and plot of what ``benchmarks/retrieval_quality.py`` measured.

    python -m benchmarks.retrieval_report results.jsonl --plot docs/retrieval.png

Prints a Markdown table of recall@5 and recall@10, one row a method and one column a corpus; of a corpus that
was measured more than once the last line counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

METRICS = ("recall@1", "recall@5", "recall@10")

Found = dict[str, dict[str, dict[str, float]]]  # corpus -> method -> metrics


def read(lines: Iterable[str]) -> Found:
    """The latest measurement of each corpus and method."""
    found: Found = {}
    for line in lines:
        record: dict[str, Any] = json.loads(line)
        if record["benchmark"] == "retrieval_quality":
            methods = {name: groups["all"] for name, groups in record["methods"].items()}
            found.setdefault(record["corpus"], {}).update(methods)
    return found


def table(found: Found) -> str:
    """Methods by their mean recall@5 over the corpora, best first."""
    corpora = list(found)
    rows = [
        ["method", *(f"{corpus}: @1 / @5 / @10" for corpus in corpora)],
        ["---", *("---" for _ in corpora)],
    ]
    for method in ranked(found):
        cells = [
            " / ".join(f"{found[corpus][method][metric]:.3f}" for metric in METRICS)
            if method in found[corpus]
            else ""
            for corpus in corpora
        ]
        rows.append([method, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ranked(found: Found) -> list[str]:
    def mean(method: str) -> float:
        values = [methods[method]["recall@5"] for methods in found.values() if method in methods]
        return sum(values) / len(values)

    return sorted({method for methods in found.values() for method in methods}, key=mean, reverse=True)


def plot(found: Found, path: Path) -> None:
    """Recall@5 as bars, methods below each other, one bar a corpus."""
    from matplotlib.figure import Figure

    methods, corpora = ranked(found)[::-1], list(found)
    figure = Figure(figsize=(9, 1 + 0.42 * len(methods)), layout="constrained")
    axes = figure.add_subplot(xlabel="recall@5", xlim=(0, 1))
    height = 0.8 / len(corpora)
    for number, corpus in enumerate(corpora):
        values = [found[corpus].get(method, {}).get("recall@5", 0.0) for method in methods]
        places = [row + 0.4 - height * (number + 0.5) for row in range(len(methods))]
        axes.barh(places, values, height, label=corpus)
    axes.set_yticks(range(len(methods)), labels=methods)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, help="image to write")
    args = parser.parse_args(arguments)
    found = read(args.results.read_text(encoding="utf-8").splitlines())
    print(table(found))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
