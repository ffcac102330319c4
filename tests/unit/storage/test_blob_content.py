"""A chunk's bytes come back bit for bit, and whatever was damaged is never taken for the original."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kv_agent.chunks import ChunkKey
from kv_agent.errors import CorruptChunkError
from kv_agent.storage import blob_content
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.codecs import Coded, Payload, data_of
from tests.unit.storage.builders import FINGERPRINT, chain, kv_for, record_of, same_bits, whole

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_encoded_chunks_come_back_bit_for_bit(lengths: list[int], dtype: torch.dtype, seed: int) -> None:
    chunks = chain(*lengths, seed=seed, dtype=dtype)

    data = blob_content.encode({chunk.key: chunk.kv for chunk in chunks}, FINGERPRINT)

    for chunk in chunks:
        tensor = blob_content.decode(data, chunk.key)
        assert same_bits(tensor, chunk.kv)
        blob_content.verify(tensor, record_of(chunk))


def test_safetensors_itself_reads_a_blob_of_mixed_items_each_at_a_multiple_of_its_size(
    tmp_path: Path,
) -> None:
    chunks = {
        ChunkKey(name): kv_for(ChunkKey(f"{number:08x}"), 3, dtype)
        for number, (name, dtype) in enumerate(zip("abcd", reversed(DTYPES), strict=False))
    }
    odd = Coded(
        codec="int8", dtype=torch.float16, shape=(1, 2, 3, 1, 1), data=torch.arange(7, dtype=torch.uint8)
    )
    payloads: dict[ChunkKey, Payload] = {ChunkKey("0"): odd, **chunks}
    path = tmp_path / "blob.safetensors"
    path.write_bytes(data := blob_content.encode(payloads, FINGERPRINT))

    with safe_open(path, "pt") as file:
        for key, payload in payloads.items():
            assert same_bits(file.get_tensor(key), data_of(payload))
    header_end = 8 + blob_content.header_bytes(data[:8], len(data))
    for key, payload in payloads.items():
        span = blob_content.find_tensor(data[8:header_end], key, len(data))
        assert span.start % data_of(payload).itemsize == 0


def test_a_blob_gets_its_header_last_and_without_it_is_refused(tmp_path: Path) -> None:
    first, second = chain(3, 5)
    draft = blob_content.Draft({chunk.key: chunk.kv for chunk in (first, second)}, FINGERPRINT)
    *data, header = draft.parts()
    blobs = BlobFiles(tmp_path)

    blobs.write("torn", data)
    blobs.write("whole", [*data, header])

    assert header.offset == 0
    with pytest.raises(CorruptChunkError):
        blobs.read_chunk(BlobFiles.relpath("torn"), first.key)
    for chunk in (first, second):
        found = blobs.read_chunk(BlobFiles.relpath("whole"), chunk.key)
        assert same_bits(found, chunk.kv)
        assert draft.checksum(chunk.key) == blob_content.checksum(chunk.kv)


def test_safetensors_itself_reads_what_encode_wrote(tmp_path: Path) -> None:
    chunks = chain(5, 3, dtype=torch.bfloat16)
    path = tmp_path / "blob.safetensors"
    path.write_bytes(blob_content.encode({chunk.key: chunk.kv for chunk in chunks}, FINGERPRINT))

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    assert tensors.keys() == {chunk.key for chunk in chunks}
    assert all(same_bits(tensors[chunk.key], chunk.kv) for chunk in chunks)
    assert (metadata["format"], metadata["format_version"]) == ("kv_agent", "3")
    assert metadata["fingerprint"] == FINGERPRINT
    assert json.loads(metadata["checksums"]) == {
        chunk.key: blob_content.checksum(chunk.kv) for chunk in chunks
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_checksum_is_blake3_of_the_row_major_bytes(dtype: torch.dtype) -> None:
    tensor = torch.arange(2 * 2 * 3 * 2 * 4).to(dtype).view(2, 2, 3, 2, 4)
    moved = tensor.transpose(1, 2)

    expected = b"".join(value.view(torch.uint8).numpy().tobytes() for value in moved.reshape(-1, 1))

    assert blob_content.checksum(moved) == f"blake3:{blake3(expected).hexdigest()}"
    assert blob_content.is_of(moved, hashlib.sha256(expected).hexdigest())  # of chunks stored long ago
    assert not blob_content.is_of(moved, hashlib.sha256(expected[1:]).hexdigest())


def test_chunks_that_share_memory_can_go_into_one_blob() -> None:
    buffer = torch.arange(2 * 2 * 2 * 4 * 2 * 4, dtype=torch.float32).view(2, 2, 2, 4, 2, 4)
    tensors = {ChunkKey("a"): buffer[0], ChunkKey("b"): buffer[1], ChunkKey("c"): buffer[1]}

    data = blob_content.encode(tensors, FINGERPRINT)

    assert all(same_bits(blob_content.decode(data, key), tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 2, 3, 4),
        torch.zeros(2, 3, 3, 2, 4),
        torch.zeros(2, 2, 0, 2, 4),
        torch.zeros(2, 2, 3, 2, 4).transpose(0, 2),
        torch.zeros(2, 2, 3, 2, 4, dtype=torch.complex64),
    ],
    ids=["4 dimensions", "3 instead of 2", "no tokens", "not contiguous", "dtype"],
)
def test_encode_refuses_what_is_not_a_chunk(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="chunk k "):
        blob_content.encode({ChunkKey("k"): tensor}, FINGERPRINT)


def test_verify_refuses_other_tokens_bytes_or_checksum() -> None:
    (chunk,) = chain(4)
    record = record_of(chunk)
    blob_content.verify(chunk.kv, record)
    changed = chunk.kv.clone().view(torch.uint8)
    changed[-1, -1, -1, -1, -1] ^= 1

    for tensor, expectation in [
        (chunk.kv, dataclasses.replace(record, token_ids=(1, 2, 3))),
        (chunk.kv, dataclasses.replace(record, num_bytes=record.num_bytes + 1)),
        (chunk.kv, dataclasses.replace(record, checksum="0" * 64)),
        (chunk.kv, dataclasses.replace(record, checksum="blake3:" + "0" * 64)),
        (chunk.kv, dataclasses.replace(record, checksum="")),
        (changed.view(torch.float16), record),
        (chunk.kv[0], record),
    ]:
        with pytest.raises(CorruptChunkError, match=chunk.key):
            blob_content.verify(tensor, expectation)


def read_or_none(blobs: BlobFiles, path: Path, data: bytes, record: object) -> Payload | None:
    path.write_bytes(data)
    try:
        tensor = blobs.read_chunk(record.blob, record.tensor)  # type: ignore[attr-defined]
        blob_content.verify(tensor, record)  # type: ignore[arg-type]
    except CorruptChunkError:
        return None
    return tensor


def test_flipped_bits_and_bytes_anywhere_never_give_another_tensor(tmp_path: Path) -> None:
    chunks = chain(3, 2)
    data = blob_content.encode({chunk.key: chunk.kv for chunk in chunks}, FINGERPRINT)
    blobs = BlobFiles(tmp_path)
    relpath = blobs.write("victim", whole(data))
    record = record_of(chunks[0], blob=relpath)
    generator = torch.Generator().manual_seed(7)
    outcomes = {"identical": 0, "refused": 0}

    for position in range(len(data)):
        # 0x01 turns one digit into another, 0x0F turns F16 into I16.
        pick = int(torch.randint(0, 10, (1,), generator=generator))
        flip = (0x0F, 0x01)[pick - 8] if pick >= 8 else 1 << pick
        damaged = bytearray(data)
        damaged[position] ^= flip
        tensor = read_or_none(blobs, tmp_path / relpath, bytes(damaged), record)
        outcomes["refused" if tensor is None else "identical"] += 1
        assert tensor is None or same_bits(tensor, chunks[0].kv), (position, flip)

    assert outcomes["refused"] > chunks[0].kv.nbytes
    assert outcomes["identical"] >= chunks[1].kv.nbytes  # the other chunk's bytes are not this one's


def test_a_dtype_changed_in_the_header_is_noticed_though_the_data_is_intact(tmp_path: Path) -> None:
    (chunk,) = chain(3, dtype=torch.float8_e4m3fn)
    data = blob_content.encode({chunk.key: chunk.kv}, FINGERPRINT)
    blobs = BlobFiles(tmp_path)
    relpath = blobs.write("victim", whole(data.replace(b'"dtype":"F8_E4M3"', b'"dtype":"F8_E5M2"')))

    with pytest.raises(CorruptChunkError, match="contradicts"):
        blobs.read_chunk(relpath, chunk.key)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    (chunk,) = chain(3)
    data = blob_content.encode({chunk.key: chunk.kv}, FINGERPRINT)
    blobs = BlobFiles(tmp_path)
    relpath = blobs.write("victim", whole(data))

    for length in range(len(data)):
        assert read_or_none(blobs, tmp_path / relpath, data[:length], record_of(chunk, blob=relpath)) is None


FIELDS = st.sampled_from(["__metadata__", "k", "dtype", "shape", "data_offsets", "layout"])
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(header=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_header_is_refused_with_a_corrupt_chunk_error(header: bytes) -> None:
    with pytest.raises(CorruptChunkError):
        blob_content.find_tensor(header, "k", 1 << 20)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("shape", [2, 2, 3, 2, -4]), ("shape", [2, 2, 3, 2, 4.0]), ("shape", "x"),
        ("shape", [2, 2, 3, 2, True]), ("shape", 5), ("shape", None), ("shape", [96]), ("shape", {}),
        ("data_offsets", [0]), ("data_offsets", [0, 10**30]), ("data_offsets", [-192, 0]),
        ("data_offsets", [192, 0]), ("dtype", "F99"), ("dtype", ["F16"]),
    ],
)  # fmt: skip
def test_header_fields_of_any_kind_are_refused(part: str, value: object) -> None:
    (chunk,) = chain(3)
    data = blob_content.encode({chunk.key: chunk.kv}, FINGERPRINT)
    header = json.loads(data[8 : 8 + blob_content.header_bytes(data[:8], len(data))])
    header[chunk.key][part] = value
    field = header[chunk.key]
    header["__metadata__"]["layout"] = json.dumps({chunk.key: [field["dtype"], field["shape"]]})

    with pytest.raises(CorruptChunkError):
        blob_content.find_tensor(json.dumps(header).encode(), chunk.key, len(data))


def test_an_empty_tensor_with_a_size_torch_cannot_hold_is_refused() -> None:
    (chunk,) = chain(3)
    data = blob_content.encode({chunk.key: chunk.kv}, FINGERPRINT)
    header = json.loads(data[8 : 8 + blob_content.header_bytes(data[:8], len(data))])
    header[chunk.key] |= {"shape": [2**70, 2, 0, 2, 4], "data_offsets": [0, 0]}
    header["__metadata__"]["layout"] = json.dumps({chunk.key: ["F16", [2**70, 2, 0, 2, 4]]})

    with pytest.raises(CorruptChunkError, match="contradicts"):
        blob_content.find_tensor(json.dumps(header).encode(), chunk.key, len(data))


@pytest.mark.parametrize(("key", "value"), [("format", "pt"), ("format_version", "4")])
def test_a_foreign_format_or_version_is_refused_by_name(key: str, value: str) -> None:
    (chunk,) = chain(3)
    data = blob_content.encode({chunk.key: chunk.kv}, FINGERPRINT)
    header = json.loads(data[8 : 8 + blob_content.header_bytes(data[:8], len(data))])
    header["__metadata__"][key] = value

    with pytest.raises(CorruptChunkError, match=f"'{value}'"):
        blob_content.find_tensor(json.dumps(header).encode(), chunk.key, len(data))
