"""How chunks are written: lossless ones come back bit for bit, the others within half a step."""

# L layers, T tokens, H kv heads, D head dim

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.chunks import ChunkKey, CodecName
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.kv import dequantise_kernel
from kv_agent.kv.rope import RotaryScheme, place_keys, rotate_keys, unrotate_keys
from kv_agent.storage import blob_content
from kv_agent.storage.archive import Archive
from kv_agent.storage.codecs import CODECS, Codec, Coded, coded_bytes
from kv_agent.storage.compression import compress
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.storage.transfer import export_turns, import_archive
from tests.unit.storage import mutations
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, same_bits, turn_of

SCHEME = RotaryScheme(inv_freq=(1.0, 0.3), rotary_dim=4, neox=False)
NEOX = RotaryScheme(inv_freq=(1.0, 0.3), rotary_dim=4, neox=True)
LOSSY: list[CodecName] = ["int8", "int8+zstd", "int4", "int4+zstd"]


def numbers(*lengths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[NewChunk]:
    """As ``chain``, with KV of plain numbers: random bits are not all numbers."""
    return [
        replace(chunk, kv=kv_of(len(chunk.token_ids), D=4, dtype=dtype))
        for chunk in chain(*lengths, seed=seed, dtype=dtype)
    ]


def kv_of(T: int, *, L: int = 2, H: int = 2, D: int = 8, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(L, 2, T, H, D, generator=torch.Generator().manual_seed(T)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(["raw", "raw+zstd"]),
    num_tokens=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]),
    start=st.integers(0, 5000),
)
def test_lossless_codecs_give_the_same_bits(
    codec: CodecName, num_tokens: int, dtype: torch.dtype, start: int
) -> None:
    kv = kv_of(num_tokens, dtype=dtype)
    chosen = Codec(name=codec)
    assert same_bits(chosen.decode(chosen.encode(kv, start), start), kv)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [0, 1000])
def test_quantised_kv_is_near_what_it_was(codec: CodecName, dtype: torch.dtype, start: int) -> None:
    kv = kv_of(70, dtype=dtype)
    bits = int(codec[3])
    chosen = Codec(name=codec, scheme=SCHEME)

    found = chosen.decode(chosen.encode(kv, start), start)

    assert (found.dtype, found.shape) == (dtype, kv.shape)
    rounding = 2.0**-7 * 5  # of the dtype, for numbers up to 5
    levels = 127 if bits == 8 else 7
    keys, plain = unrotate_keys(found[:, 0], start, SCHEME), unrotate_keys(kv[:, 0], start, SCHEME)
    # A group is at most one row, and a step 12 % above what its largest number needs, so this bounds it.
    of_keys = 0.57 * plain.abs().amax(1, keepdim=True) / levels + rounding
    of_values = 0.57 * kv[:, 1].float().abs().amax((-2, -1), keepdim=True) / levels + rounding
    assert ((keys - plain).abs() <= of_keys).all()
    assert ((found[:, 1].float() - kv[:, 1].float()).abs() <= of_values).all()
    assert not same_bits(found, kv)


def test_keys_are_quantised_before_rotation() -> None:
    """A channel that is constant before rotation costs nothing, wherever the text stands."""
    kv = torch.ones(1, 2, 50, 1, 4)
    kv[:, 0] = place_keys(kv[:, 0], 300, SCHEME)  # as if computed from position 300 on
    chosen = Codec(name="int4", scheme=SCHEME)

    found = chosen.decode(chosen.encode(kv, 300), 300)

    assert torch.allclose(found, kv, atol=5e-3)


@pytest.mark.parametrize("codec", LOSSY)
def test_moving_a_quantised_chunk_turns_its_keys_as_any_others(codec: CodecName) -> None:
    chosen = Codec(name=codec, scheme=SCHEME)
    payload = chosen.encode(kv_of(20, dtype=torch.float32), 5)

    moved = rotate_keys(chosen.decode(payload, 5)[:, 0], 100, SCHEME)

    assert torch.allclose(moved, chosen.decode(payload, 105)[:, 0], atol=1e-4)


@pytest.mark.parametrize(("base", "most"), [("int8", 0.53), ("int4", 0.30)])
@pytest.mark.parametrize("num_tokens", [12, 20, 64, 128])
def test_a_turn_takes_this_share_of_its_bytes(base: CodecName, most: float, num_tokens: int) -> None:
    kv = kv_of(num_tokens, L=6, D=64)
    payload = Codec(name=base, scheme=SCHEME).encode(kv, 0)
    assert payload.nbytes == coded_bytes(base, tuple(kv.shape), kv.dtype)
    assert payload.nbytes <= most * kv.nbytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_numbers_that_have_no_scale_are_stored_as_they_are(bad: float) -> None:
    kv = kv_of(5, dtype=torch.float32)
    kv[0, 0, 0, 0, -1] = bad
    assert Codec(name="int8", scheme=SCHEME).encode(kv, 0) is kv
    packed = Codec(name="int8+zstd", scheme=SCHEME).encode(kv, 0)
    assert isinstance(packed, Coded)
    assert packed.codec == "raw+zstd"


