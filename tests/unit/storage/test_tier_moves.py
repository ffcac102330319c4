"""What is on its way from tier to tier: forgotten, asked for or too much meanwhile; nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from kv_agent.storage import tier_stack
from kv_agent.storage.codecs import Payload
from kv_agent.storage.policy import POLICIES
from kv_agent.storage.ranking import AccessWindow
from kv_agent.storage.store import NewChunk
from kv_agent.storage.tier_stack import TierStack, memory_tiers
from kv_agent.storage.tiers import MemoryTier, OnHost
from tests.unit.storage.builders import chain, kv_of, record_of, same_bits
from tests.unit.storage.clock import Clock
from tests.unit.storage.tier_parts import WAIT_S, AtOnce, Disk, SlowForm, put


@pytest.fixture
def slow() -> Iterator[SlowForm]:
    form = SlowForm()
    yield form
    form.may_hold.set()


@pytest.mark.parametrize("way", ["load", "put"])
def test_what_is_forgotten_on_its_way_into_a_tier_does_not_arrive(slow: SlowForm, way: str) -> None:
    (chunk,) = chain(4)
    disk = Disk([chunk])
    stack = TierStack(
        [MemoryTier("host", 9999, slow, POLICIES["lru"], Clock())], disk.tier, AccessWindow(1), AtOnce()
    )
    do = {
        "load": lambda: stack.load(record_of(chunk)),
        "put": lambda: put(stack, chunk),
    }[way]
    thread = threading.Thread(target=do)
    thread.start()
    assert slow.begun.wait(WAIT_S)

    stack.discard(chunk.key)
    slow.may_hold.set()
    thread.join(WAIT_S)

    assert stack.chunk_keys() == set()
    assert not stack._moves


@dataclass(slots=True)
class PushedOut:
    """A chunk that a second one has pushed out of the host tier and that does not arrive below yet."""

    slow: SlowForm
    first: NewChunk
    second: NewChunk
    host: MemoryTier = field(init=False)
    warm: MemoryTier = field(init=False)
    stack: TierStack = field(init=False)
    background: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        size = kv_of(self.first).nbytes
        self.host = MemoryTier("host", size, OnHost(pinned=False), POLICIES["lru"], Clock())
        self.warm = MemoryTier("warm", 9999, self.slow, POLICIES["lru"], Clock())
        self.background = ThreadPoolExecutor(1)
        disk = Disk([self.first, self.second])
        self.stack = TierStack([self.host, self.warm], disk.tier, AccessWindow(1), self.background)
        for chunk in (self.first, self.second):
            put(self.stack, chunk)
        assert self.slow.begun.wait(WAIT_S)

    def arrive(self) -> None:
        self.slow.may_hold.set()
        self.background.shutdown()


@pytest.fixture
def pushed_out(slow: SlowForm) -> Iterator[PushedOut]:
    one = PushedOut(slow, *chain(4), *chain(4, seed=1))
    yield one
    one.arrive()


def test_what_is_forgotten_on_its_way_down_does_not_arrive(pushed_out: PushedOut) -> None:
    pushed_out.stack.discard(pushed_out.first.key)
    pushed_out.arrive()

    assert pushed_out.host.chunk_keys() == {pushed_out.second.key}
    assert pushed_out.warm.chunk_keys() == set()


def test_what_is_asked_for_on_its_way_down_goes_up_and_is_there_once(pushed_out: PushedOut) -> None:
    first, second = pushed_out.first, pushed_out.second

    assert same_bits(pushed_out.stack.load(record_of(first)).kv_L2THD, kv_of(first))
    pushed_out.arrive()

    assert pushed_out.host.chunk_keys() == {first.key}
    assert pushed_out.warm.chunk_keys() == {second.key}


def test_a_chunk_larger_than_all_that_may_move_moves_alone() -> None:
    chunks = [*chain(4), *chain(4, seed=1)]
    size = kv_of(chunks[0]).nbytes
    memory = memory_tiers(
        device_bytes=0, host_bytes=size, warm_bytes=9999, device=None, policy=POLICIES["lru"]
    )
    stack = TierStack(memory, Disk(chunks).tier, AccessWindow(1), AtOnce(), max_moving_bytes=1)

    for chunk in chunks:
        stack.load(record_of(chunk))

    assert [tier.chunk_keys() for tier in memory] == [{chunks[1].key}, {chunks[0].key}]


def test_memory_goes_back_to_the_system_each_time_so_much_was_pushed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks = [chunk for number in range(8) for chunk in chain(4, seed=number)]
    size = kv_of(chunks[0]).nbytes
    loaded: list[str] = []
    given_back: list[int] = []
    monkeypatch.setattr(tier_stack, "_GIVEN_BACK_BYTES", 3 * size)
    monkeypatch.setattr(tier_stack, "give_back_freed_memory", lambda: given_back.append(len(loaded)))
    host = MemoryTier("host", size, OnHost(pinned=False), POLICIES["lru"], Clock())
    stack = TierStack([host], Disk(chunks).tier, AccessWindow(1), AtOnce())

    for chunk in chunks:  # all but the first push one out
        stack.load(record_of(chunk))
        loaded.append(chunk.key)

    assert given_back == [3, 6]


def test_nobody_waits_for_what_moves_down_and_no_more_of_it_waits_than_is_allowed(slow: SlowForm) -> None:
    chunks = [chunk for number in range(6) for chunk in chain(4, seed=number)]
    size = kv_of(chunks[0]).nbytes
    upper = MemoryTier("host", size, OnHost(pinned=False), POLICIES["lru"], Clock())
    lower = MemoryTier("warm", 9999, slow, POLICIES["lru"], Clock())
    background = ThreadPoolExecutor(1)
    stack = TierStack(
        [upper, lower], Disk(chunks).tier, AccessWindow(1), background, max_moving_bytes=2 * size
    )

    for chunk in chunks:
        assert same_bits(stack.load(record_of(chunk)).kv_L2THD, kv_of(chunk))
    assert stack.counts()["tiers_moving_bytes"] == 2 * size
    assert lower.chunk_keys() == set()
    slow.may_hold.set()
    background.shutdown()

    assert upper.counts()["demotions"] == 5
    assert stack.counts()["tiers_moving_bytes"] == 0
    assert lower.chunk_keys() == {chunks[0].key, chunks[1].key}  # the other three are on disk alone
    assert not stack._moves


def test_a_closed_stack_still_answers_and_moves_nothing_down() -> None:
    chunks = [chunk for number in range(3) for chunk in chain(4, seed=number)]
    size = kv_of(chunks[0]).nbytes
    memory = memory_tiers(
        device_bytes=0, host_bytes=size, warm_bytes=9999, device=None, policy=POLICIES["lru"]
    )
    stack = TierStack(memory, Disk(chunks).tier, AccessWindow(1), ThreadPoolExecutor(1))
    stack.close()
    stack.close()

    for chunk in chunks:
        assert same_bits(stack.load(record_of(chunk)).kv_L2THD, kv_of(chunk))

    assert stack.chunk_keys() == {chunks[-1].key}
    assert stack.counts()["tiers_moving_bytes"] == 0
    assert not stack._moves


def test_what_cannot_be_moved_down_is_told_and_on_disk(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SlowForm):
        def hold(self, kv_L2THD: Tensor) -> Payload:
            raise MemoryError("no memory")

    chunks = [*chain(4), *chain(4, seed=1)]
    size = kv_of(chunks[0]).nbytes
    upper = MemoryTier("host", size, OnHost(pinned=False), POLICIES["lru"], Clock())
    lower = MemoryTier("warm", 9999, Broken(), POLICIES["lru"], Clock())
    stack = TierStack([upper, lower], Disk(chunks).tier, AccessWindow(1), AtOnce())

    for chunk in [*chunks, chunks[0]]:
        assert same_bits(stack.load(record_of(chunk)).kv_L2THD, kv_of(chunk))

    assert [record.message.split(" ", 2)[2] for record in caplog.records] == [
        "could not be moved down from tier host"
    ] * 2
    assert stack.counts()["tiers_moving_bytes"] == 0
    assert not stack._moves
