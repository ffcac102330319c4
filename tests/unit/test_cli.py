"""The ``kv-agent`` command on real stores."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kv_agent import cli
from kv_agent.chunks import Scope, TurnId, TurnRecord
from kv_agent.config import STORE_ENV
from kv_agent.storage.store import LocalStore, NewChunk
from tests.unit.command import error_of, lines_of
from tests.unit.storage.builders import chain, turn_of

ALICE = Scope(user_id="alice", agent_id="planner", session_id="monday")
BOB = Scope(namespace="acme", user_id="bob")
CHUNK_BYTES_PER_TOKEN = 2 * 2 * 2 * 4 * 2  # L, key and value, H, D, bytes of float16


def stored_turn(chunks: list[NewChunk], turn_id: str, scope: Scope, text: str, age_s: float) -> TurnRecord:
    turn = turn_of(chunks, turn_id, scope, created=time.time() - age_s)
    return dataclasses.replace(turn, text=text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two turns of alice's that share a chunk, and one of bob's."""
    root = tmp_path / "store"
    system, dog, cat = chain(3, 4, 5, scope=ALICE)
    (boat,) = chain(6, scope=BOB, seed=1)
    store = LocalStore(root, host_bytes=0)
    older = stored_turn([dog], "older", ALICE, "The dog\nis brown.", age_s=3 * 3600 + 5)
    newer = stored_turn([dog, cat], "newer", ALICE, "The cat is \x1b[31mred.", age_s=65)
    store.put_turn(older, [system], [dog])
    store.put_turn(newer, [], [dog, cat])
    store.put_turn(stored_turn([boat], "boat", BOB, "A blue boat.", age_s=0), [], [boat])
    store.close()
    return root


def turns_in(root: Path) -> int:
    store = LocalStore(root, host_bytes=0)
    try:
        return store.stats()["turns"]
    finally:
        store.close()


def test_stats_counts_all_users(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_bytes = 18 * CHUNK_BYTES_PER_TOKEN

    assert lines_of(capsys, "stats", "--store", root) == [
        "turns   3",
        "chunks  4 (4 searchable, 0 quarantined)",
        "tokens  18",
        f"size    {num_bytes / 1024:.1f} KiB",
    ]
    assert json.loads(lines_of(capsys, "stats", "--store", root, "--json")[0]) == {
        "turns": 3, "chunks": 4, "quarantined": 0, "entries": 4, "tokens": 18, "bytes": num_bytes,
    }  # fmt: skip


def test_ls_shows_one_users_memories_newest_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, "ls", "--store", root, "--user", "alice") == [
        "ID     AGE    TOKENS  AGENT    SESSION  TEXT",
        "newer  1 min  9       planner  monday   The cat is \\x1b[31mred.",
        "older  3 h    4       planner  monday   The dog is brown.",
    ]


def test_ls_narrows_by_scope_and_limit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*argv: str) -> list[str]:
        (line,) = lines_of(capsys, "ls", "--store", root, "--json", *argv)
        return [memory["id"] for memory in json.loads(line)]

    assert ids("--namespace", "acme", "--user", "bob") == ["boat"]
    assert ids("--user", "alice", "--agent", "planner", "--session", "monday") == ["newer", "older"]
    assert ids("--user", "alice", "--agent", "other") == []
    assert ids("--user", "alice", "--limit", "1") == ["newer"]
    assert "--limit" in lines_of(capsys, "ls", "--store", root, "--user", "alice", "--limit", "1")[-1]
    assert lines_of(capsys, "ls", "--store", root) == ["no memories with namespace default, user_id default"]


def test_a_memory_whose_time_is_over_is_not_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(root, host_bytes=0)
    chunks = chain(7, seed=9)
    for turn_id, left_s in (("over", -1.0), ("soon", 3600.0)):
        turn = dataclasses.replace(turn_of(chunks, turn_id), expires=time.time() + left_s)
        store.put_turn(dataclasses.replace(turn, scope=Scope(session_id=turn_id)), [], chunks)
    store.close()

    (line,) = lines_of(capsys, "ls", "--store", root, "--json")
    assert [memory["id"] for memory in json.loads(line)] == ["soon"]
    (shown,) = (line for line in lines_of(capsys, "show", "soon", "--store", root) if "expires" in line)
    assert re.fullmatch(r"expires +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", shown)
    assert turns_in(root) == 4


