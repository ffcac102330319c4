"""``kv-agent quota`` on real stores, and how sizes and times are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from kv_agent import cli
from kv_agent.chunks import Scope
from kv_agent.quotas import parse_size, parse_span
from kv_agent.storage.retention import Retention
from kv_agent.storage.store import LocalStore
from tests.unit.command import error_of, lines_of
from tests.unit.storage.builders import chain, turn_of

HEAD = ["NAMESPACE", "SIZE", "TOKENS", "MEMORIES", "POLICY", "WINDOW", "TTL", "EVICTED", "REFUSED"]


def fill(root: Path, namespace: str, first: int, last: int) -> None:
    store = LocalStore(root, host_bytes=0)
    scope = Scope(namespace=namespace)
    for number in range(first, last):
        chunks = chain(10, seed=number, scope=scope)
        store.put_turn(turn_of(chunks, f"{namespace}-{number}", scope, float(number)), [], chunks)
    store.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fill(tmp_path, "acme", 0, 3)
    fill(tmp_path, "zoo", 0, 2)
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str], root: Path, *argv: str) -> list[list[str]]:
    head, *found = lines_of(capsys, "quota", *argv, "--store", root)
    assert head.split() == HEAD
    columns = [head.index(name) for name in HEAD]
    ends = [*columns[1:], None]
    return [[line[begin:end].strip() for begin, end in zip(columns, ends, strict=True)] for line in found]


def retention(root: Path, namespace: str) -> Retention:
    store = LocalStore(root, host_bytes=0)
    try:
        return store.retention(namespace)
    finally:
        store.close()


def test_without_options_it_shows_what_all_hold(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = ["-"] * 3
    assert rows(capsys, root) == [
        ["acme", "1.9 KiB", "30", "3", *nothing, "0", "0"],
        ["zoo", "1.2 KiB", "20", "2", *nothing, "0", "0"],
        ["(all others)", *["-"] * 8],
    ]


def test_limits_are_set_for_one_or_for_all_others_and_taken_away(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(capsys, root, "--policy", "importance", "--ttl", "30d", "--window-tokens", "4096")
    assert retention(root, "zoo") == Retention(policy="importance", ttl_s=30 * 86_400.0, window_tokens=4096)

    (acme,) = rows(capsys, root, "acme", "--max-bytes", "1.5k", "--max-memories", "7", "--ttl", "none")
    assert acme == ["acme", "1.9 KiB of 1.5 KiB", "30", "3 of 7", "importance", "4,096", "-", "0", "0"]
    assert retention(root, "acme") == Retention(
        policy="importance", window_tokens=4096, max_bytes=1536, max_memories=7
    )
    assert rows(capsys, root)[1:] == [
        ["zoo", "1.2 KiB", "20", "2", "importance", "4,096", "30 d", "0", "0"],
        ["(all others)", "-", "-", "-", "importance", "4,096", "30 d", "-", "-"],
    ]

    rows(capsys, root, "acme", "--clear", "--max-tokens", "5")
    assert retention(root, "acme").max_tokens == 5
    assert retention(root, "acme").max_bytes is None
    rows(capsys, root, "acme", "--clear")
    assert retention(root, "acme") == retention(root, "nobody") != Retention()
    rows(capsys, root, "--clear")
    assert retention(root, "acme") == Retention()


def test_what_went_is_counted_and_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(capsys, root, "acme", "--max-memories", "3")
    fill(root, "acme", 3, 5)

    assert rows(capsys, root, "acme")[0][3:] == ["3 of 3", "-", "-", "-", "2", "0"]
    (acme,) = json.loads(lines_of(capsys, "quota", "acme", "--json", "--store", root)[0])
    assert acme == {
        "namespace": "acme", "policy": None, "max_bytes": None, "max_tokens": None, "max_memories": 3,
        "window_tokens": None, "ttl_s": None, "num_bytes": 1920, "num_tokens": 30, "num_memories": 3,
        "evicted_turns": 2, "evicted_bytes": 1280, "refused_turns": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["acme", "--policy", "arc"], "no policy is called 'arc'; choose one of lru, fifo, importance"),
        (["acme", "--max-tokens", "0"], "max_tokens must be a whole number from 1 on"),
        (["acme", "--ttl", "0s"], "ttl_s must be a positive number"),
        (["", "--max-tokens", "5"], "namespace must be a non-empty string"),
    ],
)
def test_a_limit_that_makes_no_sense_is_one_sentence_and_changes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert sentence in error_of(capsys, "quota", *argv, "--store", root)
    assert retention(root, "acme") == Retention()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("17", 17), ("1K", 1024), ("1.5M", 3 << 19), ("10G", 10 << 30), ("2t", 2 << 40), ("3GiB", 3 << 30),
     ("4KB", 4096), ("512B", 512), ("none", None)],
)  # fmt: skip
def test_sizes_are_powers_of_1024(text: str, num_bytes: int | None) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5min", 90), ("12h", 43_200), ("30d", 2_592_000), ("none", None)],
)
def test_times_have_units(text: str, seconds: float | None) -> None:
    assert parse_span(text) == seconds


@pytest.mark.parametrize("text", ["", "G", "-1", "1 G", "1e9", "10X", "1Ki", "nan", "30 d", "None"])
def test_what_is_neither_a_size_nor_a_time_is_refused(
    text: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for parse in (parse_size, parse_span):
        with pytest.raises(argparse.ArgumentTypeError, match="neither"):
            parse(text)
    with pytest.raises(SystemExit) as caught:
        cli.main(["quota", "acme", "--ttl", text, "--store", str(root)])
    assert caught.value.code == 2
    assert "--ttl" in capsys.readouterr().err
