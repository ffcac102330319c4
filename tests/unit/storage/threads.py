"""Threads that really get into each other's way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

TIMEOUT_S = 30.0


def run_threads(work: Callable[[int], None], num_threads: int) -> None:
    """Each does ``work`` with a number of its own; returns when all have ended."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
