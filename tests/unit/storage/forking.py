"""Processes by the dozen: one that has imported everything forks children in milliseconds.

Children do ``work(say, *args)``, where ``say`` sends a number to the parent, and share nothing with each
other but the directory.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.unit.storage.builders import SPAWN

Say = Callable[[int], None]
_NUMBER_BYTES = 4


class Ended(NamedTuple):
    """How a child ended (minus the signal, if by one) and the numbers it had said."""

    exit_code: int
    said: list[int]


class Forks:
    """Forks children, in its own process without threads or open catalogs; close it, or use a ``with``."""

    def __init__(self) -> None:
        self._parent, child = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(child,))
        self._process.start()
        child.close()
        self._parent.recv()  # importing everything may take longer than a test gives its children

    def run(
        self,
        work: Callable[..., None],
        arguments: Sequence[tuple[Any, ...]],
        kill_after_s: float | None = None,
    ) -> list[Ended]:
        """One child for each of ``arguments``, side by side.

        With ``kill_after_s`` each gets a SIGKILL that long after it started.
        """
        self._parent.send((work, list(arguments), kill_after_s))
        ended: list[Ended] = self._parent.recv()
        return ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parent.close()
        self._process.join(60)
        self._process.close()


def _serve(requests: Connection) -> None:
    requests.send("ready")
    with suppress(EOFError):
        while True:
            work, arguments, kill_after_s = requests.recv()
            children = [_fork(work, args) for args in arguments]
            if kill_after_s is not None:
                time.sleep(kill_after_s)
                for pid, _ in children:
                    os.kill(pid, signal.SIGKILL)
            requests.send([_ended(pid, pipe) for pid, pipe in children])


def _fork(work: Callable[..., None], args: tuple[Any, ...]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            work(lambda number: os.write(writer, number.to_bytes(_NUMBER_BYTES, "little")), *args)
            code = 0
        finally:  # nothing of the process that was forked may run on in the child
            if code:
                traceback.print_exc()
            os._exit(code)
    os.close(writer)
    return pid, reader


def _ended(pid: int, pipe: int) -> Ended:
    data = bytearray()
    while block := os.read(pipe, 1 << 16):
        data += block
    os.close(pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    starts = range(0, len(data) - _NUMBER_BYTES + 1, _NUMBER_BYTES)
    return Ended(code, [int.from_bytes(data[start : start + _NUMBER_BYTES], "little") for start in starts])
