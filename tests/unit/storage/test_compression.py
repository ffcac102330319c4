"""Packed bytes come back bit for bit, are smaller for KV, and damage is never taken for data."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.errors import CorruptChunkError
from kv_agent.storage.compression import compress, decompress


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def kv_like(dtype: torch.dtype, num_tokens: int = 64) -> torch.Tensor:
    """Normal numbers of a scale per channel, as keys and values have. Flat bytes."""
    generator = torch.Generator().manual_seed(3)
    scales_HD = torch.rand(2, 32, generator=generator)
    return as_bytes((torch.randn(4, 2, num_tokens, 2, 32, generator=generator) * scales_HD).to(dtype))


def unpacked_by_hand(packed: bytes, item_bytes: int) -> bytes:
    """The format once more, in plain Python."""
    planes, at = [], 0
    for _ in range(item_bytes):
        (length,) = struct.unpack_from("<Q", packed, at)
        planes.append(zstandard.ZstdDecompressor().decompress(packed[at + 8 : at + 8 + length]))
        at += 8 + length
    assert at == len(packed)
    return bytes(byte for number in zip(*planes, strict=True) for byte in number)


@settings(max_examples=150, deadline=None)
@given(item_bytes=st.sampled_from([1, 2, 4, 8]), data=st.binary(max_size=600))
def test_any_bytes_come_back(item_bytes: int, data: bytes) -> None:
    data = data[: len(data) - len(data) % item_bytes]
    flat = torch.tensor(list(data), dtype=torch.uint8)

    packed = compress(flat, item_bytes)

    assert packed.dtype == torch.uint8
    assert torch.equal(decompress(packed, item_bytes, len(data)), flat)
    assert unpacked_by_hand(bytes(packed.tolist()), item_bytes) == data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kv_gets_smaller_and_smaller_than_without_planes(dtype: torch.dtype) -> None:
    flat = kv_like(dtype)

    packed = compress(flat, dtype.itemsize)

    assert len(packed) < 0.93 * len(flat)
    assert len(packed) < len(compress(flat, 1))
    assert torch.equal(decompress(packed, dtype.itemsize, len(flat)), flat)


def test_the_result_owns_its_memory_and_can_be_viewed_as_numbers() -> None:
    flat = kv_like(torch.bfloat16)
    packed = compress(flat, 2)

    unpacked = decompress(packed, 2, len(flat))
    packed.zero_()

    assert torch.equal(unpacked.view(torch.bfloat16).view(torch.uint8), flat)
    assert unpacked.untyped_storage().nbytes() == len(flat)


def test_damage_is_found_wherever_it_is() -> None:
    flat = kv_like(torch.bfloat16, num_tokens=2)
    packed = compress(flat, 2)
    rng = random.Random(11)
    silent = []
    for place in range(len(packed)):
        changed = packed.clone()
        changed[place] ^= 1 << rng.randrange(8)
        try:
            unpacked = decompress(changed, 2, len(flat))
        except CorruptChunkError:
            continue
        if not torch.equal(unpacked, flat):
            silent.append(place)
    assert silent == []


def test_every_truncation_and_whatever_follows_is_found() -> None:
    flat = kv_like(torch.float16, num_tokens=1)
    packed = compress(flat, 2)
    for length in range(len(packed)):
        with pytest.raises(CorruptChunkError):
            decompress(packed[:length], 2, len(flat))
    for extra in (b"\0", bytes(packed.tolist())):
        longer = torch.cat([packed, torch.tensor(list(extra), dtype=torch.uint8)])
        with pytest.raises(CorruptChunkError, match="follow"):
            decompress(longer, 2, len(flat))


def test_random_bytes_are_refused() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        noise = torch.tensor(list(rng.randbytes(rng.randrange(60))), dtype=torch.uint8)
        with pytest.raises(CorruptChunkError):
            decompress(noise, rng.choice([1, 2, 4]), 4 * rng.randrange(1, 50))


@pytest.mark.parametrize(
    ("item_bytes", "num_bytes"), [(2, 98), (2, 102), (2, 99), (1, 100), (4, 100), (2, -2)]
)
def test_another_length_or_size_of_numbers_is_refused(item_bytes: int, num_bytes: int) -> None:
    packed = compress(torch.arange(100, dtype=torch.uint8), 2)
    with pytest.raises(CorruptChunkError):
        decompress(packed, item_bytes, num_bytes)


@pytest.mark.parametrize("says_its_size", [True, False])
def test_a_bomb_is_refused_before_memory_is_taken(*, says_its_size: bool) -> None:
    parameters = zstandard.ZstdCompressor(write_content_size=says_its_size, write_checksum=True)
    bomb = parameters.compress(bytes(200 << 20))
    packed = torch.frombuffer(bytearray(struct.pack("<Q", len(bomb)) + bomb), dtype=torch.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptChunkError):
            decompress(packed, 1, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_is_no_data_is_refused() -> None:
    skippable = struct.pack("<II", 0x184D2A50, 8) + bytes(8)
    packed = struct.pack("<Q", len(skippable)) + skippable
    with pytest.raises(CorruptChunkError):
        decompress(torch.frombuffer(bytearray(packed), dtype=torch.uint8), 1, 8)


@pytest.mark.parametrize(
    "data", [torch.zeros(3, dtype=torch.uint8), torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)]
)
def test_what_is_no_flat_bytes_is_refused(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="flat uint8"):
        compress(data, 2)
