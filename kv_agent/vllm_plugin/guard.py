"""The one place where any error is caught: memory may fail, the engine and its requests may not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


_LOST = "its tokens are computed, its turn is not stored"


def attempt(job: Callable[[], T | None], otherwise: T | None, consequence: str = _LOST) -> T | None:
    """Run a whole job; on any error log it and return ``otherwise``, which must be the safe answer.

    ``consequence`` is for the log: what comes of the error.
    """
    try:
        return job()
    except Exception:
        logger.exception("a memory job failed; %s", consequence, extra={"event": "error"})
        return otherwise
