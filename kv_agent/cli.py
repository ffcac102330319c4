"""The ``kv-agent`` command: serve a model with memory; look at a store, check it, move memories, forget."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from kv_agent import keys, quotas, serve
from kv_agent.chunks import ChunkRecord, Scope, TurnId, TurnRecord
from kv_agent.config import STORE_ENV, default_store_dir
from kv_agent.engines.vllm_api import run_api_server
from kv_agent.errors import ConfigError, KVAgentError
from kv_agent.printing import date, printable, size, span, table
from kv_agent.storage.archive import Archive
from kv_agent.storage.blobs import existing_file, new_file
from kv_agent.storage.checking import Inspection
from kv_agent.storage.garbage import GRACE_S, Garbage
from kv_agent.storage.store import LocalStore
from kv_agent.storage.transfer import export_turns, import_archive

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
    folder = getattr(args, "folder", None) or getattr(args, "store", None) or default_store_dir()
    try:
        opens_none = args.command in (_import, _keys, _serve)
        report = args.command(folder, args) if opens_none else _on_store(folder, args)
    except KVAgentError as err:
        print(f"kv-agent: {printable(str(err))}", file=sys.stderr)
        return 1
    try:
        print(*report.lines, sep="\n", flush=True)
    except BrokenPipeError:  # the reader has seen enough; Python must not flush the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return report.exit_code


def _on_store(folder: Path, args: argparse.Namespace) -> Report:
    store = _open_store(folder)
    try:
        if args.command is not _gc:  # which does so itself, and tells
            store.forget_expired(time.time())
        report: Report = args.command(store, args)
    finally:
        store.close()
    return report


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--version", action="version", version=f"kv-agent {_version()}")
    text = f"the store's folder (default: {STORE_ENV}, or kv_agent in the cache folder)"
    common.add_argument("--store", type=_path, metavar="DIR", help=text)
    parser = argparse.ArgumentParser(prog="kv-agent", description=__doc__, parents=[common])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., Report], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(command=command)
        return sub

    ours = argparse.ArgumentParser("kv-agent serve", add_help=False, allow_abbrev=False, parents=[common])
    serve.add_options(ours)
    text = "start vLLM's OpenAI server with memory; options that are not listed here go to vLLM as they are"
    serving = commands.add_parser("serve", help=text, description=text, parents=[ours], allow_abbrev=False)
    serving.set_defaults(command=_serve, ours=ours)
    serving.add_argument("model", metavar="MODEL", help="a folder, or a name on Hugging Face")
    text = "of vLLM; `kv-agent serve MODEL --help=all` lists them"
    serving.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTIONS", help=text)
    keys.add_options(add("keys", _keys, "make, list and remove the API keys of a server"))

    stats = add("stats", _stats, "count memories, chunks, tokens and bytes of all users")
    ls = add("ls", _ls, "list one user's memories, newest first")
    show = add("show", _show, "show one memory: its text, whose it is and its chunks")
    verify = add(
        "verify", _verify, "read every chunk and compare files with catalog; exit code 1 on problems"
    )
    gc = add("gc", _gc, "delete what nobody can find any more; safe while others store")
    export = add("export", _export, "write memories with their KV to one file")
    load = add("import", _import, "store the memories of a file that export wrote; again changes nothing")
    forget = add("forget", _forget, "delete memories and the bytes that only they use")
    quota = add("quota", _quota, "show what namespaces hold and may hold, or limit one or the others")

    for name in ("namespace", "user"):
        ls.add_argument(f"--{name}", default="default", metavar="NAME", help="default: %(default)s")
    for name in ("agent", "session"):
        ls.add_argument(f"--{name}", metavar="NAME", help=f"only this {name}'s memories")
    ls.add_argument("--limit", type=int, default=20, metavar="N", help="default: %(default)s")
    show.add_argument("ids", nargs=1, metavar="MEMORY_ID")
    forget.add_argument("ids", nargs="+", metavar="MEMORY_ID")
    text = "quarantine lost and damaged chunks and delete orphans; exit code 0 when the store is sound then"
    verify.add_argument("--repair", action="store_true", help=text)
    gc.add_argument("--dry-run", action="store_true", help="only tell what would be deleted")
    text = "files without a row may be being stored until they are this old (default: %(default)s)"
    for sub in (verify, gc):
        sub.add_argument("--older-than", type=float, default=GRACE_S, metavar="SECONDS", help=text)
    for sub in (export, load):
        text = "the same as --store; import makes it if there is none"
        sub.add_argument("folder", nargs="?", type=_path, metavar="STORE", help=text)
        sub.add_argument("file", type=_path, metavar="FILE")
    for name in ("namespace", "user", "agent"):
        export.add_argument(f"--{name}", metavar="NAME", help=f"only this {name}'s memories")
    text = "import nothing unless all memories are of this model"
    load.add_argument("--fingerprint", metavar="F", help=text)
    text = "show or limit this one; without it, show all, or limit all that have no limits of their own"
    quota.add_argument("namespace", nargs="?", metavar="NAMESPACE", help=text)
    quotas.add_options(quota)
    for sub in (stats, ls, show, quota):
        sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _stats(store: LocalStore, args: argparse.Namespace) -> Report:
    counts = store.catalog.stats()
    if args.json:
        return _json(counts)
    chunks = f"{counts['chunks']:,} ({counts['entries']:,} searchable, {counts['quarantined']:,} quarantined)"
    rows = [("turns", f"{counts['turns']:,}"), ("chunks", chunks), ("tokens", f"{counts['tokens']:,}")]
    return Report(table(*rows, ("size", size(counts["bytes"]))))


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
        return Report([printable(f"no memories with {wanted}")])
    rows = [
        (t.turn_id, _age(t), f"{t.num_tokens:,}", t.scope.agent_id, t.scope.session_id, _excerpt(t))
        for t in turns
    ]
    more = ["older ones are not shown; raise --limit"] if len(found) > len(turns) else []
    return Report([*table(("ID", "AGE", "TOKENS", "AGENT", "SESSION", "TEXT"), *rows), *more])


def _show(store: LocalStore, args: argparse.Namespace) -> Report:
    (turn,) = _known_turns(store, args.ids)
    records = store.catalog.chunks(turn.chunk_keys)
    chunks = [records[key] for key in turn.chunk_keys if key in records]
    if args.json:
        return _json({**_memory(turn), "chunks": [asdict(chunk) for chunk in chunks]})
    end = [] if turn.expires is None else [("expires", date(turn.expires))]
    end += [("pinned", "yes")] if turn.pinned else []
    facts = table(
        ("id", turn.turn_id),
        *asdict(turn.scope).items(),
        ("created", f"{date(turn.created)} ({_age(turn)} ago)"),
        *end,
        ("model", turn.fingerprint),
        ("metadata", json.dumps(dict(turn.metadata), ensure_ascii=False)),
        ("size", f"{turn.num_tokens:,} tokens, {size(sum(chunk.num_bytes for chunk in chunks))}"),
    )
    rows = [
        (c.key, f"{c.start}-{c.start + c.num_tokens}", c.num_tokens, size(c.num_bytes), _state(c))
        for c in chunks
    ]
    parts = table(("CHUNK", "POSITIONS", "TOKENS", "SIZE", "STATE"), *rows)
    return Report([*facts, "", *map(printable, turn.text.splitlines()), "", *parts])


def _verify(store: LocalStore, args: argparse.Namespace) -> Report:
    found = store.inspect(args.older_than)
    if args.repair:
        return _repair(store, found, args.older_than)
    young = [printable(f"note: {sentence}") for sentence in found.young]
    if problems := found.problems:
        count = f"problems: {len(problems)}; `kv-agent verify --repair` puts right what can be"
        return Report([*map(printable, problems), *young, count], exit_code=1)
    return Report([*young, _soundness(store)])


def _repair(store: LocalStore, found: Inspection, older_than_s: float) -> Report:
    quarantined = store.repair(found)
    garbage = store.collect_garbage(older_than_s)
    unreadable = [chunk.problem for chunk in found.bad_chunks if not chunk.is_gone]
    left = [*unreadable, *found.beyond_repair]
    lines = [
        *(f"quarantined: {chunk.problem}" for chunk in quarantined),
        *_collected(garbage, "deleted"),
        *(f"cannot be repaired: {problem}" for problem in left),
        f"problems left: {len(left)}" if left else _soundness(store),
    ]
    return Report([*map(printable, lines)], exit_code=1 if left else 0)


def _soundness(store: LocalStore) -> str:
    counts = store.catalog.stats()
    healthy = counts["chunks"] - counts["quarantined"]
    return f"{healthy:,} chunks are fine ({counts['quarantined']:,} quarantined ones were not read)"


def _gc(store: LocalStore, args: argparse.Namespace) -> Report:
    garbage = store.collect_garbage(args.older_than, dry_run=args.dry_run)
    lines = _collected(garbage, "would delete" if args.dry_run else "deleted")
    lines += [f"kept {path}: no file of kv_agent is named like this" for path in garbage.foreign]
    return Report([*map(printable, lines or ["nothing to delete"])])


def _collected(garbage: Garbage, verb: str) -> list[str]:
    counts = [
        (garbage.num_turns, "memories whose time was over"),
        (garbage.num_chunks, "chunks that no memory uses any more"),
        (garbage.num_files, f"files that no chunk is in, {size(garbage.file_bytes)}"),
    ]
    lines = [f"{verb} {count:,} {what}" for count, what in counts if count]
    if garbage.catalog_bytes:
        lines.append(f"the catalog is {size(garbage.catalog_bytes)} smaller")
    if garbage.young:
        what = "files that may be being stored right now; --older-than 0 takes them, too"
        lines.append(f"kept {len(garbage.young):,} {what}")
    return lines


def _forget(store: LocalStore, args: argparse.Namespace) -> Report:
    turns = {turn.turn_id: turn for turn in _known_turns(store, args.ids)}
    before = store.catalog.chunks(store.catalog.chunk_keys_of_turns(turns))
    store.forget(turns)
    gone = before.keys() - store.catalog.chunks(before).keys()
    freed = size(sum(before[key].num_bytes for key in gone))
    forgotten = table(*(("forgot", turn.turn_id, _excerpt(turn)) for turn in turns.values()))
    return Report([*forgotten, f"{len(gone):,} chunks deleted, {freed} freed"])


def _quota(store: LocalStore, args: argparse.Namespace) -> Report:
    ledger = store.catalog.ledger
    quotas.change(ledger, args.namespace, vars(args))
    rows = quotas.quotas(ledger, args.namespace)
    return _json([row.plain() for row in rows]) if args.json else Report(quotas.lines(rows))


def _export(store: LocalStore, args: argparse.Namespace) -> Report:
    with new_file(args.file) as file:
        done = export_turns(store, file, namespace=args.namespace, user_id=args.user, agent_id=args.agent)
        file_size = size(file.tell())
    lines = [f"left out {turn_id}: {why}" for turn_id, why in done.left_out.items()]
    counts = f"{done.num_turns:,} turns with {done.num_chunks:,} chunks, {file_size}"
    lines.append(f"exported {counts}, to {args.file}")
    return Report([*map(printable, lines)], exit_code=1 if done.left_out else 0)


def _serve(folder: Path, args: argparse.Namespace) -> Report:
    options, rest = args.ours.parse_known_args(args.options, argparse.Namespace(**vars(args)))
    options.store = getattr(options, "store", None)
    options.folder = options.store or folder
    start = serve.start(args.model, options, rest, os.environ)
    print(*start.lines, sep="\n", flush=True)
    os.environ.update(start.environment)
    try:
        run_api_server(start.arguments)
    except KeyboardInterrupt:  # also what vLLM makes of SIGTERM until it serves
        return Report(["stopped before it served"], exit_code=130)
    return Report(["the server has stopped"])


def _keys(_: Path, args: argparse.Namespace) -> Report:
    return Report(keys.run(args))


def _import(folder: Path, args: argparse.Namespace) -> Report:
    with existing_file(args.file) as file:
        archive = Archive(file)  # found whole before a store is made
        store = LocalStore(folder, host_bytes=0)
        try:
            done = import_archive(store, archive, args.fingerprint)
            store.forget_expired(time.time())
        finally:
            store.close()
    lines = [f"{old} names another memory here; this one is now {new}" for old, new in done.renamed.items()]
    known = done.num_turns - done.num_new_turns
    lines.append(f"imported {done.num_new_turns:,} turns with {done.num_new_chunks:,} chunks")
    lines += [f"{known:,} turns were stored already"] if known else []
    return Report([*map(printable, lines)])


def _open_store(root: Path) -> LocalStore:
    if not os.path.isfile(root / "catalog.sqlite3"):  # opening it would create one
        raise ConfigError(f"there is no store in {root}; name its folder with --store or {STORE_ENV}")
    return LocalStore(root, host_bytes=0)


def _path(text: str) -> Path:
    return Path(text).expanduser()


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


def _excerpt(turn: TurnRecord) -> str:
    line = " ".join(turn.text.split())
    return line if len(line) <= _TEXT_WIDTH else f"{line[: _TEXT_WIDTH - 1]}…"


def _state(chunk: ChunkRecord) -> str:
    return "quarantined" if chunk.quarantined else "ok"


def _age(turn: TurnRecord) -> str:
    return span(time.time() - turn.created)


def _version() -> str:
    try:
        return metadata.version("kv-agent")
    except metadata.PackageNotFoundError:
        return "(not installed)"
