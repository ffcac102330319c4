"""``FORMAT.md`` is true: a reader written from it alone gets the same tensors, keys and tables."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sqlite3
import struct
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import zstandard
from blake3 import blake3

from kv_agent import chunks as chunk_values
from kv_agent.chunks import ChunkKey, CodecName, Fingerprint, Scope
from kv_agent.errors import CorruptChunkError
from kv_agent.kv.rope import RotaryScheme, unrotate_keys
from kv_agent.storage import blob_content, schema
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.codecs import Codec, Coded
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import FINGERPRINT, chain, same_bits, turn_of, whole
from tests.unit.storage.stores import store_root

FORMAT_PAGE = (Path(__file__).resolve().parents[3] / "FORMAT.md").read_text(encoding="utf-8")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}

# Written by the first release: one chunk "k" of fingerprint "fp", float16 0 to 7 as [1, 2, 2, 1, 2].
VERSION_1 = base64.b64decode(
    "GAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJsYXlvdXQiOiJ7XCJrXCI6IFtcIkYxNlwiLCBbMSwgMiwgMiwgMSwgMl1dfSIsInNoYTI1"
    "NiI6IntcImtcIjogXCI3NzNkOWYyMGJjMDZlN2U0YmU3NDFmNTkwODg1NmJjZWUxNzI3YzRmZjNlMzg2YTYyYzQ2Y2E4YzAwZWQyYjk3"
    "XCJ9IiwiZm9ybWF0Ijoia3ZfYWdlbnQiLCJmaW5nZXJwcmludCI6ImZwIiwiZm9ybWF0X3ZlcnNpb24iOiIxIn0sImsiOnsiZHR5cGUi"
    "OiJGMTYiLCJzaGFwZSI6WzEsMiwyLDEsMl0sImRhdGFfb2Zmc2V0cyI6WzAsMTZdfX0gICAgAAAAPABAAEIARABFAEYARw=="
)
# The same chunk of a later one, and as "z" once more, with raw+zstd.
VERSION_2 = base64.b64decode(
    "8AEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJrdl9hZ2VudCIsImZvcm1hdF92ZXJzaW9uIjoiMiIsImZpbmdlcnByaW50"
    "IjoiZnAiLCJzaGEyNTYiOiJ7XCJrXCI6IFwiNzczZDlmMjBiYzA2ZTdlNGJlNzQxZjU5MDg4NTZiY2VlMTcyN2M0ZmYzZTM4NmE2MmM0"
    "NmNhOGMwMGVkMmI5N1wiLCBcInpcIjogXCJmODVkNTA0YzE4NzliNzgyOWY5MGU5NmIxMDBiNDIwMGFmYzQ4MGJjYzA5OWJiYjUwNjlm"
    "NzkyNzVmNGExNDkyXCJ9IiwibGF5b3V0Ijoie1wia1wiOiBbXCJGMTZcIiwgWzEsIDIsIDIsIDEsIDJdXSwgXCJ6XCI6IFtcIlU4XCIs"
    "IFs1OF1dfSIsImNvZGluZyI6IntcInpcIjogW1wicmF3K3pzdGRcIiwgXCJGMTZcIiwgWzEsIDIsIDIsIDEsIDJdXX0ifSwiayI6eyJk"
    "dHlwZSI6IkYxNiIsInNoYXBlIjpbMSwyLDIsMSwyXSwiZGF0YV9vZmZzZXRzIjpbMCwxNl19LCJ6Ijp7ImR0eXBlIjoiVTgiLCJzaGFw"
    "ZSI6WzU4XSwiZGF0YV9vZmZzZXRzIjpbMTYsNzRdfX0gICAgAAAAPABAAEIARABFAEYARxUAAAAAAAAAKLUv/SQIQQAAAAAAAAAAAAC7"
    "G9vKFQAAAAAAAAAotS/9JAhBAAAAPEBCREVGR1FkSfU="
)


class Plain(NamedTuple):
    dtype: str
    shape: list[int]
    data: bytes


def plain_tensors(blob: bytes, fingerprint: str) -> dict[str, Plain]:
    """Section 1, without kv_agent, safetensors or torch."""
    (length,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["format_version"]) in (("kv_agent", v) for v in "123")
    assert metadata["fingerprint"] == fingerprint
    coding = json.loads(metadata.get("coding", "{}"))
    has_sha256 = metadata["format_version"] != "3"
    checksums = json.loads(metadata["sha256" if has_sha256 else "checksums"])
    layout = json.loads(metadata["layout"])
    assert checksums.keys() == layout.keys() == header.keys()
    tensors = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        data = blob[8 + length + begin : 8 + length + end]
        assert layout[key] == [entry["dtype"], entry["shape"]]
        assert len(data) == end - begin == math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        described = b""
        if key in coding:
            codec, dtype, shape = coding[key]
            described = f"{codec} {dtype} {','.join(map(str, shape))}\n".encode()
        covered = described + data
        digest = hashlib.sha256(covered) if has_sha256 else blake3(covered)
        assert checksums[key] == ("" if has_sha256 else "blake3:") + digest.hexdigest()
        tensors[key] = Plain(entry["dtype"], entry["shape"], data)
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_a_blob_read_by_the_page_alone_has_the_same_tensors(dtype: torch.dtype, name: str) -> None:
    chunks = chain(3, 5, 1, dtype=dtype)

    tensors = plain_tensors(blob_content.encode({c.key: c.kv for c in chunks}, FINGERPRINT), FINGERPRINT)

    assert tensors == {c.key: Plain(name, list(c.kv.shape), raw(c.kv)) for c in chunks}


def test_the_element_at_an_index_is_where_the_page_says() -> None:
    """Row-major [L, 2, T, H, D], little-endian."""
    shape = _L, two, T, H, D = 3, 2, 4, 2, 5
    kv = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    data = plain_tensors(blob_content.encode({ChunkKey("k"): kv}, FINGERPRINT), FINGERPRINT)["k"].data

    layer, value, token, head, dim = 2, 1, 3, 0, 4
    position = (((layer * two + value) * T + token) * H + head) * D + dim
    assert struct.unpack_from("<f", data, 4 * position) == (float(kv[layer, value, token, head, dim]),)


def test_a_store_read_by_the_page_alone_gives_every_chunk(store: LocalStore) -> None:
    scope = Scope(namespace="acme", user_id="bob")
    system, *content = [replace(c, sketch=b"x") for c in chain(3, 4, 2, scope=scope)]
    store.put_turn(turn_of(content, "a/b: ü", scope), [system], content)
    root = store_root(store)
    store.close()

    with closing(sqlite3.connect(root / "catalog.sqlite3")) as db:
        rows = db.execute(
            "SELECT c.key, role, idx, blob, tensor, checksum, num_bytes, num_tokens, start, token_ids,"
            " parent, content_key, c.fingerprint, vector FROM turn_chunks JOIN chunks c ON key = chunk_key"
        ).fetchall()
        ((digest,),) = db.execute("SELECT digest FROM turns").fetchall()
    found = {}
    for key, role, idx, blob, tensor, checksum, num_bytes, num_tokens, *rest in rows:
        start, token_ids, parent, content_key, fingerprint, vector = rest
        assert re.fullmatch(r"blobs/a_/a_b___-[0-9a-f]{16}\.safetensors", blob)
        plain = plain_tensors((root / blob).read_bytes(), fingerprint)[tensor]
        assert (f"blake3:{blake3(plain.data).hexdigest()}", len(plain.data)) == (checksum, num_bytes)
        ids = struct.unpack(f"<{num_tokens}i", token_ids)
        assert plain.shape[2] == num_tokens
        assert key == digest_of("chain", parent.encode(), token_ids)
        assert content_key == digest_of("content", fingerprint.encode(), token_ids)
        found[role, idx] = (key, start, ids, plain.data, vector)

    def expected(chunk: object) -> tuple[object, ...]:
        return (chunk.key, chunk.start, chunk.token_ids, raw(chunk.kv), chunk.vector)  # type: ignore[attr-defined]

    assert found == {
        ("context", 0): expected(system),
        ("content", 0): expected(content[0]),
        ("content", 1): expected(content[1]),
    }
    owner = ["acme", "bob", None, None, FINGERPRINT]
    assert digest == hashlib.sha256(json.dumps([owner, [c.key for c in content]]).encode()).hexdigest()


def digest_of(person: str, *parts: bytes) -> str:
    """Section 3."""
    data = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return hashlib.blake2b(data, digest_size=16, person=person.encode()).hexdigest()


def plain_rows(data: bytes, num_rows: int, length: int, bits: int) -> tuple[list[list[float]], bytes]:
    """Quantised rows, and what follows them."""
    num_groups = max(1, round(length / 64))
    size = math.ceil(length / num_groups)
    num_codes, total = num_rows * num_groups * size, num_rows * num_groups
    if bits == 8:
        codes, data = list(data[:num_codes]), data[num_codes:]
    else:
        packed, data = data[: -(-num_codes // 2)], data[-(-num_codes // 2) :]
        codes = [half for byte in packed for half in (byte & 15, byte >> 4)]
    scales, data = [2 ** ((byte - 168) / 6) for byte in data[:total]], data[total:]
    lows: list[int] = [-127] * total
    if bits == 4:
        lows, data = list(struct.unpack(f"{total}b", data[:total])), data[total:]
    rows = []
    for row in range(num_rows):
        groups = range(row * num_groups, (row + 1) * num_groups)
        numbers = [(codes[g * size + i] + lows[g]) * scales[g] for g in groups for i in range(size)]
        rows.append(numbers[:length])
    return rows, data


def plain_planes(data: bytes, item_bytes: int) -> bytes:
    planes = []
    for _ in range(item_bytes):
        (length,) = struct.unpack_from("<Q", data)
        planes.append(zstandard.ZstdDecompressor().decompress(data[8 : 8 + length]))
        data = data[8 + length :]
    assert not data
    return b"".join(bytes(item) for item in zip(*planes, strict=True))


@pytest.mark.parametrize("codec", ["int8", "int8+zstd", "int4", "int4+zstd"])
@pytest.mark.parametrize("num_tokens", [1, 5, 100])
def test_quantised_chunks_read_by_the_page_alone_are_what_the_store_gives(
    codec: CodecName, num_tokens: int
) -> None:
    L, T, H, D = 2, num_tokens, 3, 34
    scheme = RotaryScheme(inv_freq=(1.0, 0.1, 0.01), rotary_dim=6, neox=True)
    kv = torch.randn(L, 2, T, H, D, generator=torch.Generator().manual_seed(1))
    start = 17
    chosen = Codec(name=codec, scheme=scheme)
    chunk = chosen.encode(kv, start)
    (plain,) = plain_tensors(blob_content.encode({ChunkKey("k"): chunk}, FINGERPRINT), FINGERPRINT).values()

    base, _, packing = codec.partition("+")
    bits = int(base.removeprefix("int"))
    data = plain_planes(plain.data, 1) if packing else plain.data
    keys, data = plain_rows(data, L * H * D, T, bits)
    values, data = plain_rows(data, L * T, H * D, bits)
    found = chosen.decode(chunk, start)

    assert not data
    plain_keys = torch.tensor(keys).view(L, H, D, T).permute(0, 3, 1, 2)
    assert torch.allclose(found[:, 1], torch.tensor(values).view(L, T, H, D), rtol=1e-6)
    assert torch.allclose(unrotate_keys(found[:, 0], start, scheme), plain_keys, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_planes_read_by_the_page_alone_are_the_kv(dtype: torch.dtype) -> None:
    (chunk,) = chain(7, dtype=dtype)
    packed = Codec(name="raw+zstd").encode(chunk.kv, 0)
    (plain,) = plain_tensors(blob_content.encode({chunk.key: packed}, FINGERPRINT), FINGERPRINT).values()

    assert (plain.dtype, plain.shape) == ("U8", [len(plain.data)])
    assert plain_planes(plain.data, dtype.itemsize) == raw(chunk.kv)


def test_keys_are_made_as_the_page_says() -> None:
    root = chunk_values.root_key(Fingerprint("fp"), "ns", "user")
    ids = (1, -2, 70_000)
    packed = struct.pack("<3i", *ids)
    key = chunk_values.chain_key(root, ids)

    assert root == digest_of("root", b"fp", b"ns", b"user")
    assert key == digest_of("chain", root.encode(), packed)
    assert chunk_values.adapted_key(root, key) == digest_of("adapted", root.encode(), key.encode())
    assert chunk_values.adapted_key(root, key, 5) == digest_of("adapted", root.encode(), key.encode(), b"5")
    assert chunk_values.content_key(Fingerprint("fp"), ids) == digest_of("content", b"fp", packed)


@pytest.mark.parametrize("blob", [VERSION_1, VERSION_2])
def test_a_blob_of_an_older_version_can_still_be_read(tmp_path: Path, blob: bytes) -> None:
    blobs = BlobFiles(tmp_path)

    tensor = blobs.read_chunk(blobs.write("old", whole(blob)), "k")

    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.arange(8, dtype=torch.float16).view(1, 2, 2, 1, 2))
    assert plain_tensors(blob, "fp")["k"].data == struct.pack("<8e", *range(8))


def test_a_coded_chunk_of_version_2_can_still_be_read(tmp_path: Path) -> None:
    blobs = BlobFiles(tmp_path)

    packed = blobs.read_chunk(blobs.write("old", whole(VERSION_2)), "z")

    assert isinstance(packed, Coded)
    checksum = json.loads(json.loads(VERSION_2[8 : 8 + 496])["__metadata__"]["sha256"])["z"]
    assert blob_content.is_of(packed, checksum)
    assert raw(Codec().decode(packed, 0)) == struct.pack("<8e", *range(8))
    assert plain_planes(plain_tensors(VERSION_2, "fp")["z"].data, 2) == struct.pack("<8e", *range(8))


def test_chunks_of_a_store_from_before_blake3_are_served_while_they_are_sound(tmp_path: Path) -> None:
    good, bad = chunks = chain(3, 5)
    store = LocalStore(tmp_path, host_bytes=0)
    store.put_turn(turn_of(chunks), [], chunks)
    store.close()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db, db:
        db.execute("ALTER TABLE chunks RENAME COLUMN checksum TO sha256")
        db.execute("DELETE FROM schema_migrations WHERE version >= 10")
        for chunk, stored in ((good, raw(good.kv)), (bad, raw(good.kv))):
            digest = hashlib.sha256(stored).hexdigest()
            db.execute("UPDATE chunks SET sha256 = ? WHERE key = ?", (digest, chunk.key))

    store = LocalStore(tmp_path, host_bytes=0)
    records = store.catalog.chunks([good.key, bad.key])
    assert same_bits(store.load(records[good.key]).kv_L2THD, good.kv)
    with pytest.raises(CorruptChunkError, match="checksum"):
        store.load(records[bad.key])
    store.close()


def test_the_page_lists_the_tables_columns_and_versions_there_are(tmp_path: Path) -> None:
    LocalStore(tmp_path, host_bytes=0).close()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        names = db.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
            " AND name NOT LIKE 'sqlite%' AND name NOT LIKE 'turn\\_words\\__%' ESCAPE '\\'"
        ).fetchall()
        tables = {
            name: [column for (column,) in db.execute("SELECT name FROM pragma_table_info(?)", (name,))]
            for (name,) in names
        }

    section = FORMAT_PAGE.split("## 2. The catalog")[1].split("## 3.")[0]
    told = {
        name: re.findall(r"`(\w+)`", columns)
        for name, columns in re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    }
    assert told == tables
    assert f"this page describes version {len(schema.MIGRATIONS)}." in FORMAT_PAGE
    assert f"| catalog schema | {len(schema.MIGRATIONS)} |" in FORMAT_PAGE
    assert f"| blob `format_version` | {blob_content.FORMAT_VERSION} |" in FORMAT_PAGE
    assert re.findall(r"^\| (\d+) \| ", FORMAT_PAGE, re.MULTILINE) == [
        str(version) for version in range(1, len(schema.MIGRATIONS) + 1)
    ]
