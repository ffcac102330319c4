"""Servers of peers: started on a free port of this machine, waited for, stopped with all they started."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.peers.environments import PeerUnavailable

HOST = "127.0.0.1"
_STOP_TIMEOUT_S = 10.0
_LAST_LINES = 3
_PR_SET_PDEATHSIG = 1
_EXCEPTION = re.compile(r"\b\w+(?:Error|Exception): .*")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment, each another."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def running(
    command: Sequence[str], variables: Mapping[str, str], log: Path, port: int, timeout_s: float = 60.0
) -> Iterator[None]:
    """A server that listens on ``port``, until the end of the block; what it says goes to ``log``.

    Raises ``PeerUnavailable`` when it ends or does not listen in time.
    """
    name = Path(command[0]).name
    with log.open("wb") as lines:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=lines, stderr=lines,
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + timeout_s
        while not _listens(port):
            if process.poll() is not None:
                raise PeerUnavailable(f"{name} ended with {process.returncode}: {last_lines(log)}")
            if time.monotonic() > deadline:
                raise PeerUnavailable(f"{name} did not listen within {timeout_s:.0f} s: {last_lines(log)}")
            time.sleep(0.1)
        yield
    finally:
        stop(process)


def _end_with_parent() -> None:
    """Of a server: however the benchmark ends, killed too, it leaves nothing behind that holds memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session of its own, and whatever it left in that session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)


def last_lines(log: Path) -> str:
    lines = _text(log).splitlines()
    return " ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:])


def first_error(log: Path) -> str | None:
    """The first exception that a log tells of: those that follow were caused by it."""
    found = _EXCEPTION.search(_text(log))
    return found[0] if found else None


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _listens(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1.0)
        return one.connect_ex((HOST, port)) == 0
