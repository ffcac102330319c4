"""What a server does again and again beside the requests: in a thread of its own, off the event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kv_agent.errors import StorageError

logger = logging.getLogger(__name__)


class Repeating:
    """Does ``work`` at once and then every ``every_s`` seconds, until closed.

    ``trouble`` says what it means that the work fails; it is logged once, and again after it worked.
    """

    def __init__(self, work: Callable[[], object], every_s: float, *, name: str, trouble: str) -> None:
        self._work = work
        self._every_s = every_s
        self._trouble = trouble
        self._is_in_trouble = False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kv-agent-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for what is being done now, then stop; twice is harmless."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self._work()
                self._is_in_trouble = False
            except StorageError as err:
                if self._is_first():
                    logger.warning("%s: %s", self._trouble, err, extra={"event": "store_trouble"})
            except Exception:  # a bug must not end it: it may work the next time
                if self._is_first():
                    logger.exception("%s", self._trouble, extra={"event": "error"})
            if self._ends.wait(self._every_s):
                return

    def _is_first(self) -> bool:
        is_first = not self._is_in_trouble
        self._is_in_trouble = True
        return is_first
