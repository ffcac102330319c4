"""One background thread that runs storing jobs in order, behind a queue bounded in bytes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

Job = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterCounts:
    """What became of the submitted jobs so far."""

    done: int
    failed: int
    dropped: int


class BackgroundWriter:
    """Runs jobs one after the other in a daemon thread. Thread-safe; does not survive a fork.

    A job's bytes count as pending until it has run, because until then it holds that memory.
    """

    def __init__(self, limit_bytes: int, name: str = "kv-agent-writer") -> None:
        if limit_bytes <= 0:
            raise ValueError(f"limit_bytes must be > 0, got {limit_bytes}")
        self._limit_bytes = limit_bytes
        self._jobs: deque[tuple[int, Job]] = deque()
        self._changed = threading.Condition()
        self._pending_bytes = 0
        self._accepted = self._done = self._failed = self._dropped = 0
        self._warned: set[str] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def admit(self, num_bytes: int) -> bool:
        """Whether :meth:`submit` will take a job of this size; if not, it is dropped here and now.

        Ask before preparing a large job. The answer holds for the thread that submits all jobs.
        """
        with self._changed:
            if self._closed:
                return self._drop("the writer is closed")
            return self._fits(num_bytes) or self._drop(self._full())

    def submit(self, num_bytes: int, job: Job) -> bool:
        """Queue ``job``; ``False`` means it was dropped: the queue is full or the writer closed.

        A job larger than the whole bound is accepted while nothing else is pending.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes must be >= 0, got {num_bytes}")
        with self._changed:
            if self._closed:
                return self._drop("the writer is closed")
            if not self._fits(num_bytes):
                return self._drop(self._full())
            self._jobs.append((num_bytes, job))
            self._pending_bytes += num_bytes
            self._accepted += 1
            self._changed.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until every job submitted so far has run; ``False`` after ``timeout_s`` seconds."""
        with self._changed:
            target = self._accepted
            return self._changed.wait_for(lambda: self._done + self._failed >= target, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Accept no more jobs, run the queued ones, stop; ``False`` if they took longer than that.

        After ``False`` the thread still works through the queue for as long as the process lives.
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
    def counts(self) -> WriterCounts:
        with self._changed:
            return WriterCounts(done=self._done, failed=self._failed, dropped=self._dropped)

    def _fits(self, num_bytes: int) -> bool:
        pending = self._accepted - self._done - self._failed
        return not pending or self._pending_bytes + num_bytes <= self._limit_bytes

    def _full(self) -> str:
        return (
            f"more than {self._limit_bytes} bytes would wait to be stored; the disk is too slow"
            " for this load, or raise queue_bytes"
        )

    def _drop(self, cause: str) -> bool:
        self._dropped += 1
        if cause not in self._warned:
            self._warned.add(cause)
            logger.warning("%s drops a turn: %s", self._thread.name, cause)
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                num_bytes, job = self._jobs.popleft()
            succeeded = self._succeeds(job)
            del job  # its tensors, before waiting for the next one
            with self._changed:
                self._pending_bytes -= num_bytes
                self._done += succeeded
                self._failed += not succeeded
                self._changed.notify_all()

    def _succeeds(self, job: Job) -> bool:
        try:
            job()
        except Exception:  # the thread must outlive any job; the turn is lost, the request is not
            logger.exception("%s: a job failed; its turn is not stored", self._thread.name)
            return False
        return True
