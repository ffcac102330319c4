"""What every tier promises, each in a store in which only this one and the disk below it hold chunks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kv_agent.chunks import ChunkRecord, TurnId
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.store import LocalStore, NewChunk
from tests.unit.storage.builders import chain, kv_of, same_bits, turn_of
from tests.unit.storage.stores import blob_files, store_root
from tests.unit.storage.threads import run_threads
from tests.unit.storage.tier_parts import packed_bytes

ROOMY = 1 << 20
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MEMORY = [pytest.param("device", marks=[no_gpu, pytest.mark.gpu]), "host", "warm"]
ALL = [*MEMORY, "disk"]


class Place:
    """One tier of a store; each chunk is a turn of its own."""

    def __init__(self, root: Path, name: str, limit_bytes: int) -> None:
        self.name = name
        if name == "device":
            self.store = LocalStore(
                root, host_bytes=0, device_bytes=limit_bytes, device=torch.device("cuda:0")
            )
        elif name == "host":
            self.store = LocalStore(root, host_bytes=limit_bytes)
        elif name == "warm":
            self.store = LocalStore(root, host_bytes=0, warm_bytes=limit_bytes)
        else:
            self.store = LocalStore(root, host_bytes=0, disk_bytes=limit_bytes)

    def put(self, chunk: NewChunk) -> ChunkRecord | None:
        """Store a chunk and, where storing does not, bring it into the tier."""
        self.store.put_turn(turn_of([chunk], chunk.key), [], [chunk])
        record = self.record(chunk)
        if self.name == "device" and record is not None:
            self.store.load(record)
        return record

    def get(self, record: ChunkRecord) -> Tensor | None:
        """The chunk if this tier has it."""
        before = self.count("hits")
        try:
            kv_L2THD = self.store.load(record).kv_L2THD
        except MissingBlobError:
            return None
        if self.count("hits") == before:
            return None
        assert kv_L2THD.device.type == ("cuda" if self.name == "device" else "cpu")
        return kv_L2THD.cpu()

    def forget(self, chunk: NewChunk) -> None:
        self.store.forget([TurnId(chunk.key)])

    def record(self, chunk: NewChunk) -> ChunkRecord | None:
        return self.store.catalog.chunks([chunk.key]).get(chunk.key)

    def count(self, what: str) -> int:
        return self.store.stats()[f"tier_{self.name}_{what}"]

    def size(self, chunk: NewChunk) -> int:
        """Bytes that the chunk takes in this tier."""
        return packed_bytes(chunk) if self.name == "warm" else kv_of(chunk).nbytes


Places = Callable[[str, int], Place]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    opened: list[Place] = []

    def opening(name: str, limit_bytes: int) -> Place:
        opened.append(Place(tmp_path / f"store-{len(opened)}", name, limit_bytes))
        return opened[-1]

    yield opening
    for place in opened:
        place.store.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_chunk_comes_back_bit_for_bit(places: Places, name: str, dtype: torch.dtype) -> None:
    place = places(name, ROOMY)
    for number in range(5):
        (chunk,) = chain(1 + 3 * number, seed=number, dtype=dtype)
        record = place.put(chunk)
        assert record is not None
        for _ in range(2):
            got = place.get(record)
            assert got is not None
            assert same_bits(got, kv_of(chunk))


@pytest.mark.parametrize("name", ALL)
def test_sums_are_exact(places: Places, name: str) -> None:
    place = places(name, ROOMY)
    chunks = [chunk for number in range(8) for chunk in chain(1 + number, seed=number)]
    for count, chunk in enumerate(chunks, start=1):
        place.put(chunk)
        place.put(chunk)  # the same again is the same
        assert place.count("chunks") == count
        assert place.count("bytes") == sum(map(place.size, chunks[:count]))
    for count, chunk in enumerate(chunks, start=1):
        place.forget(chunk)
        assert place.count("chunks") == len(chunks) - count
        assert place.count("bytes") == sum(map(place.size, chunks[count:]))


@pytest.mark.parametrize("name", ALL)
def test_the_budget_is_never_exceeded_and_sums_stay_exact(places: Places, name: str) -> None:
    limit_bytes = 2000
    place = places(name, limit_bytes)
    rng = random.Random(name)
    chunks = [chunk for number in range(12) for chunk in chain(1 + number % 6, seed=number)]
    assert sum(map(place.size, chunks)) > limit_bytes
    for _ in range(150):
        chunk = chunks[rng.randrange(12)]
        if rng.random() < 0.2:
            place.forget(chunk)
        elif (record := place.record(chunk)) is None:
            place.put(chunk)
        else:
            assert same_bits(place.store.load(record).kv_L2THD.cpu(), kv_of(chunk))
        here = held(place, chunks)
        assert place.count("bytes") == sum(map(place.size, here)) <= limit_bytes
        assert place.count("chunks") == len(here)


def held(place: Place, chunks: list[NewChunk]) -> list[NewChunk]:
    if place.name == "disk":
        return [chunk for chunk in chunks if place.record(chunk) is not None]
    keys = place.store._tiers.chunk_keys()
    return [chunk for chunk in chunks if chunk.key in keys]


@pytest.mark.parametrize("name", ALL)
def test_a_chunk_as_large_as_the_budget_is_kept_and_a_larger_one_is_not(places: Places, name: str) -> None:
    (chunk,) = chain(6)
    size = Place.size(places(name, ROOMY), chunk)

    exact = places(name, size)
    record = exact.put(chunk)
    assert record is not None
    assert exact.get(record) is not None
    assert exact.count("bytes") == size

    small = places(name, size - 1)
    record = small.put(chunk)
    assert small.count("bytes") == small.count("chunks") == 0
    assert (record is None) == (name == "disk")
    if record is not None:
        for _ in range(2):
            assert small.get(record) is None
            assert same_bits(small.store.load(record).kv_L2THD, kv_of(chunk))  # from below


@pytest.mark.parametrize("name", MEMORY)
def test_a_chunk_too_large_for_the_tier_pushes_nothing_out(places: Places, name: str) -> None:
    (small,), (large,) = chain(1), chain(60, seed=1)
    place = places(name, 1000)
    kept = place.put(small)
    assert kept is not None
    record = place.put(large)
    assert record is not None

    place.store.load(record)

    assert place.get(kept) is not None
    assert place.count("demotions") == 0


@pytest.mark.parametrize("name", ALL)
def test_a_view_of_a_large_buffer_does_not_keep_the_buffer(places: Places, name: str) -> None:
    (chunk,) = chain(4)
    buffer = torch.stack([kv_of(chunk), torch.zeros_like(kv_of(chunk)), torch.zeros_like(kv_of(chunk))])
    place = places(name, ROOMY)
    record = place.put(replace(chunk, kv=buffer[0]))
    assert record is not None

    buffer.zero_()
    got = place.get(record)

    assert got is not None
    assert same_bits(got, kv_of(chunk))
    assert got.untyped_storage().nbytes() == kv_of(chunk).nbytes


def forget(place: Place, chunk: NewChunk) -> None:
    place.forget(chunk)


def expire(place: Place, _chunk: NewChunk) -> None:
    place.store.forget_expired(6.0)


def collect(place: Place, _chunk: NewChunk) -> None:
    place.store.collect_garbage(0)


@pytest.mark.parametrize("how", [forget, expire, collect])
@pytest.mark.parametrize("name", ALL)
def test_what_is_forgotten_is_served_by_no_tier(
    places: Places, name: str, how: Callable[[Place, NewChunk], None]
) -> None:
    (chunk,), (other,) = chain(4), chain(3, seed=1)
    place = places(name, ROOMY)
    turn = replace(turn_of([chunk], chunk.key), expires=5.0)
    place.store.put_turn(turn, [], [chunk])
    record, kept = place.record(chunk), place.put(other)
    assert record is not None
    assert kept is not None
    assert same_bits(place.store.load(record).kv_L2THD.cpu(), kv_of(chunk))

    how(place, chunk)

    assert place.get(record) is None
    assert place.record(chunk) is None
    assert (place.count("chunks"), place.count("bytes")) == (1, place.size(other))
    got = place.get(kept)
    assert got is not None
    assert same_bits(got, kv_of(other))


@pytest.mark.parametrize("name", ALL)
def test_a_chunk_that_another_turn_needs_stays_when_one_is_forgotten(places: Places, name: str) -> None:
    (chunk,) = chain(4)
    place = places(name, ROOMY)
    record = place.put(chunk)
    assert record is not None
    scope = replace(turn_of([chunk]).scope, session_id="other")
    place.store.put_turn(turn_of([chunk], "other", scope=scope), [], [chunk])

    place.forget(chunk)

    assert place.get(record) is not None


def quarantine(place: Place, chunk: NewChunk) -> None:
    place.store.quarantine(chunk.key, "test")


def repair(place: Place, chunk: NewChunk) -> None:
    (bad,) = place.store.repair(place.store.inspect())
    assert bad.record.key == chunk.key


@pytest.mark.parametrize("how", [quarantine, repair])
@pytest.mark.parametrize("name", MEMORY)
def test_what_is_quarantined_is_not_served(
    places: Places, name: str, how: Callable[[Place, NewChunk], None]
) -> None:
    (chunk,) = chain(4)
    place = places(name, ROOMY)
    record = place.put(chunk)
    assert record is not None
    (store_root(place.store) / record.blob).unlink()
    assert place.get(record) is not None

    how(place, chunk)

    assert place.get(record) is None
    assert place.count("chunks") == place.count("bytes") == 0
    again = place.put(chunk)  # computed again, it is stored again
    assert again is not None
    assert place.get(again) is not None


@pytest.mark.parametrize("name", ALL)
def test_threads_get_right_bytes_and_keep_sums_exact(places: Places, name: str) -> None:
    limit_bytes = ROOMY if name == "disk" else 1500
    place = places(name, limit_bytes)
    chunks = [chunk for number in range(10) for chunk in chain(1 + number % 5, seed=number)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            chunk = chunks[rng.randrange(10)]
            record = place.record(chunk)
            if rng.random() < 0.2:
                place.forget(chunk)
            elif record is None:
                place.store.put_turn(turn_of([chunk], chunk.key), [], [chunk])
            else:
                try:
                    if not same_bits(place.store.load(record).kv_L2THD.cpu(), kv_of(chunk)):
                        wrong.append(f"{chunk.key} has other bytes")
                except MissingBlobError:
                    continue  # forgotten meanwhile
            if place.count("bytes") > limit_bytes:
                wrong.append("over budget")

    run_threads(work, num_threads=3)

    assert wrong == []
    here = held(place, chunks)
    assert (place.count("chunks"), place.count("bytes")) == (len(here), sum(map(place.size, here)))
    for chunk in chunks:
        place.forget(chunk)
    assert (place.count("bytes"), place.count("chunks"), blob_files(place.store)) == (0, 0, [])


def test_tiers_without_bytes_are_not_in_the_stats_and_host_counts_are_always_there(places: Places) -> None:
    stats = places("disk", ROOMY).store.stats()
    assert {name for name in stats if name.startswith("tier_")} == {
        "tier_disk_bytes",
        "tier_disk_chunks",
        "tier_disk_hits",
        "tier_disk_limit",
    }
    assert stats["tier_disk_limit"] == ROOMY
    assert stats["tiers_moving_bytes"] == 0
    assert stats["host_bytes"] == stats["host_chunks"] == 0

    (chunk,) = chain(3)
    host = places("host", ROOMY)
    host.put(chunk)
    stats = host.store.stats()
    assert stats["host_bytes"] == stats["tier_host_bytes"] == kv_of(chunk).nbytes
    assert stats["host_chunks"] == stats["tier_host_chunks"] == 1
    assert stats["tier_host_limit"] == ROOMY
