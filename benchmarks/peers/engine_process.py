"""The other end of ``RemoteEngine``: a ``BenchEngine`` that does what lines on its standard input say.

    python -m benchmarks.peers.engine_process MODEL OPTIONS_AS_JSON

A line is a JSON object, and so is its answer on standard output: ``{"result": ...}`` or ``{"error": text}``.
The first line out comes by itself once the engine has started.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.asking import Engine


def serve(started: Callable[[], Engine], lines: Iterable[str], out: IO[str]) -> None:
    """Answer every line until there are no more; an error is an answer too, one at the start the only one."""
    try:
        engine = started()
    except Exception as err:  # noqa: BLE001 - whatever it is, the other end is to know
        _say(out, {"error": _told(err)})
        return
    with closing(engine):
        _say(out, {"result": None})
        for line in lines:
            try:
                _say(out, {"result": _done(engine, json.loads(line))})
            except Exception as err:  # noqa: BLE001 - the same
                _say(out, {"error": _told(err)})


def _done(engine: Engine, request: Mapping[str, Any]) -> Any:
    match request["call"]:
        case "ask":
            answer = engine.ask(request["token_ids"], salt=request["salt"], **request["options"])
            return asdict(answer)
        case "forget_local":
            return engine.forget_local()
        case call:
            raise ValueError(f"unknown call {call!r}")


def _say(out: IO[str], message: Mapping[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _told(err: Exception) -> str:
    return f"{type(err).__name__}: {err}"


def main() -> None:
    model, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Answers alone go where the other end listens; whatever else vLLM prints goes to standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def started() -> Engine:
            from benchmarks.engine_speed.engines import BenchEngine

            return BenchEngine(model, **options)

        serve(started, sys.stdin, out)


if __name__ == "__main__":
    main()
