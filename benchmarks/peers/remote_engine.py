"""A ``BenchEngine`` in a process of its own, under another environment's Python.

Times are taken in that process: lines over a pipe cost nothing that is counted.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_speed.engines import Answer
from benchmarks.peers.environments import Environment, PeerUnavailable
from benchmarks.peers.servers import first_error, last_lines, running, stop

_CHILD = ("-m", "benchmarks.peers.engine_process")
_CACHE_BLOCKS = 256  # several prompts of the longest length, a third of what vLLM would take
_START_TIMEOUT_S = 300.0
_ANSWER_TIMEOUT_S = 300.0
_CLOSE_TIMEOUT_S = 20.0
_LOOK_EVERY_S = 0.5


class RemoteEngineError(RuntimeError):
    """The engine could not do what it was asked, or is gone."""


class RemoteEngine:
    """Started by ``command``, which speaks the protocol of ``benchmarks.peers.engine_process``.

    What the process prints otherwise goes to ``log``. Raises ``PeerUnavailable`` when it does not start.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._result(_START_TIMEOUT_S)
        except RemoteEngineError as err:
            self.close()
            # vLLM itself only says that the cause is in the log.
            raise PeerUnavailable(f"its engine does not start: {first_error(log) or err}") from err

    def ask(self, token_ids: Sequence[int], *, salt: str | None = None, **options: Any) -> Answer:
        """One token, on an idle engine; times are of the other process's clock."""
        given = {"call": "ask", "token_ids": list(token_ids), "salt": salt, "options": options}
        return Answer(**self._called(given))

    def forget_local(self) -> bool:
        """Empty vLLM's own prefix cache; False: some of it is in use, and nothing was forgotten."""
        return bool(self._called({"call": "forget_local"}))

    def close(self) -> None:
        """End of input ends the process; one that stays is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # what a process that is gone did not read
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_TIMEOUT_S)
        stop(self._process)
        self._reader.join()
        self._process.stdout.close()

    def _called(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as err:
            raise RemoteEngineError(f"it is gone: {last_lines(self._log)}") from err
        return self._result(_ANSWER_TIMEOUT_S)

    def _result(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            gone = self._process.poll() is not None
            try:
                message = json.loads(self._lines.get(timeout=_LOOK_EVERY_S))
            except queue.Empty:
                if gone:
                    code, said = self._process.returncode, last_lines(self._log)
                    raise RemoteEngineError(f"it ended with {code}: {said}") from None
                if time.monotonic() > deadline:
                    raise RemoteEngineError(f"no answer within {timeout_s:.0f} s") from None
                continue
            if "error" in message:
                raise RemoteEngineError(message["error"])
            return message["result"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A connector's configuration, the server it needs at ``port``, and where and with what both run."""

    config: Mapping[str, Any]
    server: Sequence[str]
    port: int
    environment: Environment
    variables: Mapping[str, str]


@contextmanager
def engine_beside(served: Served, model: Path, folder: Path) -> Iterator[RemoteEngine]:
    """A ``BenchEngine`` with this connector while its server runs; logs go to ``folder``.

    Raises ``PeerUnavailable``.
    """
    options = {"kv_transfer_config": served.config, "num_gpu_blocks_override": _CACHE_BLOCKS}
    engine = [str(served.environment.python), *_CHILD, str(model), json.dumps(options)]
    with (
        running(served.server, served.variables, folder / "server.log", served.port),
        closing(RemoteEngine(engine, served.variables, folder / "engine.log")) as opened,
    ):
        yield opened
