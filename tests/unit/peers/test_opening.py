"""Peers that do not run here are left out with a reason; those that do are timed only if they truly hit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from math import isnan
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.engine_speed.engines import Answer
from benchmarks.peers.asking import forget, remembered
from benchmarks.peers.environments import ROOT, PeerUnavailable
from benchmarks.peers.opening import NEEDS_BYTES, open_peers
from benchmarks.peers.remote_engine import RemoteEngineError
from benchmarks.peers.servers import HOST, free_ports, running

MEMORY = list(range(1, 1025))


class Store:
    """How many tokens come back with each answer, the last number from then on; ``None``: the engine dies."""

    def __init__(self, *brought: int | None, busy: int = 0) -> None:
        self._brought, self._busy = list(brought), busy
        self.closed = False
        self.forgotten = True

    def ask(self, token_ids: Sequence[int], *, salt: str | None = None, **options: Any) -> Answer:
        assert self.forgotten
        self.forgotten = False
        num_cached = self._brought.pop(0) if len(self._brought) > 1 else self._brought[0]
        if num_cached is None:
            raise RemoteEngineError("it ended with 1")
        return Answer(arrivals_s=[0.5], num_cached=num_cached)

    def forget_local(self) -> bool:
        self._busy -= 1
        self.forgotten = self._busy < 0
        return self.forgotten

    def close(self) -> None:
        self.closed = True


def turns() -> Iterator[list[int]]:
    return ([*MEMORY, number] for number in count(2000))


def test_peer_that_cannot_run_is_skipped_with_its_reason(tmp_path: Path) -> None:
    store = Store(0)

    @contextmanager
    def runs(model: Path, folder: Path) -> Iterator[Store]:
        yield store
        store.close()

    @contextmanager
    def cannot(model: Path, folder: Path) -> Iterator[Store]:
        raise PeerUnavailable("no such package")
        yield store

    with ExitStack() as stack:
        peers = open_peers({"runs": runs, "cannot": cannot}, tmp_path, tmp_path, stack, lambda: NEEDS_BYTES)
        assert peers.engines == {"runs": store}
        assert peers.skipped == {"cannot": "no such package"}
        assert not store.closed
    assert store.closed


def test_peer_that_memory_does_not_suffice_for_is_not_started(tmp_path: Path) -> None:
    def starts(model: Path, folder: Path) -> NoReturn:
        raise AssertionError("it was started")

    with ExitStack() as stack:
        peers = open_peers({"big": starts}, tmp_path, tmp_path, stack, lambda: NEEDS_BYTES // 2)

    assert (peers.engines, peers.skipped) == ({}, {"big": "3.0 GiB of memory are free, and 6 have to be"})


def test_memory_is_waited_for_until_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    peer = remembered(Store(0, 0, 0, 1024), len(MEMORY), turns().__next__)

    assert (peer.missed, peer.num_brought) == (None, 1024)


def test_peer_that_brings_nothing_back_missed() -> None:
    peer = remembered(Store(0), len(MEMORY), turns().__next__, timeout_s=0.0)

    assert peer.missed == "0 of 1024 tokens came back"


def test_peer_is_asked_again_though_computing_took_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    peer = remembered(Store(0, 0, 1024), len(MEMORY), turns().__next__, timeout_s=0.0)

    assert peer.missed is None


def test_worst_round_counts() -> None:
    peer = remembered(Store(0, 1024, 896, 511, 1024), len(MEMORY), turns().__next__)

    assert peer.ttft_s() == 0.5
    assert (peer.missed, peer.num_brought) == (None, 896)
    peer.ttft_s()
    peer.ttft_s()
    assert peer.missed == "511 of 1024 tokens came back"


def test_engine_that_dies_between_rounds_missed_and_raises_nothing() -> None:
    peer = remembered(Store(0, 1024, None), len(MEMORY), turns().__next__)

    assert isnan(peer.ttft_s())
    assert peer.missed == "it ended with 1"


def test_cache_in_use_is_forgotten_when_it_no_longer_is() -> None:
    store = Store(0, busy=3)
    store.forgotten = False
    forget(store)
    assert store.forgotten

    with pytest.raises(TimeoutError, match="still in use"):
        forget(Store(0, busy=1000), timeout_s=0.0)


def test_server_is_there_in_the_block_and_gone_after_it(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "http.server", "--bind", HOST, str(port)]

    with running(command, {}, tmp_path / "log", port):
        assert port_is_taken(port)
    assert not port_is_taken(port)


def test_server_that_ends_is_unavailable_and_its_last_words_are_the_reason(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", "import sys; sys.exit('no licence')"]

    with (
        pytest.raises(PeerUnavailable, match="ended with 1: no licence"),
        running(command, {}, tmp_path / "log", port),
    ):
        pass


def test_server_ends_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    code = f"""if True:
        import os, sys
        from pathlib import Path
        from benchmarks.peers.servers import HOST, running
        command = [sys.executable, "-m", "http.server", "--bind", HOST, "{port}"]
        with running(command, {{}}, Path({str(tmp_path / "log")!r}), {port}):
            print("listens", flush=True)
            sys.stdin.read()
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as benchmark:
        assert benchmark.stdout is not None
        assert benchmark.stdout.readline() == b"listens\n"
        benchmark.kill()

    deadline = time.monotonic() + 10.0
    while port_is_taken(port):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def port_is_taken(port: int) -> bool:

    with socket.socket() as one:
        return one.connect_ex((HOST, port)) == 0
