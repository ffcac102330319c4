"""Coverage-guided fuzzing of whatever reads a blob: the right chunk or ``CorruptChunkError``, nothing else.

`make fuzz` runs it. An input is one byte that says what the rest is: a whole file, a header before good data,
or packed bytes. The last argument is a folder for what was found so far, and for the file that is read.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["kv_agent.storage"]):
    from kv_agent.chunks import ChunkRecord
    from kv_agent.errors import CorruptChunkError
    from kv_agent.storage import blob_content
    from kv_agent.storage.blobs import BlobFiles
    from kv_agent.storage.codecs import Codec, Coded, codec_of
    from kv_agent.storage.compression import compress, decompress

from tests.unit.storage import mutations
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, same_bits

WHOLE, HEADER, PACKED = range(3)

CODEC = Codec(name="raw+zstd")
FOLDER = Path(sys.argv[-1])
BLOBS = BlobFiles(FOLDER / "store", "never")
RELPATH = BlobFiles.relpath("victim")


def good_blob() -> tuple[bytes, list[tuple[ChunkRecord, torch.Tensor]]]:
    """Chunks of several dtypes, as they are and packed, in one file; records as the catalog has them."""
    payloads, stored = {}, []
    for seed, dtype in enumerate((torch.float16, torch.bfloat16, torch.uint8)):
        for chunk in chain(3, 3, seed=seed, dtype=dtype):
            payload = CODEC.encode(chunk.kv, chunk.start) if len(stored) % 2 else chunk.kv
            payloads[chunk.key] = payload
            stored.append((with_payload(record_of(chunk, blob=RELPATH), payload), chunk.kv))
    return blob_content.encode(payloads, FINGERPRINT), stored


def with_payload(record: ChunkRecord, payload: torch.Tensor | Coded) -> ChunkRecord:
    return replace(
        record,
        checksum=blob_content.checksum(payload),
        num_bytes=payload.nbytes,
        codec=codec_of(payload),
    )


GOOD, STORED = good_blob()
GOOD_DATA = GOOD[8 + int.from_bytes(GOOD[:8], "little") :]
PLAIN = torch.arange(96, dtype=torch.uint8)
GOOD_PACKED = bytes(compress(PLAIN, 2).numpy())


def try_input(data: bytes) -> None:
    kind, rest = data[0] % 3 if data else WHOLE, data[1:]
    if kind == PACKED:
        try_packed(rest)
    elif kind == HEADER:
        try_blob(len(rest).to_bytes(8, "little") + rest + GOOD_DATA)
    else:
        try_blob(rest)


def try_blob(blob: bytes) -> None:
    path = FOLDER / "store" / RELPATH
    path.unlink()  # ext4 waits for the disk when a file is closed that was emptied to be written anew
    path.write_bytes(blob)
    for record, original in STORED:
        try:
            payload = BLOBS.read_chunk(RELPATH, record.tensor)
            blob_content.verify(payload, record)
            kv_L2THD = CODEC.decode(payload, record.start)
        except CorruptChunkError:
            pass
        else:
            assert same_bits(kv_L2THD, original), "another chunk than was stored"


def try_packed(packed: bytes) -> None:
    try:
        plain = decompress(torch.frombuffer(bytearray(packed or b"\0"), dtype=torch.uint8), 2, len(PLAIN))
    except CorruptChunkError:
        return
    assert plain.dtype == torch.uint8
    assert plain.shape == PLAIN.shape


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time as the other fuzz tests do, which know what a header looks like."""
    pick = random.Random(seed)
    if not data or pick.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    if data[0] % 3 == HEADER:
        header = data[1:]
        mutated = mutations.edit_header(len(header).to_bytes(8, "little") + header, pick)
        return (data[:1] + mutated[8:])[:max_size]
    return (data[:1] + mutations.mutated(data[1:], pick))[:max_size]


def main() -> None:
    corpus = FOLDER / "corpus"
    corpus.mkdir(exist_ok=True)
    BLOBS.write("victim", [(0, GOOD)])
    header = GOOD[8 : len(GOOD) - len(GOOD_DATA)]
    for kind, seed in ((WHOLE, GOOD), (HEADER, header), (PACKED, GOOD_PACKED)):
        (corpus / f"good {kind}").write_bytes(bytes([kind]) + seed)
    arguments = [*sys.argv[:-1], f"-artifact_prefix={FOLDER}/", str(corpus)]
    atheris.Setup(arguments, try_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
