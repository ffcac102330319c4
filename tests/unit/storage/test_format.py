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

from kv_agent import chunks as chunk_values
from kv_agent.chunks import ChunkKey, Fingerprint, Scope
from kv_agent.storage import codec, schema
from kv_agent.storage.blobs import BlobFiles
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import FINGERPRINT, chain, turn_of
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


class Plain(NamedTuple):
    dtype: str
    shape: list[int]
    data: bytes


def plain_tensors(blob: bytes, fingerprint: str) -> dict[str, Plain]:
    """Section 1, without kv_agent, safetensors or torch."""
    (length,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["format_version"]) == ("kv_agent", "1")
    assert metadata["fingerprint"] == fingerprint
    checksums, layout = json.loads(metadata["sha256"]), json.loads(metadata["layout"])
    assert checksums.keys() == layout.keys() == header.keys()
    tensors = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        data = blob[8 + length + begin : 8 + length + end]
        assert layout[key] == [entry["dtype"], entry["shape"]]
        assert len(data) == end - begin == math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        assert hashlib.sha256(data).hexdigest() == checksums[key]
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

    tensors = plain_tensors(codec.encode({c.key: c.kv for c in chunks}, FINGERPRINT), FINGERPRINT)

    assert tensors == {c.key: Plain(name, list(c.kv.shape), raw(c.kv)) for c in chunks}


def test_the_element_at_an_index_is_where_the_page_says() -> None:
    """Row-major [L, 2, T, H, D], little-endian."""
    shape = _L, two, T, H, D = 3, 2, 4, 2, 5
    kv = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    data = plain_tensors(codec.encode({ChunkKey("k"): kv}, FINGERPRINT), FINGERPRINT)["k"].data

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
            "SELECT c.key, role, idx, blob, tensor, sha256, num_bytes, num_tokens, start, token_ids, parent,"
            " content_key, c.fingerprint, vector FROM turn_chunks JOIN chunks c ON key = chunk_key"
        ).fetchall()
        ((digest,),) = db.execute("SELECT digest FROM turns").fetchall()
    found = {}
    for key, role, idx, blob, tensor, sha256, num_bytes, num_tokens, *rest in rows:
        start, token_ids, parent, content_key, fingerprint, vector = rest
        assert re.fullmatch(r"blobs/a_/a_b___-[0-9a-f]{16}\.safetensors", blob)
        plain = plain_tensors((root / blob).read_bytes(), fingerprint)[tensor]
        assert (hashlib.sha256(plain.data).hexdigest(), len(plain.data)) == (sha256, num_bytes)
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


def test_a_blob_of_version_1_can_still_be_read(tmp_path: Path) -> None:
    blobs = BlobFiles(tmp_path)

    tensor = blobs.read_tensor(blobs.write("old", VERSION_1), "k")

    assert torch.equal(tensor, torch.arange(8, dtype=torch.float16).view(1, 2, 2, 1, 2))
    assert plain_tensors(VERSION_1, "fp")["k"].data == struct.pack("<8e", *range(8))


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
    assert f"| blob `format_version` | {codec.FORMAT_VERSION} |" in FORMAT_PAGE
    assert re.findall(r"^\| (\d+) \| ", FORMAT_PAGE, re.MULTILINE) == [
        str(version) for version in range(1, len(schema.MIGRATIONS) + 1)
    ]
