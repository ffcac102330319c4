"""Eight writers, eight readers and a collector of garbage on one directory: nobody gets in another's way.

``KV_AGENT_CROWD_S=60`` makes it last that long.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.errors import StorageError
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import FINGERPRINT, chain, kv_for, same_bits, turn_of, vector_for
from tests.unit.storage.catalogs import found
from tests.unit.storage.forking import Forks, Say
from tests.unit.storage.stores import holds

pytestmark = pytest.mark.slow

CROWD_S = float(os.environ.get("KV_AGENT_CROWD_S", "3"))
WRITERS = READERS = 8
SHARED = 12  # turns that all writers store, each under ids of its own
MOST = 100_000  # turns of one writer


def own_turn(writer: int, number: int) -> TurnId:
    return TurnId(f"own-{writer}-{number}")


def seed_of(writer: int, number: int) -> int:
    return 100 + WRITERS * number + writer


def write(say: Say, root: str, writer: int, until: float) -> None:
    """Store own and shared turns, forget every third of the own ones -> says how many own ones."""
    store = LocalStore(Path(root), host_bytes=0)
    pick = random.Random(writer)
    number = 0
    while number < MOST and (time.time() < until or number < SHARED):
        own = chain(2, 1, seed=seed_of(writer, number))
        store.put_turn(turn_of(own, own_turn(writer, number), created=time.time()), [], own)
        shared = chain(2, 3, seed=number if number < SHARED else pick.randrange(SHARED))
        store.put_turn(turn_of(shared, f"shared-{writer}-{number}"), [], shared)
        if number % 3 == 2:
            store.forget([own_turn(writer, number - 1)])
        number += 1
    store.close()
    say(number)


def read(say: Say, root: str, until: float) -> None:
    """Load what is listed and found, and compare every byte -> says how many chunks."""
    store = LocalStore(Path(root), host_bytes=0)
    num_loaded = 0
    while time.time() < until:
        turns = store.catalog.list_turns(Scope(), limit=20)
        turns += store.catalog.turns(
            hit.turn_id for hit in store.catalog.search_text("shared text", Scope(), FINGERPRINT, 20)
        ).values()
        for key, record in store.catalog.chunks(key for turn in turns for key in turn.chunk_keys).items():
            try:
                tensor = store.load(record).kv_L2THD
            except StorageError:
                if store.catalog.chunks([key]).get(key) == record:
                    raise  # neither forgotten nor replaced: its bytes should be there
                continue
            assert same_bits(tensor, kv_for(key, record.num_tokens))
            num_loaded += 1
        changes = store.catalog.changes_since(FINGERPRINT, "default", 0, 1000)
        assert all(change.vector in (None, vector_for(change.chunk_key)) for change in changes)
    store.close()
    say(num_loaded)


def collect(say: Say, root: str, until: float) -> None:
    """Collect garbage without a break, of an age at which turns are being stored now and then."""
    store = LocalStore(Path(root), host_bytes=0)
    rounds = 0
    while time.time() < until:
        store.collect_garbage(older_than_s=0.5)
        rounds += 1
        time.sleep(0.05)
    store.close()
    say(rounds)


def join_in(say: Say, role: str, root: str, writer: int, until: float) -> None:
    match role:
        case "writer":
            write(say, root, writer, until)
        case "reader":
            read(say, root, until)
        case _:
            collect(say, root, until)


def test_a_crowd_of_processes_loses_no_row_and_reads_right_bytes(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    root = str(tmp_path)
    roles = ["writer"] * WRITERS + ["reader"] * READERS + ["collector"]
    with Forks() as forks:
        until = time.time() + CROWD_S
        ended = forks.run(join_in, [(role, root, number, until) for number, role in enumerate(roles)])

    # A child that was refused by a lock, or read a wrong byte, ends with 1 and a traceback.
    assert [end.exit_code for end in ended] == [0] * len(roles)
    said = [end.said[0] for end in ended]
    store = LocalStore(tmp_path, host_bytes=0)
    own = {
        own_turn(writer, number): chain(2, 1, seed=seed_of(writer, number))
        for writer in range(WRITERS)
        for number in range(said[writer])
        if number % 3 != 1 or number == said[writer] - 1
    }
    ids = {own_turn(writer, number) for writer in range(WRITERS) for number in range(said[writer])}
    assert store.catalog.known_turns(ids) == own.keys()
    shared_ids = {f"shared-{writer}-{number}" for writer in range(WRITERS) for number in range(said[writer])}
    assert store.catalog.known_turns(map(TurnId, shared_ids)) == shared_ids
    assert store.stats()["turns"] == len(own) + SHARED
    assert holds(store, [chunk for number in range(SHARED) for chunk in chain(2, 3, seed=number)])
    assert holds(store, [chunk for chunks in own.values() for chunk in chunks])
    assert len(found(store.catalog)) == 2 * (len(own) + SHARED)
    assert store.check() == []  # whoever lost a race left no file behind
    assert sum(said[WRITERS:-1]) > 0
    store.close()
    record_property("turns stored, chunks read", (2 * sum(said[:WRITERS]), sum(said[WRITERS:-1])))
