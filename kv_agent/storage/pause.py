"""When to try again after trouble: pauses that double, with one trial after each. No I/O, no threads."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pause:
    """Trouble, from its beginning to the first success. Times are in seconds of ``clock``; not thread-safe.

    The first pause lasts ``first_s``, each one twice as long as the one before, but none longer than
    ``longest_s``. They are short again once there was no trouble for ``longest_s``: a disk that is full for
    large turns and not for small ones is in trouble again and again.
    """

    def __init__(
        self, first_s: float = 1.0, longest_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 < first_s <= longest_s:
            raise ValueError(
                f"pauses must be > 0 s and the first not the longest, got {first_s}, {longest_s}"
            )
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._next_s = first_s
        self._until = 0.0
        self._ended: float | None = None
        self._cause: str | None = None

    @property
    def cause(self) -> str | None:
        """What the trouble is; ``None`` while there is none."""
        return self._cause

    @property
    def remaining_s(self) -> float:
        """How long to wait before the next trial; 0 when it is time, or when there is no trouble."""
        return 0.0 if self._cause is None else max(0.0, self._until - self._clock())

    def failed(self, cause: str) -> bool:
        """There is trouble, or a trial has shown that there still is -> whether it is new."""
        now = self._clock()
        is_new = self._cause is None
        if is_new and self._ended is not None and now - self._ended > self._longest_s:
            self._next_s = self._first_s
        self._cause = cause
        self._until = now + self._next_s
        self._next_s = min(2 * self._next_s, self._longest_s)
        return is_new

    def worked(self) -> bool:
        """Something went well -> whether that ends a trouble."""
        ends = self._cause is not None
        if ends:
            self._cause, self._ended = None, self._clock()
        return ends
