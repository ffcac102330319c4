"""The ``kv-agent`` command: look at a store, check it, and forget memories. Needs no engine."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from kv_agent.chunks import ChunkRecord, Scope, TurnId, TurnRecord
from kv_agent.config import STORE_ENV, default_store_dir
from kv_agent.errors import ConfigError, KVAgentError
from kv_agent.storage.store import LocalStore

_TEXT_WIDTH = 60


class Report(NamedTuple):
    """What a command prints, and its exit code."""

    lines: Sequence[str]
    exit_code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit code; trouble is one sentence on standard error and code 1."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal can show every memory
    try:
        store = _open_store(getattr(args, "store", None) or default_store_dir())
        try:
            store.forget_expired(time.time())
            report: Report = args.command(store, args)
        finally:
            store.close()
    except KVAgentError as err:
        print(f"kv-agent: {_printable(str(err))}", file=sys.stderr)
        return 1
    try:
        print(*report.lines, sep="\n", flush=True)
    except BrokenPipeError:  # the reader has seen enough; Python must not flush the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return report.exit_code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--version", action="version", version=f"kv-agent {_version()}")
    text = f"the store's folder (default: {STORE_ENV}, or kv_agent in the cache folder)"
    common.add_argument("--store", type=lambda path: Path(path).expanduser(), metavar="DIR", help=text)
    parser = argparse.ArgumentParser(prog="kv-agent", description=__doc__, parents=[common])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., Report], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(command=command)
        return sub

    stats = add("stats", _stats, "count memories, chunks, tokens and bytes of all users")
    ls = add("ls", _ls, "list one user's memories, newest first")
    show = add("show", _show, "show one memory: its text, whose it is and its chunks")
    add("verify", _verify, "read every chunk and compare files with catalog; exit code 1 on problems")
    forget = add("forget", _forget, "delete memories and the bytes that only they use")

    for name in ("namespace", "user"):
        ls.add_argument(f"--{name}", default="default", metavar="NAME", help="default: %(default)s")
    for name in ("agent", "session"):
        ls.add_argument(f"--{name}", metavar="NAME", help=f"only this {name}'s memories")
    ls.add_argument("--limit", type=int, default=20, metavar="N", help="default: %(default)s")
    show.add_argument("ids", nargs=1, metavar="MEMORY_ID")
    forget.add_argument("ids", nargs="+", metavar="MEMORY_ID")
    for sub in (stats, ls, show):
        sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _stats(store: LocalStore, args: argparse.Namespace) -> Report:
    counts = store.catalog.stats()
    if args.json:
        return _json(counts)
    chunks = f"{counts['chunks']:,} ({counts['entries']:,} searchable, {counts['quarantined']:,} quarantined)"
    rows = [("turns", f"{counts['turns']:,}"), ("chunks", chunks), ("tokens", f"{counts['tokens']:,}")]
    return Report(_table(*rows, ("size", _size(counts["bytes"]))))


def _ls(store: LocalStore, args: argparse.Namespace) -> Report:
    if args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    scope = Scope(namespace=args.namespace, user_id=args.user, agent_id=args.agent, session_id=args.session)
    found = store.catalog.list_turns(scope, limit=args.limit + 1)
    turns = found[: args.limit]
    if args.json:
        return _json([_memory(turn) for turn in turns])
    if not turns:
        wanted = ", ".join(f"{key} {value}" for key, value in asdict(scope).items() if value)
        return Report([_printable(f"no memories with {wanted}")])
    rows = [
        (t.turn_id, _age(t), f"{t.num_tokens:,}", t.scope.agent_id, t.scope.session_id, _excerpt(t))
        for t in turns
    ]
    more = ["older ones are not shown; raise --limit"] if len(found) > len(turns) else []
    return Report([*_table(("ID", "AGE", "TOKENS", "AGENT", "SESSION", "TEXT"), *rows), *more])


def _show(store: LocalStore, args: argparse.Namespace) -> Report:
    (turn,) = _known_turns(store, args.ids)
    records = store.catalog.chunks(turn.chunk_keys)
    chunks = [records[key] for key in turn.chunk_keys if key in records]
    if args.json:
        return _json({**_memory(turn), "chunks": [asdict(chunk) for chunk in chunks]})
    end = [] if turn.expires is None else [("expires", _date(turn.expires))]
    facts = _table(
        ("id", turn.turn_id),
        *asdict(turn.scope).items(),
        ("created", f"{_date(turn.created)} ({_age(turn)} ago)"),
        *end,
        ("model", turn.fingerprint),
        ("metadata", json.dumps(dict(turn.metadata), ensure_ascii=False)),
        ("size", f"{turn.num_tokens:,} tokens, {_size(sum(chunk.num_bytes for chunk in chunks))}"),
    )
    rows = [
        (c.key, f"{c.start}-{c.start + c.num_tokens}", c.num_tokens, _size(c.num_bytes), _state(c))
        for c in chunks
    ]
    table = _table(("CHUNK", "POSITIONS", "TOKENS", "SIZE", "STATE"), *rows)
    return Report([*facts, "", *map(_printable, turn.text.splitlines()), "", *table])


def _verify(store: LocalStore, args: argparse.Namespace) -> Report:
    if problems := store.check():
        return Report([*map(_printable, problems), f"problems: {len(problems)}"], exit_code=1)
    counts = store.catalog.stats()
    healthy = counts["chunks"] - counts["quarantined"]
    return Report([f"{healthy:,} chunks are fine ({counts['quarantined']:,} quarantined ones were not read)"])


def _forget(store: LocalStore, args: argparse.Namespace) -> Report:
    turns = {turn.turn_id: turn for turn in _known_turns(store, args.ids)}
    before = store.catalog.chunks(store.catalog.chunk_keys_of_turns(turns))
    store.forget(turns)
    gone = before.keys() - store.catalog.chunks(before).keys()
    freed = _size(sum(before[key].num_bytes for key in gone))
    forgotten = _table(*(("forgot", turn.turn_id, _excerpt(turn)) for turn in turns.values()))
    return Report([*forgotten, f"{len(gone):,} chunks deleted, {freed} freed"])


def _open_store(root: Path) -> LocalStore:
    if not os.path.isfile(root / "catalog.sqlite3"):  # opening it would create one
        raise ConfigError(f"there is no store in {root}; name its folder with --store or {STORE_ENV}")
    return LocalStore(root, host_bytes=0)


def _known_turns(store: LocalStore, ids: Iterable[str]) -> list[TurnRecord]:
    """The turns with these ids; all of them must exist."""
    wanted = [TurnId(turn_id) for turn_id in dict.fromkeys(ids)]
    turns = store.catalog.turns(wanted)
    if unknown := [turn_id for turn_id in wanted if turn_id not in turns]:
        raise ConfigError(f"there is no memory {', '.join(unknown)}; `kv-agent ls` lists them")
    return [turns[turn_id] for turn_id in wanted]


def _json(value: Any) -> Report:
    return Report([json.dumps(value)])


def _memory(turn: TurnRecord) -> dict[str, Any]:
    fields = asdict(turn)
    return {"id": fields.pop("turn_id"), **fields}


def _table(*rows: Sequence[object]) -> list[str]:
    """Rows as aligned columns."""
    cells = [[_printable("-" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _printable(text: str) -> str:
    """Control characters escaped: what a model wrote must not steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _excerpt(turn: TurnRecord) -> str:
    line = " ".join(turn.text.split())
    return line if len(line) <= _TEXT_WIDTH else f"{line[: _TEXT_WIDTH - 1]}…"


def _state(chunk: ChunkRecord) -> str:
    return "quarantined" if chunk.quarantined else "ok"


def _size(num_bytes: int) -> str:
    power = max(0, min((num_bytes.bit_length() - 1) // 10, 4))
    return f"{num_bytes / 1024**power:.1f} {'KMGT'[power - 1]}iB" if power else f"{num_bytes} B"


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _age(turn: TurnRecord) -> str:
    seconds = int(max(0.0, time.time() - turn.created))
    for unit, unit_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= unit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds} s"


def _version() -> str:
    try:
        return metadata.version("kv-agent")
    except metadata.PackageNotFoundError:
        return "(not installed)"
