"""Speaks the protocol of ``benchmarks.peers.engine_process`` for an engine that computes nothing.

python -m tests.unit.peers.echo_engine [does not start | fails elsewhere | dies when asked]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.engine_speed.engines import Answer
from benchmarks.peers.engine_process import serve


class EchoEngine:
    """Its answers hold what was asked; forgetting works at every second try."""

    def __init__(self) -> None:
        self._tries = 0

    def ask(self, token_ids: Sequence[int], *, salt: str | None = None, **options: Any) -> Answer:
        if "dies when asked" in sys.argv:
            sys.stderr.write("no memory left\n")
            sys.stderr.flush()
            os._exit(3)
        if not token_ids:
            raise ValueError("an empty prompt")
        fields = {"token_ids": list(token_ids), "salt": salt, **options}
        return Answer(began_s=1.0, arrivals_s=[0.25], num_cached=len(token_ids), fields=fields)

    def forget_local(self) -> bool:
        self._tries += 1
        return self._tries % 2 == 0

    def close(self) -> None:
        sys.stderr.write("closed\n")


def started() -> EchoEngine:
    if "does not start" in sys.argv:
        raise RuntimeError("no such model")
    if "fails elsewhere" in sys.argv:
        sys.stderr.write("(core) ERROR ImportError: libx.so.1 is missing\n(core) ERROR KeyError: 'x'\n")
        sys.stderr.flush()
        raise RuntimeError("see above")
    return EchoEngine()


if __name__ == "__main__":
    serve(started, sys.stdin, sys.stdout)
