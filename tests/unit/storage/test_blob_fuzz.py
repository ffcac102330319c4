"""Whatever a blob file holds: the right tensor or an error of ours, never another tensor or exception.

``KV_AGENT_FUZZ_BLOBS=100000`` makes the seeded loop that long.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_agent.chunks import ChunkRecord, CodecName
from kv_agent.errors import CorruptChunkError
from kv_agent.kv.rope import RotaryScheme
from kv_agent.storage import blob_content
from kv_agent.storage import blobs as blobs_module
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.codecs import Codec, Payload, codec_of, data_of
from tests.unit.storage import mutations
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, same_bits, whole

COUNT = int(os.environ.get("KV_AGENT_FUZZ_BLOBS", "4000"))
CODED: list[CodecName] = ["int8", "int4+zstd", "raw+zstd"]
DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]


class Victim(NamedTuple):
    """A good blob, its chunks as they were stored, and the file that stands for it."""

    blobs: BlobFiles
    path: Path
    data: bytes
    stored: list[tuple[ChunkRecord, Payload]]


class Reads:
    """How many bytes the reader made room for; it must never be more than the file has."""

    largest = 0


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[Victim]:
    made = []
    for seed, dtype in enumerate(DTYPES):
        root = tmp_path_factory.mktemp("fuzz")
        # Equal lengths: a wrong tensor would have the right shape.
        chunks = chain(*((3, 3, 2), (1,))[seed % 2], seed=seed, dtype=dtype)
        data = blob_content.encode({chunk.key: chunk.kv for chunk in chunks}, FINGERPRINT)
        relpath = BlobFiles(root).write("victim", whole(data))
        stored = [(record_of(chunk, blob=relpath), chunk.kv) for chunk in chunks]
        made.append(Victim(BlobFiles(root), root / relpath, data, stored))
    return [*made, *(coded_victim(tmp_path_factory.mktemp("fuzz"), codec) for codec in CODED)]


def coded_victim(root: Path, codec: CodecName) -> Victim:
    """Chunks that were written by a codec, beside one that was not."""
    numbers = torch.randn(3, 2, 2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    chosen = Codec(name=codec, scheme=RotaryScheme(inv_freq=(1.0, 0.3), rotary_dim=4, neox=False))
    chunks = chain(3, 3, 3, dtype=torch.float32)
    payloads: list[Payload] = [chosen.encode(numbers[0], 0), chosen.encode(numbers[1], 3), numbers[2]]
    by_key = {chunk.key: payload for chunk, payload in zip(chunks, payloads, strict=True)}
    data = blob_content.encode(by_key, FINGERPRINT)
    relpath = BlobFiles(root).write("victim", whole(data))
    stored = [
        (
            replace(
                record_of(chunk, blob=relpath),
                checksum=blob_content.checksum(by_key[chunk.key]),
                num_bytes=by_key[chunk.key].nbytes,
                codec=codec_of(by_key[chunk.key]),
            ),
            by_key[chunk.key],
        )
        for chunk in chunks
    ]
    return Victim(BlobFiles(root), root / relpath, data, stored)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads, real = Reads(), blobs_module._read_exactly

    def read(file: object, num_bytes: int) -> torch.Tensor:
        reads.largest = max(reads.largest, num_bytes)
        return real(file, num_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(blobs_module, "_read_exactly", read)
    return reads


def outcomes(victim: Victim, data: bytes, reads: Reads) -> dict[str, int]:
    """Read every chunk of a file with this content -> how many were right and how many refused."""
    victim.path.write_bytes(data)
    counts = {"right": 0, "refused": 0}
    for record, original in victim.stored:
        reads.largest = 0
        try:
            tensor = victim.blobs.read_chunk(record.blob, record.tensor)
            blob_content.verify(tensor, record)
        except CorruptChunkError:
            counts["refused"] += 1
        else:
            assert codec_of(tensor) == codec_of(original)
            assert tuple(tensor.shape) == tuple(original.shape)
            assert tensor.dtype == original.dtype
            assert same_bits(data_of(tensor), data_of(original))
            counts["right"] += 1
        assert reads.largest <= len(data)
    return counts


def test_thousands_of_mutated_blobs_give_the_right_tensor_or_an_error_of_ours(
    victims: list[Victim], reads: Reads
) -> None:
    total = {"right": 0, "refused": 0}
    for seed in range(COUNT):
        pick = random.Random(seed)
        victim = pick.choice(victims)
        try:
            counts = outcomes(victim, mutations.mutated(victim.data, pick), reads)
        except Exception as err:
            raise AssertionError(f"seed {seed} slipped through") from err
        total = {name: count + counts[name] for name, count in total.items()}

    assert total["refused"] > COUNT / 2  # the mutations bite
    assert total["right"] > COUNT / 20  # and what they leave alone is served


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(random=st.randoms(use_true_random=False), which=st.integers(0, len(DTYPES) + len(CODED) - 1))
def test_mutations_chosen_by_hypothesis_do_not_slip_through_either(
    victims: list[Victim], reads: Reads, random: random.Random, which: int
) -> None:
    victim = victims[which]
    outcomes(victim, mutations.mutated(victim.data, random), reads)


@pytest.mark.parametrize("mutation", dict.fromkeys(mutations.MUTATIONS), ids=lambda m: m.__name__)
def test_every_kind_of_mutation_changes_blobs_and_is_noticed(
    victims: list[Victim], reads: Reads, mutation: mutations.Mutation
) -> None:
    noticed = 0
    for seed in range(60):
        data = mutation(victims[0].data, random.Random(seed))
        noticed += outcomes(victims[0], data, reads)["refused"] > 0

    assert noticed > 20


def test_the_reader_makes_no_room_for_what_a_header_only_claims(victims: list[Victim], reads: Reads) -> None:
    victim = victims[1]
    (record, _), length = victim.stored[0], int.from_bytes(victim.data[:8], "little")
    header = json.loads(victim.data[8 : 8 + length])
    entry = header[record.tensor]
    entry["shape"][0] = 1 << 40
    entry["data_offsets"][1] = entry["data_offsets"][0] + (1 << 40) * entry["shape"][4] * 4
    encoded = json.dumps(header).encode()

    counts = outcomes(victim, len(encoded).to_bytes(8, "little") + encoded + victim.data[8 + length :], reads)

    assert counts["right"] == 0
