"""``kv-agent gc`` and ``kv-agent verify --repair`` on real stores."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kv_agent import cli
from kv_agent.storage.store import LocalStore
from tests.unit.command import lines_of
from tests.unit.storage.builders import chain, turn_of


def run(capsys: pytest.CaptureFixture[str], root: Path, *argv: str, code: int = 0) -> list[str]:
    return lines_of(capsys, *argv, "--store", root, code=code)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A turn that stays and one whose time is over, of 3 and 4 tokens."""
    store = LocalStore(tmp_path, host_bytes=0)
    for turn_id, length, expires in (("stays", 3, None), ("over", 4, time.time() - 1)):
        chunks = chain(length, seed=length)
        store.put_turn(replace(turn_of(chunks, turn_id), expires=expires), [], chunks)
    store.close()
    return tmp_path


def blob_of(root: Path, turn_id: str) -> Path:
    (path,) = root.glob(f"blobs/*/{turn_id}-*")
    return path


def leave(root: Path, name: str, age_s: float) -> Path:
    path = root / "blobs" / "ab" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(1024))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_gc_tells_what_it_deletes_and_a_dry_run_what_it_would(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, young = leave(root, "old.ab.tmp", 7200), leave(root, "young.safetensors", 60)
    over, stays = blob_of(root, "over"), blob_of(root, "stays")
    size = f"{(over.stat().st_size + 1024) / 1024:.1f} KiB"
    kept = "kept 1 files that may be being stored right now; --older-than 0 takes them, too"
    said = [
        "1 memories whose time was over",
        "1 chunks that no memory uses any more",
        f"2 files that no chunk is in, {size}",
    ]

    assert run(capsys, root, "gc", "--dry-run") == [*(f"would delete {line}" for line in said), kept]
    assert old.exists()
    assert over.exists()
    assert run(capsys, root, "gc") == [*(f"deleted {line}" for line in said), kept]
    assert not old.exists()
    assert not over.exists()
    assert young.exists()
    assert run(capsys, root, "gc", "--older-than", "50") == ["deleted 1 files that no chunk is in, 1.0 KiB"]
    assert run(capsys, root, "gc") == ["nothing to delete"]
    assert stays.exists()


def test_repair_quarantines_collects_and_leaves_a_store_that_verifies(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blob_of(root, "stays").unlink()
    leave(root, "old.ab.tmp", 7200)
    assert run(capsys, root, "verify", code=1)[-1].startswith("problems: 2;")

    quarantined, deleted, sound = run(capsys, root, "verify", "--repair")

    assert re.match("quarantined: chunk [0-9a-f]{32} is lost: ", quarantined)
    assert deleted == "deleted 1 files that no chunk is in, 1.0 KiB"
    assert sound == "0 chunks are fine (1 quarantined ones were not read)"
    assert run(capsys, root, "verify") == [sound]


def test_what_cannot_be_repaired_is_named_and_ends_with_code_1(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = leave(root, "notes.txt", 7200)

    named, count = run(capsys, root, "verify", "--repair", code=1)

    assert named.startswith("cannot be repaired: file blobs/ab/notes.txt")
    assert count == "problems left: 1"
    assert foreign.exists()
    assert run(capsys, root, "gc") == ["kept blobs/ab/notes.txt: no file of kv_agent is named like this"]


def test_a_file_being_stored_is_a_note_and_no_problem(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(root, "young.safetensors", 60)

    note, sound = run(capsys, root, "verify")

    assert note.startswith("note: file blobs/ab/young.safetensors (1024 bytes)")
    assert sound.startswith("1 chunks are fine")
    assert len(run(capsys, root, "verify", "--older-than", "50", code=1)) == 2


def test_a_negative_age_is_one_sentence(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gc", "--older-than", "-1", "--store", str(root)]) == 1
    assert "must be >= 0 seconds" in capsys.readouterr().err
