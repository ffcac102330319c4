"""A disk that fails for a while: storing stops with one warning, reading goes on, storing resumes by itself.

Each story is lived through in a process of its own, with the real fault; afterwards the store is looked at
from outside. That every single step may fail is for ``test_crash_points.py``.
"""

from __future__ import annotations

import logging
import resource
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.config import Fsync
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.storage import connection
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.pause import Pause
from kv_agent.storage.store import LocalStore
from kv_agent.storage.writer import BackgroundWriter
from tests.unit.storage import faults
from tests.unit.storage.builders import FINGERPRINT, chain, turn_of
from tests.unit.storage.forking import Forks, Say
from tests.unit.storage.stores import holds

TIMEOUT_S = 60.0
BEFORE = 3  # turns stored before the trouble
TRIES = 20  # turns offered while it lasts

Fault = Callable[[], AbstractContextManager[None]]


class Lines(logging.Handler):
    """What is logged at all, and with which traceback."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.exc_info is None, record.getMessage()
        self.lines.append(record.getMessage())


class Life:
    """A store with its writer, and what it was told is stored."""

    def __init__(self, root: Path, say: Say, first: int = 0, fsync: Fsync = "always") -> None:
        self.store = LocalStore(root, host_bytes=0, fsync=fsync)
        self.warm = LocalStore(root, host_bytes=1 << 30, fsync=fsync)
        self.writer = BackgroundWriter(1 << 20, pause=Pause(0.005, 0.02))
        self.number = first
        self.stored: list[int] = []
        self.log = Lines()
        self._say = say
        logging.getLogger("kv_agent").addHandler(self.log)

    def offer(self) -> str | None:
        """One more turn -> why it is not taken, if so."""
        number, self.number = self.number, self.number + 1

        def job() -> None:
            content = content_of(number)
            self.store.put_turn(turn_of(content, f"turn-{number}"), [], content)
            self.stored.append(number)

        return self.writer.admit(1000) or self.writer.submit(1000, job)

    def store_turns(self, num_turns: int) -> None:
        """Offer turns until so many more are stored."""
        goal = len(self.stored) + num_turns
        deadline = time.monotonic() + TIMEOUT_S
        while len(self.stored) < goal:
            assert time.monotonic() < deadline, self.log.lines
            self.offer()
            assert self.writer.flush(TIMEOUT_S)
            time.sleep(0.001)

    def warm_up(self) -> None:
        """Have everything in memory, too."""
        assert all(holds(self.warm, content_of(number)) for number in self.stored)

    def fail(self) -> str:
        """Offer turns to a disk in trouble, over several pauses -> why they are not taken."""
        failed = self.writer.counts.disk_trouble
        reason = None
        deadline = time.monotonic() + TIMEOUT_S
        while self.writer.counts.disk_trouble < failed + 4 or reason is None:
            assert time.monotonic() < deadline, self.log.lines
            reason = self.offer() or reason
            time.sleep(0.001)
        assert self.writer.flush(TIMEOUT_S)
        return reason

    def require_read(self, *, from_disk: bool = True) -> None:
        """What was stored is found; and read from memory and, if it can be, from the disk.

        If not, it fails as something that may be fine later.
        """
        ids = [TurnId(f"turn-{number}") for number in self.stored]
        assert self.store.catalog.known_turns(ids) == set(ids)
        assert len(self.store.catalog.search_text("text", Scope(), FINGERPRINT, 1000)) == len(ids)
        for number in self.stored:
            assert holds(self.warm, content_of(number))
            if from_disk:
                assert holds(self.store, content_of(number))
            else:
                with pytest.raises(StorageError) as caught:
                    holds(self.store, content_of(number))
                assert not isinstance(caught.value, MissingBlobError | CorruptChunkError)

    def look_from_another_thread(self) -> None:
        """With a connection of its own, which may not be had; the process must survive it."""

        def look() -> None:
            with suppress(StorageError):
                assert self.store.stats()["turns"] == len(self.stored)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(TIMEOUT_S)

    def end(self) -> None:
        assert self.writer.close(TIMEOUT_S)
        self.store.collect_garbage(0)
        assert self.store.check() == []
        self.require_read()
        for number in self.stored:
            self._say(number)
        self.store.close()
        self.warm.close()


def content_of(number: int) -> list:
    return chain(60, 40, seed=number)


def live_through(life: Life, fault: Fault, says: str, *, from_disk: bool = True) -> None:
    """Trouble comes and goes twice, and is told in these words."""
    life.store_turns(BEFORE)
    for time_around in (1, 2):
        life.log.lines.clear()
        before = len(life.stored)
        life.warm_up()
        with fault():
            reason = life.fail()
            for _ in range(TRIES):
                life.offer()
            life.require_read(from_disk=from_disk)
            life.look_from_another_thread()
        assert len(life.stored) == before
        assert len(life.log.lines) == 1, life.log.lines
        assert reason.startswith("storing is paused: ")
        assert says in reason
        assert says in life.log.lines[0]
        lost = life.writer.counts
        life.store_turns(2)
        assert len(life.log.lines) == 2, life.log.lines
        assert "storing works again" in life.log.lines[1]
        assert life.writer.counts.paused >= lost.paused > time_around * TRIES / 2
        life.require_read()


# -- stories, each in its own process -----------------------------------------------------------------


def descriptors(say: Say, root: str) -> None:
    life = Life(Path(root), say)
    live_through(life, faults.out_of_descriptors, "raise the limit of open files", from_disk=False)
    life.end()


def small_files(say: Say, root: str) -> None:
    """Files end at any length: first blobs are cut off, then, where those fit, the catalog's log."""
    life = Life(Path(root), say, fsync="never")
    live_through(
        life, partial(faults.limited, resource.RLIMIT_FSIZE, 100), "raise the limit of a file's size"
    )
    blob_bytes = max(path.stat().st_size for path in Path(root).glob("blobs/*/*"))
    log_bytes = Path(root, "catalog.sqlite3-wal").stat().st_size
    assert log_bytes > blob_bytes
    reasons = set()
    for limit in [0, 1, 4096, *range(blob_bytes + 1, log_bytes + 40_000, (log_bytes + 40_000) // 20)]:
        with faults.limited(resource.RLIMIT_FSIZE, limit):
            for _ in range(3):
                reasons.add((life.offer() or "").partition("/")[0])
                life.writer.flush(TIMEOUT_S)
            life.require_read()
        life.store_turns(1)
    assert {"storing is paused: cannot store blobs", "storing is paused: catalog "} <= reasons
    assert life.writer.counts.bugs == life.writer.counts.unstorable == 0
    life.end()


def unwritable(say: Say, root: str) -> None:
    faults.give_up_privileges()
    life = Life(Path(root), say)
    live_through(life, partial(faults.unwritable, Path(root)), "make the folder writable")
    life.end()


def unwritable_catalog(say: Say, root: str) -> None:
    """The writer's connection is opened while nothing may be written, and writes all the same afterwards."""
    faults.give_up_privileges()
    first = Life(Path(root), say)
    first.store_turns(BEFORE)
    life = Life(Path(root), say, first=100)
    life.stored += first.stored
    first.writer.close(TIMEOUT_S)
    catalog = [path for path in Path(root).iterdir() if path.is_file()]
    for path in catalog:
        path.chmod(0o400)
    assert "readonly" in life.fail()
    life.require_read()
    for path in catalog:
        path.chmod(0o600)
    life.store_turns(2)
    first.store.close()
    first.warm.close()
    life.end()


def renamed(say: Say, root: str) -> None:
    life = Life(Path(root), say)
    live_through(life, partial(faults.renamed, Path(root)), "is the disk mounted?", from_disk=False)
    life.end()


def replaced(say: Say, root: str) -> None:
    life = Life(Path(root), say)
    fault = partial(faults.replaced_by_an_empty_folder, Path(root))
    live_through(life, fault, "is the disk mounted?", from_disk=False)
    life.end()


def replaced_by_a_store(say: Say, root: str) -> None:
    """Another process has made a new store where the disk was: what goes there must not harm the old one."""
    life = Life(Path(root), say)
    life.store_turns(BEFORE)
    (shared,) = life.store.catalog.chunks([content_of(0)[0].key]).values()
    with faults.renamed(Path(root)):
        LocalStore(Path(root), host_bytes=0).close()
        elsewhere = LocalStore(Path(root), host_bytes=0)
        life.offer()
        assert life.writer.flush(TIMEOUT_S)
        with pytest.raises(MissingBlobError):
            life.store.load(shared)
        life.store.quarantine(shared.key, "as whoever misses it does")
        life.store.forget([TurnId("turn-1")])
        life.store.collect_garbage(0)
        assert life.writer.counts.failed == 0
        assert holds(elsewhere, content_of(BEFORE))
        assert elsewhere.stats()["turns"] == 1
        assert elsewhere.check() == []
        elsewhere.close()
        shutil.rmtree(root)
    life.stored.remove(BEFORE)
    assert life.store.stats()["quarantined"] == 0
    life.require_read()
    life.store_turns(1)
    life.end()


def mounted(disk: Path) -> Path:
    """A mount point, for this process alone, of what really lies at ``disk``."""
    mount_point = disk.with_name("mounted")
    faults.enter_own_mounts()
    disk.mkdir()
    mount_point.mkdir()
    faults.bind(disk, mount_point)
    return mount_point


def read_only(say: Say, root: str) -> None:
    mount_point = mounted(Path(root))
    life = Life(mount_point, say)
    live_through(life, partial(faults.mounted_read_only, mount_point), "mount the disk writable")
    life.end()


def unmounted(say: Say, root: str) -> None:
    mount_point = mounted(Path(root))
    life = Life(mount_point, say)
    back = partial(faults.bind, Path(root), mount_point)
    fault = partial(faults.unmounted, mount_point, how_to_return=back)
    live_through(life, fault, "is the disk mounted?", from_disk=False)
    life.end()


def full(say: Say, root: str) -> None:
    faults.enter_own_mounts()
    Path(root).mkdir()
    faults.mount_tmpfs(Path(root), 16 << 20)
    life = Life(Path(root) / "store", say)
    live_through(life, partial(faults.filled, Path(root), 0), "free space on that disk")
    for free_bytes in range(4096, 120_000, 8192):  # at times the blob fits and the catalog does not
        with faults.filled(Path(root), free_bytes):
            for _ in range(5):
                life.offer()
                life.writer.flush(TIMEOUT_S)
            life.require_read()
        life.store_turns(1)
    assert life.writer.counts.bugs == life.writer.counts.unstorable == 0
    life.end()


def full_catalog(say: Say, root: str) -> None:
    """SQLite's own limit of pages, on the writer's connection."""
    life = Life(Path(root), say)

    @contextmanager
    def fault() -> Iterator[None]:
        limit(1)
        yield
        limit(1 << 30)

    def limit(num_pages: int) -> None:
        def job() -> None:
            with life.store.catalog._connection() as db:
                db.execute(f"PRAGMA max_page_count = {num_pages}")

        while life.writer.submit(0, job):
            time.sleep(0.001)
        assert life.writer.flush(TIMEOUT_S)

    life.store_turns(BEFORE)
    with fault():
        deadline = time.monotonic() + TIMEOUT_S
        while not life.writer.counts.disk_trouble:
            assert time.monotonic() < deadline
            life.offer()
            assert life.writer.flush(TIMEOUT_S)
        life.require_read()
        assert ["full; free space" in line for line in life.log.lines] == [True]
    life.store_turns(2)
    life.end()


def locked(say: Say, root: str) -> None:
    connection.BUSY_TIMEOUT_S = 0.01
    life = Life(Path(root), say)

    @contextmanager
    def fault() -> Iterator[None]:
        holder = sqlite3.connect(Path(root) / "catalog.sqlite3", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.execute("ROLLBACK")
        holder.close()

    live_through(life, fault, "another process has been writing")
    life.end()


STORIES = [
    descriptors,
    small_files,
    unwritable,
    unwritable_catalog,
    renamed,
    replaced,
    replaced_by_a_store,
    full_catalog,
    locked,
]
WITH_MOUNTS = [read_only, unmounted, full]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.mark.parametrize("story", [*STORIES, *WITH_MOUNTS], ids=lambda story: story.__name__)
def test_storing_stops_with_a_warning_and_resumes_while_reading_goes_on(
    tmp_path: Path, forks: Forks, story: Callable[[Say, str], None]
) -> None:
    if story in WITH_MOUNTS and not faults.can_mount():
        pytest.skip("this process may not mount anything, not even for itself")
    root = tmp_path / "store"

    ((exit_code, said),) = forks.run(story, [(str(root),)])

    assert exit_code == 0
    if story is not full:  # its disk is gone with it
        store = LocalStore(root, host_bytes=0)
        assert store.catalog.known_turns(TurnId(f"turn-{n}") for n in said) == {f"turn-{n}" for n in said}
        assert all(holds(store, content_of(number)) for number in said)
        assert store.check() == []
        store.close()
