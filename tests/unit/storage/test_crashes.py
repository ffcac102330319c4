"""Processes killed at random instants while they store and forget: what they were told is durable, is.

``KV_AGENT_CRASHES=200`` makes it that many. A killed process loses no written page, so this is about the
order of steps; that they are synced is for ``test_power_loss.py``.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kv_agent.chunks import TurnId
from kv_agent.config import Fsync
from kv_agent.storage.store import LocalStore, NewChunk
from tests.unit.storage.builders import chain, turn_of
from tests.unit.storage.forking import Forks, Say
from tests.unit.storage.stores import blob_files, holds

pytestmark = pytest.mark.slow

CRASHES = int(os.environ.get("KV_AGENT_CRASHES", "40"))
PER_DIRECTORY = 10
LIFE_S = 0.08
UNSAID = "belongs to no chunk"


def content_of(number: int) -> list[NewChunk]:
    """Two chunks of its own behind one that every turn shares."""
    (shared,) = chain(2)
    return [shared, *chain(2, 3, seed=1 + number, parent=shared.key)]


def turn_id(number: int) -> TurnId:
    return TurnId(f"turn-{number}")


def forgets(number: int) -> bool:
    return number % 4 == 3


def work_forever(say: Say, root: str, first: int, fsync: Fsync) -> None:
    """Step after step, each said when it is done: three turns are stored, then the middle one forgotten."""
    store = LocalStore(Path(root), host_bytes=0, fsync=fsync)
    number = first
    while True:
        if forgets(number):
            store.forget([turn_id(number - 2)])
        else:
            content = content_of(number)
            store.put_turn(turn_of(content, turn_id(number)), [], content)
        say(number)
        number += 1


def after(turns: set[int], number: int) -> set[int]:
    """What is stored after a step."""
    return turns - {number - 2} if forgets(number) else turns | {number}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.mark.parametrize("fsync", ["always", "never"])
def test_killed_at_random_instants_it_loses_at_most_the_step_in_flight(
    tmp_path: Path, forks: Forks, record_property: Callable[[str, object], None], fsync: Fsync
) -> None:
    pick = random.Random(11)
    num_steps = num_lost = num_orphans = 0
    longest_s = LIFE_S
    for crash in range(CRASHES):
        root = tmp_path / str(crash // PER_DIRECTORY)
        if crash % PER_DIRECTORY == 0:
            turns: set[int] = set()
            first = 0
        (ended,) = forks.run(work_forever, [(str(root), first, fsync)], pick.uniform(0, longest_s))
        # On a busy disk a step takes as long as a life elsewhere.
        longest_s = max(LIFE_S, longest_s * (0.8 if ended.said else 1.5))

        assert ended.exit_code == -signal.SIGKILL
        assert ended.said == list(range(first, first + len(ended.said)))
        for number in ended.said:
            turns = after(turns, number)
        in_flight = first + len(ended.said)
        store = LocalStore(root, host_bytes=0)
        known = store.catalog.known_turns(map(turn_id, range(in_flight + 1)))
        assert known in ({turn_id(n) for n in turns}, {turn_id(n) for n in after(turns, in_flight)})
        turns = {number for number in range(in_flight + 1) if turn_id(number) in known}
        problems = store.check()
        assert len(problems) <= 1
        assert all(UNSAID in problem for problem in problems)
        for number in turns:
            assert holds(store, content_of(number))
        assert store.collect_garbage(0).num_files == len(problems)
        assert store.check() == []
        assert len(blob_files(store)) == len({record.blob for record in store.catalog.all_chunks()})
        store.close()
        num_steps += len(ended.said)
        num_lost += turn_id(in_flight) not in known
        num_orphans += len(problems)
        first = in_flight + 1

    assert num_steps > CRASHES / 4
    record_property(
        "kills, steps done, steps in flight lost, orphans", (CRASHES, num_steps, num_lost, num_orphans)
    )
