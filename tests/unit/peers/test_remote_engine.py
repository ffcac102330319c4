"""An engine in another process answers as one in this would, and its end is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.engine_speed.engines import Answer
from benchmarks.peers.environments import ROOT, PeerUnavailable
from benchmarks.peers.remote_engine import RemoteEngine, RemoteEngineError


def start(folder: Path, *arguments: str) -> RemoteEngine:
    command = [sys.executable, "-m", "tests.unit.peers.echo_engine", *arguments]
    return RemoteEngine(command, {**os.environ, "PYTHONPATH": str(ROOT)}, folder / "log")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RemoteEngine]:
    with closing(start(tmp_path)) as engine:
        yield engine


def test_question_and_answer_cross_the_pipe_unchanged(engine: RemoteEngine) -> None:
    answer = engine.ask([5, 6, 7], salt="s", scope={"user_id": "u"})

    assert answer == Answer(
        began_s=1.0,
        arrivals_s=[0.25],
        num_cached=3,
        fields={"token_ids": [5, 6, 7], "salt": "s", "scope": {"user_id": "u"}},
    )
    assert answer.ttft_s == 0.25


def test_whether_it_forgot_is_told(engine: RemoteEngine) -> None:
    assert [engine.forget_local() for _ in range(4)] == [False, True, False, True]


def test_error_of_the_engine_is_raised_here_and_the_next_question_is_answered(engine: RemoteEngine) -> None:
    with pytest.raises(RemoteEngineError, match="ValueError: an empty prompt"):
        engine.ask([])

    assert engine.ask([1]).num_cached == 1


def test_engine_that_does_not_start_is_unavailable_and_its_error_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match="engine does not start: RuntimeError: no such model"):
        start(tmp_path, "does not start")


def test_first_error_of_the_log_is_the_reason_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match=r"start: ImportError: libx\.so\.1 is missing$"):
        start(tmp_path, "fails elsewhere")


def test_process_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with closing(start(tmp_path, "dies when asked")) as engine:
        with pytest.raises(RemoteEngineError, match="ended with 3: no memory left"):
            engine.ask([1])
        with pytest.raises(RemoteEngineError, match="no memory left"):
            engine.ask([1])


def test_closing_lets_the_engine_close(tmp_path: Path) -> None:
    start(tmp_path).close()

    assert (tmp_path / "log").read_text(encoding="utf-8") == "closed\n"
