"""Table and plot of what ``benchmarks/reuse_quality.py`` measured.

    python -m benchmarks.reuse_report results.jsonl --plot docs/reuse.png

Prints one Markdown table a setting; of a setting that was measured more than once the last line counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTING = ("model", "task", "memories", "system", "before", "shuffled", "chunk_tokens", "cases")
COLUMNS = {
    "right": "right",
    "same_answer": "same answer",
    "agreed": "greedy tokens agreed",
    "logprob_difference": "logprob difference",
    "kl": "KL, nats",
    "computed": "memory tokens computed",
}

Row = dict[str, Any]
Found = dict[tuple[Any, ...], dict[str, Row]]  # setting -> way -> row


def read(lines: Iterable[str]) -> Found:
    found: Found = {}
    for line in lines:
        record: Row = json.loads(line)
        if record["benchmark"] == "reuse_quality":
            setting = tuple(record[name] for name in SETTING)
            found.setdefault(setting, {})[record["way"]] = record | {"computed": _computed_share(record)}
    return found


def table(ways: dict[str, Row]) -> str:
    """Ways in the order they were measured; a column that none of them has is left out."""
    names = [name for name in COLUMNS if any(name in row for row in ways.values())]
    rows = [["way", *(COLUMNS[name] for name in names)], ["---"] * (len(names) + 1)]
    for way, row in ways.items():
        rows.append([way, *(_cell(name, row) for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def title(setting: tuple[Any, ...]) -> str:
    named = dict(zip(SETTING, setting, strict=True))
    parts = [f"{named['model']}, {named['task']}: {named['memories']} memories, {named['cases']} cases"]
    if named["system"]:
        parts.append("a system prompt")
    if named["before"]:
        parts.append(f"computed behind {named['before']} turns")
    if named["shuffled"]:
        parts.append("in any order")
    if named["chunk_tokens"] != 256:
        parts.append(f"chunks of {named['chunk_tokens']} tokens")
    return ", ".join(parts)


def plot(found: Found, path: Path) -> None:
    """Share of answers, or of greedy tokens, that stay the same, by number of memories."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    tasks = list(dict.fromkeys((setting[0], setting[1]) for setting in found))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        plain = {s: ways for s, ways in found.items() if s[:2] == task and not any(s[3:6])}
        for way in dict.fromkeys(way for ways in plain.values() for way in ways):
            points = sorted(
                (setting[2], ways[way].get("same_answer", ways[way]["agreed"]))
                for setting, ways in plain.items()
                if way in ways
            )
            axes.plot(*zip(*points, strict=True), "o-", label=way)
        axes.set(xlabel="memories", ylabel="unchanged", title=", ".join(task), ylim=(0, 1.02), xscale="log")
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def _computed_share(record: Row) -> float:
    if not record["exact_tokens"] and not record["adapted_tokens"]:
        return 1.0
    return float(record["repaired_tokens"] / record["memory_tokens"])


def _cell(name: str, row: Row) -> str:
    if name not in row:
        return ""
    return f"{row[name]:.0%}" if name == "computed" else f"{row[name]:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = read(args.results.read_text(encoding="utf-8").splitlines())
    for setting, ways in found.items():
        print(f"{title(setting)}\n\n{table(ways)}\n")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
