"""How a catalog file is opened, and what becomes of its connection when the file or its disk goes away."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

from kv_agent.config import Fsync
from kv_agent.errors import StorageError, UnstorableError

BUSY_TIMEOUT_S = 30.0

# In WAL mode FULL syncs every commit. NORMAL syncs when the log is moved into the file, so that a power loss
# takes the last commits at most; with OFF it could damage the whole catalog.
_SYNCHRONOUS: dict[Fsync, str] = {"always": "FULL", "never": "NORMAL"}

# 128 MiB of the log are moved into the file at once, by whoever commits then and waits for two syncs. When
# many chunks are stored already every row is on another page: ten turns fill SQLite's 1000 pages, and with
# half of these more than one turn of eight chunks in a hundred would wait.
_CHECKPOINT_PAGES = 32_768

_ADVICE = {
    sqlite3.SQLITE_FULL: "free space on that disk",
    sqlite3.SQLITE_READONLY: "make the folder and its files writable for this process",
    sqlite3.SQLITE_CANTOPEN: "is the disk mounted, the folder writable, the limit of open files reached?",
    sqlite3.SQLITE_IOERR: "check the disk, its free space and quota",
    sqlite3.SQLITE_BUSY: "another process has been writing for too long",
    sqlite3.SQLITE_CORRUPT: "restore it from a copy or use another store directory",
    sqlite3.SQLITE_NOTADB: "restore it from a copy or use another store directory",
}


class ThreadConnection:
    """A connection that is closed when its thread ends; on its own it would await the garbage collector."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self._path = path
        self._file = _identity(path)
        self.has_failed = False

    @property
    def is_in_place(self) -> bool:
        """Whether the file that was opened is the one at that path still.

        Once opened, a file can be read and written after its folder was renamed or its disk unmounted.
        """
        return self._file is not None and _identity(self._path) == self._file

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self.connection.close()

    def __del__(self) -> None:
        self.connection.close()  # no name of a module in here: they may be gone when the interpreter ends


def connect(path: Path, fsync: Fsync, *, create: bool) -> ThreadConnection:
    """A connection as every user of a catalog needs it; with ``create`` the file is made if there is none."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,  # transactions are begun by us, never implicitly
        check_same_thread=False,  # used by one thread, but closed by whoever forks or closes
    )
    try:
        _enter_wal(connection)
        connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[fsync]}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return ThreadConnection(connection, path)


class ThreadConnections:
    """The connections to one catalog, one for each thread that asks.

    Without ``may_create`` a file that is not there is not made.
    """

    def __init__(self, path: Path, fsync: Fsync) -> None:
        self._path = path
        self._fsync = fsync
        self.may_create = True
        self._local = threading.local()
        self._all: weakref.WeakSet[ThreadConnection] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._all)

    def mine(self) -> ThreadConnection:
        """This thread's connection: a new one if it has none, or has one that may no longer be of use."""
        mine: ThreadConnection | None = getattr(self._local, "mine", None)
        if mine is not None and mine.is_in_place and not mine.has_failed:
            return mine
        try:
            fresh = connect(self._path, self._fsync, create=self.may_create)
        except (sqlite3.Error, StorageError) as err:
            if mine is not None:
                return mine  # what is open can still be read
            raise storage_error(self._path, err) from err
        self._all.add(fresh)
        self._local.mine = fresh
        return fresh

    def require_in_place(self) -> None:
        """Raise unless what this thread is writing to is the file in its place."""
        if not self._local.mine.is_in_place:
            raise StorageError(f"catalog {self._path} is not in its place any more; is the disk mounted?")

    def drop(self) -> None:
        """Close all of them, while none is in use."""
        for connection in list(self._all):
            connection.close()
        self._local = threading.local()
        self._all = weakref.WeakSet()


def storage_error(path: Path, err: Exception) -> StorageError:
    """What an error of SQLite, or of a value on its way there, means to whoever uses the catalog."""
    # UnicodeError, OverflowError: values SQLite cannot hold, such as lone surrogates.
    refused = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, UnicodeError, OverflowError)
    if isinstance(err, refused):
        return UnstorableError(f"catalog {path}: {err}")
    advice = _ADVICE.get(_code(err))
    return StorageError(f"catalog {path}: {err}" + (f"; {advice}" if advice else ""))


def is_busy(err: Exception) -> bool:
    """Whether others hold the lock that was needed."""
    return _code(err) == sqlite3.SQLITE_BUSY


def is_worth_reopening(err: Exception) -> bool:
    """Whether another connection may have better luck, once the trouble is over.

    One to a disk that failed may fail for good, one that was opened where it might not write never will.
    """
    return _code(err) in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)


def _code(err: Exception) -> int:
    # The lowest byte is the kind, the rest tells more. Errors of the Python module itself have no code.
    return int(getattr(err, "sqlite_errorcode", 0)) & 0xFF


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is there; ``None`` if none can be seen."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _enter_wal(db: sqlite3.Connection) -> None:
    """Switch to WAL, which survives in the file; later connections find it so."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError as err:
            # Two processes creating the file at once: SQLite refuses one without its busy timeout.
            if not is_busy(err) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise StorageError(f"SQLite cannot use its WAL mode here (got {mode!r}); use a local disk")
