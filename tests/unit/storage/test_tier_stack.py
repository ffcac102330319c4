"""Chunks in a stack of tiers: against brute force over thousands of steps, among threads, and in trouble.

The upper tier is called "device" and holds KV as "host" does: here it is about who moves where. What is on
its way from tier to tier is for ``test_tier_moves.py``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kv_agent.errors import ConfigError
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.policy import POLICIES, Policy, Usage
from kv_agent.storage.ranking import AccessWindow
from kv_agent.storage.tier_stack import TierStack, memory_tiers
from kv_agent.storage.tiers import Compressed, DiskTier, Form, Held, Loaded, MemoryTier, OnDevice, OnHost
from tests.unit.storage.builders import chain, kv_of, record_of, same_bits
from tests.unit.storage.clock import Clock
from tests.unit.storage.plain_tiers import NAMES, PlainTiers
from tests.unit.storage.threads import run_threads
from tests.unit.storage.tier_parts import AtOnce, Disk, compressible, packed_bytes, put


def tiers_of(limits: Sequence[int], policy: Policy, clock: Clock) -> list[MemoryTier]:
    forms: list[Form] = [OnHost(pinned=False), OnHost(pinned=False), Compressed()]
    return [
        MemoryTier(name, limit, form, policy, clock)
        for name, limit, form in zip(NAMES, limits, forms, strict=True)
        if limit
    ]


@pytest.mark.parametrize("promote_after", [1, 2, 3])
@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_tiers_do_what_brute_force_does(policy_name: str, promote_after: int, seed: int) -> None:
    rng = random.Random(f"{policy_name} {promote_after} {seed}")
    chunks = [compressible(rng.randrange(1, 9), number) for number in range(14)]
    limits = [rng.choice([0, 300, 700]), rng.choice([0, 600, 1200]), rng.choice([0, 400, 1000])]
    if not limits[0]:
        limits[0] = 1  # a tier that can hold nothing, so that "host" stays the second
    policy, clock, disk = POLICIES[policy_name], Clock(), Disk(chunks)
    window = rng.choice([4, 20])
    memory = tiers_of(limits, policy, clock)
    stack = TierStack(memory, disk.tier, AccessWindow(promote_after, window), AtOnce(), clock=clock)
    model = PlainTiers(limits, policy, promote_after, window, disk.chunks)

    for _ in range(400):
        clock.now += rng.choice([0, 1, 1, 50_000])
        chunk = chunks[min(rng.randrange(14), rng.randrange(14))]
        match rng.choice(["load", "load", "load", "use", "put", "discard"]):
            case "load":
                assert same_bits(stack.load(record_of(chunk)).kv_L2THD, kv_of(chunk))
                model.load(chunk, clock.now)
            case "use":
                used = rng.sample(chunks, rng.randrange(1, 5))
                stack.note_uses([record_of(one) for one in used])
                model.note_uses(used, clock.now)
            case "put":
                put(stack, chunk)
                model.put(chunk, clock.now)
            case "discard":
                stack.discard(chunk.key)
                model.discard(chunk.key)
        held = {tier.name: tier.chunk_keys() for tier in memory}
        wanted = {name: set(room.copies) for name, room in zip(NAMES, model.rooms, strict=True) if room.limit}
        assert held == wanted
        assert stack.counts() == model.counts()
        assert sum(map(len, held.values())) == len(stack.chunk_keys())  # a copy is in one tier only
    assert not stack._moves


def test_threads_keep_sums_exact_and_copies_in_one_tier() -> None:
    chunks = [compressible(1 + number % 7, number) for number in range(16)]
    disk = Disk(chunks)
    memory = tiers_of([400, 600, 500], POLICIES["lru"], Clock())
    background = ThreadPoolExecutor(1)
    stack = TierStack(memory, disk.tier, AccessWindow(2, 50), background, max_moving_bytes=500)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(600):
            chunk = chunks[rng.randrange(16)]
            action = rng.random()
            if action < 0.8:
                if not same_bits(stack.load(record_of(chunk)).kv_L2THD, kv_of(chunk)):
                    wrong.append(f"{chunk.key} has other bytes")
            elif action < 0.9:
                put(stack, chunk)
            else:
                stack.discard(chunk.key)
            counts = stack.counts()
            wrong.extend(
                name for name in NAMES if counts[f"tier_{name}_bytes"] > counts[f"tier_{name}_limit"]
            )

    run_threads(work, num_threads=4)
    background.shutdown()

    assert stack.counts()["tiers_moving_bytes"] == 0
    assert wrong == []
    held = [tier.chunk_keys() for tier in memory]
    assert sum(map(len, held)) == len(set().union(*held))
    for tier, keys in zip(memory, held, strict=True):
        sizes = [
            packed_bytes(disk.chunks[key]) if tier.name == "warm" else kv_of(disk.chunks[key]).nbytes
            for key in keys
        ]
        counts = tier.counts()
        assert (counts["bytes"], counts["chunks"]) == (sum(sizes), len(keys))
    assert not stack._moves
    for chunk in chunks:
        stack.discard(chunk.key)
    assert [tier.counts()["bytes"] for tier in memory] == [0, 0, 0]


def test_a_tier_keeps_one_copy_of_a_chunk_that_is_put_twice() -> None:
    (chunk,) = chain(4)
    tier = MemoryTier("host", 9999, OnHost(pinned=False), POLICIES["lru"], Clock())
    usage = Usage(num_bytes=1, num_tokens=4, created=0.0, last_used=0.0)
    held = Held(key=chunk.key, checksum=record_of(chunk).checksum, payload=kv_of(chunk), usage=usage)

    assert tier.put(held) == tier.put(held) == []

    assert tier.counts() == tier.counts() | {"chunks": 1, "bytes": kv_of(chunk).nbytes}
    assert tier.take(chunk.key) is held
    assert tier.take(chunk.key) is None
    assert tier.counts()["bytes"] == 0


def test_other_bytes_under_the_same_key_are_never_served() -> None:
    (old,) = chain(4)
    new = replace(old, kv=kv_of(old) + 1)
    disk = Disk([new])
    (host,) = memory_tiers(device_bytes=0, host_bytes=9999, warm_bytes=0, device=None, policy=POLICIES["lru"])
    stack = TierStack([host], disk.tier, AccessWindow(1), AtOnce())
    put(stack, old)

    for _ in range(2):
        assert same_bits(stack.load(record_of(new)).kv_L2THD, kv_of(new))

    assert host.counts() == host.counts() | {"chunks": 1, "hits": 1, "bytes": kv_of(new).nbytes}


def test_a_view_that_the_disk_gives_is_copied() -> None:
    (chunk,) = chain(4)
    buffer = torch.stack([kv_of(chunk), kv_of(chunk)])
    disk = DiskTier(lambda _record, delta: Loaded(buffer[1], delta), dict)
    (host,) = memory_tiers(device_bytes=0, host_bytes=9999, warm_bytes=0, device=None, policy=POLICIES["lru"])

    kept = TierStack([host], disk, AccessWindow(1), AtOnce()).load(record_of(chunk)).kv_L2THD

    assert same_bits(kept, kv_of(chunk))
    assert kept.untyped_storage().nbytes() == kept.nbytes == host.counts()["bytes"]


def test_what_is_on_a_device_is_used_from_there_though_a_tier_keeps_a_copy() -> None:
    (chunk,) = chain(4)
    there = kv_of(chunk).to("meta")
    disk = DiskTier(lambda _record, delta: Loaded(there, delta), dict)

    class FromDevice(OnHost):
        def hold(self, kv_L2THD: Tensor) -> Tensor:
            return torch.ones(kv_L2THD.shape, dtype=kv_L2THD.dtype)

    host = MemoryTier("host", 9999, FromDevice(pinned=False), POLICIES["lru"], Clock())
    stack = TierStack([host], disk, AccessWindow(1), AtOnce())

    assert stack.load(record_of(chunk)).kv_L2THD is there
    assert same_bits(stack.load(record_of(chunk)).kv_L2THD, torch.ones_like(kv_of(chunk)))
    assert OnDevice(device=there.device).hold(there) is there


def test_a_chunk_is_moved_while_it_is_read_only_where_no_tier_keeps_it() -> None:
    (chunk,) = chain(4)
    kv_L2THD = torch.ones_like(kv_of(chunk))
    disk = DiskTier(lambda _record, delta: Loaded(kv_L2THD + delta, 0), dict)
    (host,) = memory_tiers(device_bytes=0, host_bytes=9999, warm_bytes=0, device=None, policy=POLICIES["lru"])

    alone = TierStack([], disk, AccessWindow(1), AtOnce())
    for _ in range(2):
        found, delta = alone.load(record_of(chunk), 3)
        assert (delta, same_bits(found, kv_L2THD + 3)) == (0, True)

    below = TierStack([host], disk, AccessWindow(2), AtOnce())
    found, delta = below.load(record_of(chunk), 3)  # too seldom to be kept
    assert (delta, same_bits(found, kv_L2THD + 3), host.chunk_keys()) == (0, True, set())
    for moved in (3, 5):  # kept, and found there
        found, delta = below.load(record_of(chunk), moved)
        assert (delta, same_bits(found, kv_L2THD), host.chunk_keys()) == (moved, True, {chunk.key})


def test_compressed_bytes_that_memory_damaged_are_read_from_disk_again() -> None:
    chunk = compressible(8, 3)
    disk = Disk([chunk])
    (warm,) = memory_tiers(device_bytes=0, host_bytes=0, warm_bytes=9999, device=None, policy=POLICIES["lru"])
    stack = TierStack([warm], disk.tier, AccessWindow(1), AtOnce())
    put(stack, chunk)
    payload = warm._held[chunk.key].payload
    assert not isinstance(payload, Tensor)
    payload.data[-1] ^= 1

    assert same_bits(stack.load(record_of(chunk)).kv_L2THD, kv_of(chunk))
    assert stack.counts()["tier_disk_hits"] == 1
    assert stack.chunk_keys() == set()
    assert same_bits(stack.load(record_of(chunk)).kv_L2THD, kv_of(chunk))
    assert stack.chunk_keys() == {chunk.key}


def test_one_scan_over_cold_chunks_leaves_hot_ones_when_two_look_ups_promote() -> None:
    chunks = [chunk for number in range(20) for chunk in chain(4, seed=number)]
    hot, cold = chunks[:3], chunks[3:]
    limit = 3 * kv_of(chunks[0]).nbytes
    (host,) = memory_tiers(
        device_bytes=0, host_bytes=limit, warm_bytes=0, device=None, policy=POLICIES["lru"]
    )
    stack = TierStack([host], Disk(chunks).tier, AccessWindow(2), AtOnce())
    for chunk in [*hot, *hot, *cold]:
        stack.load(record_of(chunk))

    assert host.chunk_keys() == {chunk.key for chunk in hot}


def test_trouble_with_the_disk_is_the_callers_and_leaves_nothing_behind() -> None:
    (chunk,) = chain(3)
    disk = Disk([chunk])
    disk.lost.add(chunk.key)
    memory = memory_tiers(device_bytes=0, host_bytes=999, warm_bytes=999, device=None, policy=POLICIES["lru"])
    stack = TierStack(memory, disk.tier, AccessWindow(1), AtOnce())

    with pytest.raises(MissingBlobError):
        stack.load(record_of(chunk))

    assert stack.chunk_keys() == set()
    assert not stack._moves
    assert stack.counts()["tier_disk_hits"] == 0


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({"host_bytes": 1, "warm_bytes": 1}, ["host", "warm"]),
        ({"host_bytes": 0, "warm_bytes": 1}, ["warm"]),
        ({"host_bytes": 1, "warm_bytes": 0}, ["host"]),
        ({"host_bytes": 0, "warm_bytes": 0}, []),
    ],
)
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_tier_without_bytes_or_without_a_gpu_is_not_there(
    limits: dict[str, int], names: list[str], device: torch.device | None
) -> None:
    found = memory_tiers(device_bytes=0, device=device, policy=POLICIES["lru"], **limits)
    assert [tier.name for tier in found] == names


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_device_tier_without_a_gpu_is_refused(device: torch.device | None) -> None:
    with pytest.raises(ConfigError, match="device_bytes needs a GPU"):
        memory_tiers(device_bytes=1, host_bytes=1, warm_bytes=1, device=device, policy=POLICIES["lru"])


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="tier host"):
        memory_tiers(device_bytes=0, host_bytes=-1, warm_bytes=0, device=None, policy=POLICIES["lru"])
