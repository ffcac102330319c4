"""How often a namespace may ask."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kv_agent.serving.errors import RequestError

ROUNDING = 1e-7  # of a request: what differences of clock readings may be wrong by


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Requests that may come at once, as of ``at`` seconds."""

    left: float
    at: float


def taken(bucket: Bucket | None, per_minute: int, now: float) -> tuple[Bucket, float]:
    """The bucket after one request, and how many seconds too early it came; 0 if it may go on.

    A minute's requests may come at once, then they come one by one as the minute goes by.
    """
    left = float(per_minute)
    if bucket is not None:
        left = min(left, bucket.left + max(now - bucket.at, 0.0) * per_minute / 60)
    if left >= 1 - ROUNDING:
        return Bucket(left=left - 1, at=now), 0.0
    return Bucket(left=left, at=now), (1 - left) * 60 / per_minute


class RateLimits:
    """Counts the requests of each namespace that has a limit, in this process; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, Bucket] = {}

    def take(self, namespace: str, per_minute: int | None) -> None:
        """Count a request; raises :class:`RequestError` (429) with ``Retry-After`` if it is too many."""
        if per_minute is None:
            return
        with self._lock:
            bucket, early_s = taken(self._buckets.get(namespace), per_minute, self._clock())
            self._buckets[namespace] = bucket
        if early_s > 0:
            raise RequestError(
                429,
                f"more than {per_minute} requests per minute; wait {early_s:.1f} s",
                headers={"Retry-After": str(math.ceil(early_s))},
            )
