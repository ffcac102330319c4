"""Waiting for what was captured: many threads at once, one of which looks for all."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable

import pytest

from kv_agent.chunks import TurnId
from kv_agent.errors import StorageError
from kv_agent.pending import PendingTurns


class Disk:
    """What is stored, and by how many it is being asked at this moment."""

    def __init__(self) -> None:
        self.stored: set[TurnId] = set()
        self.told: list[TurnId] = []
        self.num_asking = 0
        self.most_asking = 0
        self._lock = threading.Lock()

    def settled(self, turn_ids: Iterable[TurnId]) -> frozenset[TurnId]:
        with self._lock:
            self.num_asking += 1
            self.most_asking = max(self.most_asking, self.num_asking)
        found = frozenset(self.stored) & frozenset(turn_ids)
        with self._lock:
            self.num_asking -= 1
        return found

    def on_settled(self, turn_ids: frozenset[TurnId]) -> None:
        self.told += sorted(turn_ids)


def test_each_of_many_threads_waits_for_its_own_and_one_looks_for_all() -> None:
    disk = Disk()
    pending = PendingTurns(disk.settled, disk.on_settled)
    captured = [TurnId(f"{thread} {number}") for thread in range(16) for number in range(20)]
    too_early: list[TurnId] = []

    def store(thread: int) -> None:
        for turn_id in captured[thread * 20 : thread * 20 + 20]:
            pending.add(turn_id)
            writer = threading.Timer(random.Random(turn_id).random() / 100, disk.stored.add, [turn_id])
            writer.start()
            assert pending.wait(30)
            if turn_id not in disk.stored or turn_id not in disk.told:
                too_early.append(turn_id)
            writer.join()

    threads = [threading.Thread(target=store, args=(thread,)) for thread in range(16)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()

    assert too_early == []
    assert disk.most_asking == 1
    assert sorted(disk.told) == sorted(captured)


def test_what_comes_later_is_not_waited_for() -> None:
    disk = Disk()
    pending = PendingTurns(disk.settled, disk.on_settled)
    pending.add(TurnId("one"))
    threading.Timer(0.02, lambda: (pending.add(TurnId("never")), disk.stored.add(TurnId("one")))).start()

    assert pending.wait(30)
    assert not pending.wait(0)


def test_who_has_waited_too_long_gives_up_once(caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    pending = PendingTurns(disk.settled, disk.on_settled)
    for turn_id in ("one", "two"):
        pending.add(TurnId(turn_id))
    disk.stored.add(TurnId("one"))

    assert not pending.wait(0.01)
    assert [record.message for record in caplog.records] == ["1 captured turns are not on disk after 0 s"]
    assert pending.wait(0)
    assert disk.told == ["one"]


def test_trouble_is_everybodys_who_waits_and_over_when_it_is_over() -> None:
    disk = Disk()
    is_away = threading.Event()
    is_away.set()

    def settled(turn_ids: Iterable[TurnId]) -> frozenset[TurnId]:
        if is_away.is_set():
            time.sleep(0.005)
            raise StorageError("away")
        return disk.settled(turn_ids)

    pending = PendingTurns(settled, disk.on_settled)
    pending.add(TurnId("one"))
    disk.stored.add(TurnId("one"))
    failed: list[bool] = []

    def wait() -> None:
        try:
            pending.wait(30)
        except StorageError:
            failed.append(True)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failed == [True] * 4
    is_away.clear()
    assert pending.wait(0)
