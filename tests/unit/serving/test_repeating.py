"""What is done again and again goes on after trouble, which is told once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from kv_agent.errors import StorageError
from kv_agent.serving.repeating import Repeating


class Work:
    """Does what the steps say, then nothing; ``done`` is set after the last."""

    def __init__(self, *steps: Exception | None) -> None:
        self._steps = list(steps)
        self.done = threading.Event()

    def __call__(self) -> None:
        step = self._steps.pop(0) if self._steps else None
        if not self._steps:
            self.done.set()
        if step is not None:
            raise step


def repeat(work: Callable[[], None]) -> Repeating:
    return Repeating(work, 0.001, name="test", trouble="nothing works while this lasts")


def test_trouble_is_told_once_and_again_after_it_worked(caplog: pytest.LogCaptureFixture) -> None:
    away, bug = StorageError("away"), RuntimeError("a bug")
    work = Work(away, away, None, away, None, bug, bug, None, None)
    repeating = repeat(work)
    assert work.done.wait(30)
    repeating.close()

    told = [(record.levelno, record.getMessage(), record.event) for record in caplog.records]  # type: ignore[attr-defined]
    trouble = (logging.WARNING, "nothing works while this lasts: away", "store_trouble")
    assert told == [trouble, trouble, (logging.ERROR, "nothing works while this lasts", "error")]


def test_it_begins_at_once_and_ends_when_it_is_closed() -> None:
    work = Work(None)
    repeating = Repeating(work, 3600.0, name="test", trouble="")
    assert work.done.wait(30)
    repeating.close()
    repeating.close()
    assert not repeating._thread.is_alive()