def test_show_tells_text_scope_metadata_and_chunks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(root, host_bytes=0)
    dog, cat = store.catalog.turns([TurnId("newer")])[TurnId("newer")].chunk_keys
    store.quarantine(cat, "test")
    store.close()

    lines = lines_of(capsys, "show", "newer", "--store", root)

    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert (facts["namespace"], facts["user_id"], facts["agent_id"]) == ("default", "alice", "planner")
    assert facts["created"].endswith("UTC (1 min ago)")
    assert json.loads(facts["metadata"]) == {"source": "test", "n": 3, "x": 0.5, "ok": True}
    assert facts["size"] == "9 tokens, 576 B"
    assert "The cat is \\x1b[31mred." in lines
    assert [line.split() for line in lines[-3:]] == [
        ["CHUNK", "POSITIONS", "TOKENS", "SIZE", "STATE"],
        [dog, "3-7", "4", "256", "B", "ok"],
        [cat, "7-12", "5", "320", "B", "quarantined"],
    ]


def test_show_says_what_is_pinned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def facts() -> list[list[str]]:
        return [line.split() for line in lines_of(capsys, "show", "newer", "--store", root)]

    assert ["pinned", "yes"] not in facts()
    store = LocalStore(root, host_bytes=0)
    store.catalog.ledger.pin([TurnId("newer")], True)
    store.close()
    assert ["pinned", "yes"] in facts()


def test_show_json_has_what_a_plan_needs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = json.loads(lines_of(capsys, "show", "older", "--json", "--store", root)[0])

    assert memory["text"] == "The dog\nis brown."
    assert memory["scope"] == dataclasses.asdict(ALICE)
    (chunk,) = memory["chunks"]
    assert (chunk["key"], chunk["start"]) == (memory["chunk_keys"][0], 3)
    assert chunk["token_ids"] == [3, 4, 5, 6]


def test_verify_passes_a_healthy_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, "verify", "--store", root) == [
        "4 chunks are fine (0 quarantined ones were not read)"
    ]


def test_verify_names_damaged_chunks_and_orphan_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(root, host_bytes=0)
    (key,) = store.catalog.turns([TurnId("boat")])[TurnId("boat")].chunk_keys
    blob = root / store.catalog.chunks([key])[key].blob
    store.close()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x55")
    left = blob.parent / "left.0123.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))

    damaged, orphan, count = lines_of(capsys, "verify", "--store", root, code=1)

    assert damaged.startswith(f"chunk {key} is damaged")
    assert "left.0123.tmp" in orphan
    assert count.startswith("problems: 2;")


def test_forget_says_what_went_and_keeps_what_others_use(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines_of(capsys, "forget", "newer", "--store", root) == [
        "forgot  newer  The cat is \\x1b[31mred.",
        "1 chunks deleted, 320 B freed",
    ]
    assert lines_of(capsys, "forget", "older", "boat", "boat", "--store", root)[:2] == [
        "forgot  older  The dog is brown.",
        "forgot  boat   A blue boat.",
    ]
    assert turns_in(root) == 0
    assert [path for path in root.glob("blobs/*/*") if path.is_file()] == []


def test_forget_deletes_nothing_when_an_id_is_unknown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "forget", "older", "typo", "oops", "--store", root)

    assert error.startswith("kv-agent: there is no memory typo, oops;")
    assert turns_in(root) == 3


@pytest.mark.parametrize(
    "command", [["stats"], ["ls"], ["show", "x"], ["verify"], ["gc"], ["forget", "x"], ["export", "x"]]
)
def test_a_missing_store_is_an_error_and_not_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "empty").mkdir()

    for folder in ("missing", "empty"):
        error = error_of(capsys, *command, "--store", tmp_path / folder)
        assert error.startswith(f"kv-agent: there is no store in {tmp_path / folder};")

    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_file_that_is_no_catalog_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "catalog.sqlite3").write_bytes(b"something else altogether" * 100)

    assert "not a database" in error_of(capsys, "stats", "--store", tmp_path)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["show", "typo"], "there is no memory typo"),
        (["ls", "--limit", "0"], "--limit must be at least 1"),
        (["ls", "--user", ""], "user_id must be a non-empty string"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    root: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert sentence in error_of(capsys, *argv, "--store", root)


def test_the_store_comes_from_the_environment_or_stands_before_the_command(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = lines_of(capsys, "--store", root, "stats")
    monkeypatch.setenv(STORE_ENV, str(root))

    assert lines_of(capsys, "stats") == given


@pytest.mark.parametrize("argv", [["--version"], ["ls", "--version"]])
def test_version_needs_no_store(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)

    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("kv-agent ")


def test_a_reader_that_stops_early_gets_no_traceback(root: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"import sys; from kv_agent.cli import main; sys.exit(main(['ls', '--store', {str(root)!r}]))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (0, "")