def test_without_the_rotary_embedding_nothing_is_quantised_and_nothing_quantised_is_read() -> None:
    kv = kv_of(5)
    assert Codec(name="int8").encode(kv, 0) is kv
    with pytest.raises(StorageError, match="rotary embedding"):
        Codec().decode(Codec(name="int8", scheme=SCHEME).encode(kv, 0), 0)


@pytest.mark.parametrize("codec", [*LOSSY, "raw+zstd"])
@pytest.mark.parametrize("scheme", [SCHEME, NEOX], ids=["interleaved", "neox"])
def test_bytes_that_do_not_fit_the_shape_are_damage(codec: CodecName, scheme: RotaryScheme) -> None:
    chosen = Codec(name=codec, scheme=scheme)
    payload = chosen.encode(kv_of(5), 0)
    assert isinstance(payload, Coded)
    L, two, T, H, D = payload.shape
    for wrong in (
        replace(payload, shape=(L, two, T + 1, H, D)),
        replace(payload, data=payload.data[:-1]),
        replace(payload, data=torch.cat([payload.data, payload.data[:1]])),
    ):
        with pytest.raises(CorruptChunkError):
            chosen.decode(wrong, 0)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", [SCHEME, NEOX], ids=["interleaved", "neox"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 5, 2, 8),
        (2, 3, 5, 2, 8),
        (-2, 2, 5, -2, 8),
        (2, 2, 0, 2, 8),
        (2, 2, 5, 16),
        (2, 2, 5, 2, 8, 1),
        (),
    ],
    ids=["no values", "three parts", "negative", "empty", "too few dims", "too many dims", "none"],
)
def test_shapes_that_no_kv_has_are_damage(
    codec: CodecName, dtype: torch.dtype, scheme: RotaryScheme, shape: tuple[int, ...]
) -> None:
    """Also where the bytes are as many as for KV of that shape."""
    base, _, packing = codec.partition("+")
    num_bytes = coded_bytes(base, shape, dtype) if len(shape) == 5 else 100
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    payload = Coded(codec=codec, dtype=dtype, shape=shape, data=compress(data, 1) if packing else data)
    with pytest.raises(CorruptChunkError, match="is not"):
        Codec(scheme=scheme).decode(payload, 0)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_heads_smaller_than_what_is_turned_are_refused_before_machine_code_sees_them(
    codec: CodecName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantise_kernel, "dequantised", None)
    shape = (2, 2, 5, 8, 2)
    data = torch.zeros(coded_bytes(codec, shape, torch.bfloat16), dtype=torch.uint8)
    with pytest.raises(ValueError, match="D >= 4"):
        Codec(scheme=NEOX).decode(Coded(codec=codec, dtype=torch.bfloat16, shape=shape, data=data), 0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [None, SCHEME, NEOX], ids=["none", "interleaved", "neox"])
