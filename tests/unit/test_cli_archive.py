"""``kv-agent export`` and ``kv-agent import`` on real stores."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kv_agent import cli
from kv_agent.chunks import Scope, TurnId
from kv_agent.storage.store import LocalStore
from tests.unit.command import error_of, lines_of
from tests.unit.storage.builders import FINGERPRINT, chain, turn_of
from tests.unit.storage.stores import holds

BOB = Scope(namespace="acme", user_id="bob", agent_id="coder")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two turns, one of bob's."""
    store = LocalStore(tmp_path / "store", host_bytes=0)
    for turn_id, scope in (("mine", Scope()), ("bobs", BOB)):
        chunks = chain(3, 4, scope=scope)
        store.put_turn(turn_of(chunks, turn_id, scope), [], chunks)
    store.close()
    return tmp_path / "store"


def test_what_is_exported_is_imported_into_a_new_store(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = tmp_path / "memories.tar", tmp_path / "target"

    (line,) = lines_of(capsys, "export", root, file)
    assert line == f"exported 2 turns with 4 chunks, {file.stat().st_size / 1024:.1f} KiB, to {file}"
    assert file.stat().st_mode & 0o777 == 0o600
    assert lines_of(capsys, "import", target, file) == ["imported 2 turns with 4 chunks"]
    assert lines_of(capsys, "import", file, "--store", target) == [
        "imported 0 turns with 0 chunks",
        "2 turns were stored already",
    ]

    store = LocalStore(target, host_bytes=0)
    assert holds(store, [*chain(3, 4), *chain(3, 4, scope=BOB)])
    store.close()
    assert lines_of(capsys, "verify", "--store", target)[0].startswith("4 chunks are fine")


@pytest.mark.parametrize(
    ("argv", "ids"),
    [
        (["--namespace", "acme"], ["bobs"]),
        (["--user", "bob", "--agent", "coder"], ["bobs"]),
        (["--agent", "planner"], []),
    ],
)
def test_export_narrows(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], ids: list[str]
) -> None:
    lines_of(capsys, "export", tmp_path / "file", "--store", root, *argv)
    lines_of(capsys, "import", tmp_path / "target", tmp_path / "file")

    (line,) = lines_of(
        capsys, "ls", "--json", "--store", tmp_path / "target", "--namespace", "acme", "--user", "bob"
    )
    assert [memory["id"] for memory in json.loads(line)] == ids
    assert lines_of(capsys, "stats", "--store", tmp_path / "target")[0].split() == ["turns", str(len(ids))]


def test_a_required_model_or_a_damaged_file_is_one_sentence_and_no_store_is_made(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = tmp_path / "file", tmp_path / "target"
    lines_of(capsys, "export", root, file)

    assert "not only of fp-9" in error_of(capsys, "import", root, file, "--fingerprint", "fp-9")
    file.write_bytes(file.read_bytes()[:-3000])
    assert "damaged or cut off" in error_of(capsys, "import", target, file)
    assert "cannot read" in error_of(capsys, "import", target, tmp_path / "missing")
    assert not target.exists()
    assert lines_of(capsys, "export", root, file)
    lines_of(capsys, "import", target, file, "--fingerprint", FINGERPRINT)


def test_a_failed_export_keeps_the_file_that_was_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"the last backup")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(cli, "export_turns", fail)

    assert "no space left" in error_of(capsys, "export", root, file)
    assert file.read_bytes() == b"the last backup"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "store"]


def test_a_memory_that_cannot_be_exported_is_named_and_the_others_are_exported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(root, host_bytes=0)
    store.quarantine(chain(3, 4)[1].key, "test")
    store.close()

    left_out, done = lines_of(capsys, "export", root, tmp_path / "file", code=1)

    assert left_out.startswith("left out mine: chunk ")
    assert done.startswith("exported 1 turns with 2 chunks")
    assert lines_of(capsys, "import", tmp_path / "target", tmp_path / "file") == [
        "imported 1 turns with 2 chunks"
    ]


def test_a_memory_whose_time_is_over_before_it_is_imported_is_not_kept(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(root, host_bytes=0)
    chunks = chain(5, seed=5)
    store.put_turn(replace(turn_of(chunks, "soon"), expires=time.time() + 100), [], chunks)
    store.close()
    lines_of(capsys, "export", root, tmp_path / "file")
    later = time.time() + 200
    monkeypatch.setattr(time, "time", lambda: later)

    lines_of(capsys, "import", tmp_path / "target", tmp_path / "file")

    store = LocalStore(tmp_path / "target", host_bytes=0)
    assert store.catalog.known_turns(map(TurnId, ("mine", "bobs", "soon"))) == {"mine", "bobs"}
    assert store.check() == []
    store.close()
