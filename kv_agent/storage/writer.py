"""One background thread that runs storing jobs in order, behind a queue bounded in bytes.

While the disk is in trouble it takes no new jobs, so that nobody copies KV for nothing, and tries one that
waits, or one new one, after every pause.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from kv_agent.errors import StorageError, UnstorableError
from kv_agent.machine import work_aside
from kv_agent.storage.pause import Pause

logger = logging.getLogger(__name__)

Job = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterCounts:
    """What became of the jobs so far.

    Of those that ran, ``disk_trouble`` met trouble with the disk or the catalog, ``unstorable`` could not be
    stored whatever the disk, and ``bugs`` raised another error. The rest were dropped: for a full queue,
    while storing was paused, or after closing.
    """

    done: int = 0
    disk_trouble: int = 0
    unstorable: int = 0
    bugs: int = 0
    queue_full: int = 0
    paused: int = 0
    closed: int = 0

    @property
    def failed(self) -> int:
        return self.disk_trouble + self.unstorable + self.bugs

    @property
    def dropped(self) -> int:
        return self.queue_full + self.paused + self.closed


class BackgroundWriter:
    """Runs jobs one after the other in a daemon thread. Thread-safe; does not survive a fork.

    A job's bytes count as pending until it has run, because until then it holds that memory. One that raises
    :class:`StorageError`, if it is no :class:`UnstorableError`, begins a ``pause``; one that works ends it.
    """

    def __init__(self, limit_bytes: int, name: str = "kv-agent-writer", pause: Pause | None = None) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"limit_bytes must be > 0, got {limit_bytes}")
        self._limit_bytes = limit_bytes
        self._pause = pause or Pause()
        self._jobs: deque[tuple[int, Job]] = deque()
        self._changed = threading.Condition()
        self._pending_bytes = 0
        self._accepted = 0
        self._counted: Counter[str] = Counter()
        self._lost_before = 0  # when the trouble began
        self._warned: set[object] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def admit(self, num_bytes: int) -> str | None:
        """``None`` if :meth:`submit` will take a job of this size; else why it is dropped here and now.

        Ask before preparing a large job. The answer holds for the thread that submits all jobs, unless the
        disk fails in between.
        """
        with self._changed:
            return self._refusal(num_bytes)

    def submit(self, num_bytes: int, job: Job) -> str | None:
        """Queue ``job``, or say why it was dropped: the queue is full, storing is paused, the writer closed.

        A job larger than the whole bound is accepted while nothing else is pending.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes must be >= 0, got {num_bytes}")
        with self._changed:
            if refusal := self._refusal(num_bytes):
                return refusal
            self._jobs.append((num_bytes, job))
            self._pending_bytes += num_bytes
            self._accepted += 1
            self._changed.notify_all()
            return None

    def flush(self, timeout_s: float) -> bool:
        """Wait until every job submitted so far has run; ``False`` after ``timeout_s`` seconds."""
        with self._changed:
            target = self._accepted
            return self._changed.wait_for(lambda: self._num_run() >= target, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Accept no more jobs, run the queued ones, stop; ``False`` if they took longer than that.

        After ``False`` the thread still works through the queue for as long as the process lives. No pause is
        kept any more.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def pending_bytes(self) -> int:
        with self._changed:
            return self._pending_bytes

    @property
    def pending_jobs(self) -> int:
        with self._changed:
            return self._accepted - self._num_run()

    @property
    def counts(self) -> WriterCounts:
        with self._changed:
            return WriterCounts(**self._counted)

    # -- the thread that submits ----------------------------------------------------------------------

    def _refusal(self, num_bytes: int) -> str | None:
        is_pending = self._accepted > self._num_run()
        if self._closed:
            return self._drop("closed", "the writer is closed")
        if (cause := self._pause.cause) is not None and (is_pending or self._pause.remaining_s):
            self._counted["paused"] += 1  # the warning has been given
            return f"storing is paused: {cause}"
        if is_pending and self._pending_bytes + num_bytes > self._limit_bytes:
            advice = (
                f"more than {self._limit_bytes} bytes would wait to be stored; the disk is too slow for this"
                " load, or raise queue_bytes"
            )
            return self._drop("queue_full", "write queue is full", advice)
        return None

    def _drop(self, count: str, reason: str, advice: str | None = None) -> str:
        self._counted[count] += 1
        if self._is_first(count):
            about = {"event": "turn_dropped", "reason": reason}
            logger.warning("%s drops a turn: %s", self._thread.name, advice or reason, extra=about)
        return reason

    def _is_first(self, cause: object) -> bool:
        is_first = cause not in self._warned
        self._warned.add(cause)
        return is_first

    def _num_run(self) -> int:
        return sum(self._counted[name] for name in ("done", "disk_trouble", "unstorable", "bugs"))

    # -- the thread that stores -----------------------------------------------------------------------

    def _run(self) -> None:
        work_aside()
        while True:
            with self._changed:
                while not self._closed and (not self._jobs or self._pause.remaining_s):
                    self._changed.wait(self._pause.remaining_s if self._jobs else None)
                if not self._jobs:
                    return
                num_bytes, job = self._jobs.popleft()
            outcome = self._outcome(job)
            del job  # its tensors, before waiting for the next one
            with self._changed:
                self._pending_bytes -= num_bytes
                self._counted[outcome] += 1
                self._changed.notify_all()

    def _outcome(self, job: Job) -> str:
        """Run a job -> what it is to be counted as."""
        try:
            job()
        except UnstorableError as err:
            if self._is_first(type(err)):
                about = {"event": "turn_dropped", "reason": "unstorable"}
                logger.warning("%s: a turn is not stored: %s", self._thread.name, err, extra=about)
            return "unstorable"
        except StorageError as err:
            self._begin_pause(str(err))
            return "disk_trouble"
        except Exception as err:  # the thread must outlive any job; the turn is lost, the request is not
            if self._is_first((type(err), _place(err))):
                about = {"event": "turn_dropped", "reason": "error"}
                logger.exception("%s: a job failed; its turn is not stored", self._thread.name, extra=about)
            return "bugs"
        self._end_pause()
        return "done"

    def _begin_pause(self, cause: str) -> None:
        with self._changed:
            if is_new := self._pause.failed(cause):
                self._lost_before = self._num_lost()
        if is_new:
            logger.warning(
                "%s: turns are lost until storing works again, which is tried by itself: %s",
                self._thread.name,
                cause,
                extra={"event": "storing_paused", "reason": "disk trouble"},
            )

    def _end_pause(self) -> None:
        with self._changed:
            has_ended = self._pause.worked()
            num_lost = self._num_lost() - self._lost_before
        if has_ended:
            about = {"event": "storing_resumed", "count": num_lost}
            logger.warning(
                "%s: storing works again; %d turns were lost", self._thread.name, num_lost, extra=about
            )

    def _num_lost(self) -> int:
        return self._counted.total() - self._counted["done"]


def _place(err: Exception) -> tuple[str, int] | None:
    """File and line that raised it."""
    trace = err.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
