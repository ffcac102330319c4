"""Keys: kept as hashes, changed while the server runs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kv_agent.errors import ConfigError
from kv_agent.serving.access import Access, Caller, add_key, bearer, digest_of, read_keys, remove_key
from kv_agent.serving.errors import RequestError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def status_of(access: Access, key: str | None, namespace: str | None = None) -> int:
    with pytest.raises(RequestError) as refused:
        access.caller(key, namespace)
    return refused.value.status


def test_a_key_opens_its_own_namespace(path: Path) -> None:
    acme, other, admin = add_key(path, "acme"), add_key(path, "ö/ther"), add_key(path, "ops", is_admin=True)
    access = Access(path)

    assert access.caller(acme) == Caller(namespace="acme")
    assert access.caller(other) == Caller(namespace="ö/ther")
    assert access.caller(acme, "acme") == Caller(namespace="acme")
    assert status_of(access, acme, "ö/ther") == 403
    assert access.caller(admin) == Caller(namespace="ops", is_admin=True)
    assert access.caller(admin, "acme") == Caller(namespace="acme", is_admin=True)
    assert status_of(access, admin, "") == 400
    for wrong in (None, "", acme[:-1], acme + "x", digest_of(acme), "\udcff"):
        assert status_of(access, wrong) == 401


def test_the_file_has_no_key_and_is_its_owners_alone(path: Path) -> None:
    keys = [add_key(path, "acme") for _ in range(3)]

    assert len(set(keys)) == 3
    assert not any(key in path.read_text() for key in keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.sha256 for entry in read_keys(path).keys] == [digest_of(key) for key in keys]
    assert sorted(os.listdir(path.parent)) == [f".{path.name}.lock", path.name]
    assert (path.parent / f".{path.name}.lock").read_bytes() == b""


def test_keys_come_and_go_while_a_server_runs(path: Path) -> None:
    first = add_key(path, "acme")
    access = Access(path)

    second = add_key(path, "other")
    assert access.caller(second) == Caller(namespace="other")
    assert remove_key(path, digest_of(first)[:12]).namespace == "acme"
    assert status_of(access, first) == 401
    assert access.caller(second) == Caller(namespace="other")


def test_a_file_that_is_broken_meanwhile_changes_nothing_and_is_told_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(path, "acme")
    access = Access(path)

    path.write_text("{")
    assert [access.caller(key).namespace for _ in range(3)] == ["acme"] * 3
    path.unlink()
    assert access.caller(key) == Caller(namespace="acme")
    assert len(caplog.records) == 2
    add_key(path, "new")
    assert status_of(access, key) == 401


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"key": []}', '{"keys": [{"sha256": "x", "namespace": "a"}]}',
        '{"requests_per_minute": {"a": 0}}',
        json.dumps({"keys": [{"sha256": "0" * 64, "namespace": ""}]}),
        json.dumps({"keys": [{"sha256": "0" * 64, "namespace": "a", "role": "admin"}]}),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_at_start(path: Path, content: str) -> None:
    path.write_text(content)

    with pytest.raises(ConfigError, match=str(path)):
        Access(path)


def test_a_missing_file_is_refused_and_says_what_makes_one(path: Path) -> None:
    with pytest.raises(ConfigError, match="kv-agent keys add"):
        Access(path)


def test_only_one_key_is_removed_at_a_time(path: Path) -> None:
    add_key(path, "acme")
    add_key(path, "acme")

    for ambiguous in ("", "no such"):
        with pytest.raises(ConfigError, match="keys have a hash"):
            remove_key(path, ambiguous)
    assert len(read_keys(path).keys) == 2


ADDING_FIVE = """
import sys
from pathlib import Path
from kv_agent.serving.access import add_key, digest_of, remove_key

path = Path(sys.argv[1])
sys.stdin.readline()  # all at once
for number in range(5):
    remove_key(path, digest_of(add_key(path, "short-lived")))
    print(add_key(path, f"namespace {number}"), flush=True)
"""


@pytest.mark.slow
def test_of_many_who_change_keys_at_once_nobody_loses_one(path: Path) -> None:
    before = add_key(path, "acme")
    adding = [
        subprocess.Popen(
            [sys.executable, "-c", ADDING_FIVE, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(8)
    ]
    for process in adding:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    keys = [key for process in adding for key in process.communicate(timeout=120)[0].split()]

    assert [process.returncode for process in adding] == [0] * 8
    assert len(keys) == 40
    access = Access(path)
    assert {access.caller(key).namespace for key in keys} == {f"namespace {number}" for number in range(5)}
    assert {entry.sha256 for entry in read_keys(path).keys} == {digest_of(key) for key in [before, *keys]}


def test_a_folder_that_is_not_there_is_told(path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the memory keys"):
        add_key(path.parent / "no such folder" / path.name, "acme")


def test_rates_are_kept_when_keys_change(path: Path) -> None:
    path.write_text('{"requests_per_minute": {"acme": 60}}')
    key = add_key(path, "acme")
    remove_key(path, digest_of(key))
    access = Access(path)

    assert (access.requests_per_minute("acme"), access.requests_per_minute("other")) == (60, None)


def test_a_namespace_has_a_name(path: Path) -> None:
    with pytest.raises(ConfigError, match="namespace"):
        add_key(path, "")


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer k", "k"),
        ("bearer  k ", "k"),
        ("Basic k", None),
        ("k", None),
        ("Bearer ", None),
        ("", None),
        (None, None),
    ],
)
def test_the_key_of_a_header(header: str | None, key: str | None) -> None:
    assert bearer(header) == key
