"""Every step that storing takes at the operating system and in SQLite; a test acts before each of them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from kv_agent.storage import blobs as blobs_module


class Step(NamedTuple):
    """A system call with its arguments, ``write`` of half a blob, or how an SQL statement begins."""

    name: str
    args: tuple[Any, ...] = ()

    @property
    def is_system_call(self) -> bool:
        return self.name in (*_OS_CALLS, "write")

    @property
    def is_read(self) -> bool:
        """Nothing is different after it."""
        return self.name.startswith(("SELECT", "PRAGMA")) or self.name == "BEGIN"


Act = Callable[[Step], None]

_OS_CALLS = ("open", "mkdir", "fsync", "replace", "unlink")


class Steps:
    """Calls ``act`` with a step before it is taken; without an ``act`` steps are just taken."""

    act: Act | None = None

    def reached(self, name: str, *args: Any) -> None:
        if self.act is not None:
            self.act(Step(name, args))


@contextmanager
def stepping() -> Iterator[Steps]:
    """Steps of the stores that are opened in here.

    They sync nothing really, which takes long: a process that dies loses no page that it has written.
    """
    steps = Steps()
    real_calls = {name: getattr(os, name) for name in _OS_CALLS}
    real_connect = sqlite3.connect
    taken = real_calls | {"fsync": os.fstat}  # fails as it does if there is no such file

    def stepped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            steps.reached(name, *args)
            return taken[name](*args, **options)

        return call

    def open_file(path: Path, mode: str, **options: Any) -> BinaryIO:
        file = open(path, mode, **options)  # noqa: SIM115
        return _InHalves(file, steps) if "x" in mode else file  # type: ignore[return-value]

    class Stepping(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            steps.reached(" ".join(sql.split()[:4]))
            return super().execute(sql.replace("synchronous = FULL", "synchronous = OFF"), *args)

        def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
            steps.reached(" ".join(sql.split()[:4]))
            return super().executemany(sql, *args)

        def commit(self) -> None:
            steps.reached("COMMIT")
            super().commit()

    for name in _OS_CALLS:
        setattr(os, name, stepped(name))
    vars(blobs_module)["open"] = open_file
    sqlite3.connect = lambda *args, **options: real_connect(*args, factory=Stepping, **options)  # type: ignore
    try:
        yield steps
    finally:
        sqlite3.connect = real_connect
        del vars(blobs_module)["open"]
        for name, call in real_calls.items():
            setattr(os, name, call)


class _InHalves:
    """A file whose writes take two steps, so that there is a moment when one half is written."""

    def __init__(self, file: BinaryIO, steps: Steps) -> None:
        self._file = file
        self._steps = steps
        self.seek, self.flush, self.fileno = file.seek, file.flush, file.fileno

    def write(self, data: bytes) -> None:
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._steps.reached("write")
            self._file.write(half)
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