def test_only_what_needs_machine_code_has_it_made_beforehand(
    codec: CodecName, dtype: torch.dtype, scheme: RotaryScheme | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(dequantise_kernel, "compiled", made.append)

    Codec(name=codec, scheme=scheme).prepare(dtype, num_heads=2, head_dim=8)

    is_needed = codec in LOSSY and scheme is NEOX and dtype == torch.bfloat16
    assert made == ([int(codec[3])] if is_needed else [])


def test_after_preparing_the_first_chunk_is_decoded_by_what_was_made() -> None:
    chosen = Codec(name="int4", scheme=NEOX)
    chosen.prepare(torch.bfloat16, num_heads=2, head_dim=8)
    before = dequantise_kernel.compiled.cache_info()

    chosen.decode(chosen.encode(kv_of(5), 0), 0)

    after = dequantise_kernel.compiled.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


@pytest.mark.parametrize("codec", [*LOSSY, "raw+zstd"])
def test_a_damaged_blob_never_gives_other_kv(codec: CodecName) -> None:
    chosen = Codec(name=codec, scheme=SCHEME)
    (chunk,) = numbers(6, dtype=torch.float32)
    payload = chosen.encode(chunk.kv, 0)
    record = replace(
        record_of(chunk), checksum=blob_content.checksum(payload), num_bytes=payload.nbytes, codec=codec
    )
    good = chosen.decode(payload, 0)
    data = blob_content.encode({chunk.key: payload}, FINGERPRINT)
    counts = {"right": 0, "refused": 0}
    for seed in range(600):
        try:
            read = blob_content.decode(mutations.mutated(data, random.Random(seed)), chunk.key)
            blob_content.verify(read, record)
        except CorruptChunkError:
            counts["refused"] += 1
        else:
            assert same_bits(chosen.decode(read, 0), good), seed
            counts["right"] += 1
    assert counts["refused"] > 300
    assert counts["right"] > 10


def test_what_a_coded_chunk_is_of_cannot_be_changed_unnoticed() -> None:
    (chunk,) = numbers(6, dtype=torch.float16)
    payload = Codec(name="int8", scheme=SCHEME).encode(chunk.kv, 0)
    assert isinstance(payload, Coded)
    record = replace(
        record_of(chunk), checksum=blob_content.checksum(payload), num_bytes=payload.nbytes, codec="int8"
    )
    blob_content.verify(payload, record)
    L, two, T, H, D = payload.shape
    for other in (
        replace(payload, dtype=torch.bfloat16),
        replace(payload, codec="int4"),
        replace(payload, shape=(L, two, T, D, H)),
    ):
        with pytest.raises(CorruptChunkError):
            blob_content.verify(other, record)


@pytest.mark.parametrize(
    "coding",
    [["int8"], ["gzip", "F32", [2, 2, 6, 2, 4]], ["raw", "F32", [2, 2, 6, 2, 4]], ["int8", "F32", [2, 2]],
     ["int8", "C64", [2, 2, 6, 2, 4]], ["int8", "F32", [2, 2, -6, 2, 4]], "int8", 7, [1, 2, 3]],
)  # fmt: skip
def test_a_header_with_nonsense_about_a_codec_is_damage(coding: object) -> None:
    (chunk,) = numbers(6, dtype=torch.float32)
    payload = Codec(name="int8", scheme=SCHEME).encode(chunk.kv, 0)
    data = blob_content.encode({chunk.key: payload}, FINGERPRINT)
    header = json.loads(data[8 : 8 + blob_content.header_bytes(data[:8], len(data))])
    header["__metadata__"]["coding"] = json.dumps({chunk.key: coding})

    with pytest.raises(CorruptChunkError):
        blob_content.find_tensor(json.dumps(header).encode(), chunk.key, len(data))


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_keeps_chunks_by_the_codec_it_was_given_and_reads_all(
    tmp_path: Path, codec: CodecName
) -> None:
    first = numbers(5, 3, dtype=torch.float32)
    writing = LocalStore(tmp_path, host_bytes=0, codec=Codec(name=codec, scheme=SCHEME))
    writing.put_turn(turn_of(first, "first"), [], first)
    writing.close()

    store = LocalStore(tmp_path, host_bytes=0, codec=Codec(scheme=SCHEME))
    other = numbers(4, seed=1, dtype=torch.float32)
    store.put_turn(turn_of(other, "other"), [], other)
    records = store.catalog.chunks([chunk.key for chunk in (*first, *other)])

    assert {records[chunk.key].codec for chunk in first} == {codec}
    assert {records[chunk.key].codec for chunk in other} == {"raw"}
    expected = Codec(name=codec, scheme=SCHEME)
    for chunk in first:
        there_and_back = expected.decode(expected.encode(chunk.kv, chunk.start), chunk.start)
        assert same_bits(store.load(records[chunk.key]).kv_L2THD, there_and_back)
    assert same_bits(store.load(records[other[0].key]).kv_L2THD, other[0].kv)
    assert store.check() == []
    assert store.stats()["bytes"] == sum(record.num_bytes for record in records.values())
    store.close()

    plain = LocalStore(tmp_path, host_bytes=0)  # as the commands open it: they check, and need no model
    assert plain.check() == []
    plain.close()


@pytest.mark.parametrize("scheme", [SCHEME, NEOX], ids=["torch", "machine code"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
def test_keys_in_fewer_bits_are_decoded_to_their_new_place_where_no_tier_keeps_them(
    tmp_path: Path, codec: CodecName, host_bytes: int, scheme: RotaryScheme
) -> None:
    chosen = Codec(name=codec, scheme=scheme)
    chunks = numbers(5, 70, dtype=torch.bfloat16)
    store = LocalStore(tmp_path, host_bytes=0, codec=chosen)
    store.put_turn(turn_of(chunks), [], chunks)
    store.close()

    store = LocalStore(tmp_path, host_bytes, codec=chosen)
    records = store.catalog.chunks([chunk.key for chunk in chunks])
    for chunk, delta in product(chunks, (0, 1000, -9)):
        record, payload = records[chunk.key], chosen.encode(chunk.kv, chunk.start)
        found, still_to_move = store.load(record, delta)

        is_moved = codec in LOSSY and not host_bytes
        assert still_to_move == (0 if is_moved else delta)
        assert same_bits(found, chosen.decode(payload, chunk.start + delta - still_to_move))
    store.close()


@pytest.mark.parametrize("codec", ["int4+zstd", "raw+zstd"])
def test_export_and_import_keep_the_bytes_as_they_are(tmp_path: Path, codec: CodecName) -> None:
    chunks = numbers(5, 3, dtype=torch.float32)
    source = LocalStore(tmp_path / "source", host_bytes=0, codec=Codec(name=codec, scheme=SCHEME))
    source.put_turn(turn_of(chunks), [], chunks)
    file = io.BytesIO()
    export_turns(source, file)
    target = LocalStore(tmp_path / "target", host_bytes=1 << 20, codec=Codec(scheme=SCHEME))
    import_archive(target, Archive(file))

    keys: list[ChunkKey] = [chunk.key for chunk in chunks]
    before, after = source.catalog.chunks(keys), target.catalog.chunks(keys)
    for key in keys:
        assert (after[key].codec, after[key].checksum) == (codec, before[key].checksum)
        assert same_bits(target.load(after[key]).kv_L2THD, source.load(before[key]).kv_L2THD)
    source.close()
    target.close()
