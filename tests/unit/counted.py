"""What a piece of work costs in things that can be counted: SQL statements, files, bytes gone through."""

from __future__ import annotations

import builtins
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kv_agent.storage import blob_content, blobs, connection
from kv_agent.storage.connection import ThreadConnection

_WRITES = ("INSERT", "UPDATE", "DELETE")


class Statements:
    """SQL that the program itself ran, by its first word; what triggers and FTS5 run inside is left out."""

    def __init__(self) -> None:
        self._ran: Counter[str] = Counter()
        self._last = ""

    def note(self, statement: str) -> None:
        """Of a trigger SQLite tells the statement that set it off, once more for each of its own."""
        verb = statement.split(None, 1)[0]
        is_trigger = statement == self._last and verb in _WRITES
        if not is_trigger and not verb.startswith("--"):
            self._last = statement
            self._ran[verb] += 1

    @contextmanager
    def of(self) -> Iterator[dict[str, int]]:
        """Those that are run within, in any thread, once it is over."""
        before, found = self._ran.copy(), dict[str, int]()
        yield found
        found.update(self._ran - before)


def trace_statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    """From now on every new connection of a catalog is listened to."""
    statements = Statements()
    connect = connection.connect

    def traced(*args: Any, **kwargs: Any) -> ThreadConnection:
        made = connect(*args, **kwargs)
        made.connection.set_trace_callback(statements.note)
        return made

    monkeypatch.setattr(connection, "connect", traced)
    return statements


class Bytes:
    """Every time bytes of chunks are gone through, in order, by what was done with them; and files."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, int]] = []
        self.files: Counter[str] = Counter()

    def note(self, what: str, num_bytes: int) -> None:
        self.passes.append((what, num_bytes))

    def of(self, what: str) -> list[int]:
        return [num_bytes for name, num_bytes in self.passes if name == what]

    def forget(self) -> None:
        self.passes.clear()
        self.files.clear()


def count_bytes(monkeypatch: pytest.MonkeyPatch, root: Path) -> Bytes:
    """Reads, writes and hashes of the store's blobs, and opens and syncs of files under ``root``."""
    counted = Bytes()
    read_exactly, blake3 = blobs._read_exactly, blob_content.blake3
    opened, fsync = builtins.open, os.fsync

    def read(file: Any, num_bytes: int) -> Any:
        counted.note("read", num_bytes)
        return read_exactly(file, num_bytes)

    class Hash:
        def __init__(self) -> None:
            self._hash = blake3()

        def update(self, data: bytes) -> None:
            counted.note("hash", len(data))
            self._hash.update(data)

        def hexdigest(self) -> str:
            return str(self._hash.hexdigest())

    class Written:
        """A file of which writes are counted."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            counted.note("write", len(data))
            return int(self._file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Written:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

    def counted_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(path, mode, *args, **kwargs)
        if not str(path).startswith(str(root)):
            return file
        counted.files[f"open {mode}"] += 1
        return Written(file) if "x" in mode else file

    def counted_fsync(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        counted.files["fsync of a folder" if is_folder else "fsync of a file"] += 1
        fsync(descriptor)

    monkeypatch.setattr(blobs, "_read_exactly", read)
    monkeypatch.setattr(blob_content, "blake3", Hash)
    monkeypatch.setattr(builtins, "open", counted_open)
    monkeypatch.setattr(os, "fsync", counted_fsync)
    return counted
