"""What is in an archive: as FORMAT.md says, readable by tar, refused when its parts do not fit together."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import replace

import pytest
from blake3 import blake3

from kv_agent.chunks import ChunkKey, TurnId
from kv_agent.errors import ConfigError, StorageError
from kv_agent.storage import archive as archive_module
from kv_agent.storage.archive import Archive, ArchivedTurn, ArchiveWriter
from kv_agent.storage.container import ContainerWriter, read_members
from kv_agent.storage.store import NewChunk
from tests.unit.storage.builders import FINGERPRINT, chain, same_bits, turn_of
from tests.unit.storage.test_format import plain_tensors, raw


def archived(chunks: list[NewChunk], turn_id: str = "turn-1", num_known: int = 0) -> ArchivedTurn:
    return ArchivedTurn(
        turn=turn_of(chunks[1:], turn_id),
        aliases=(TurnId("also"),),
        context=(chunks[0].key,),
        chunks=tuple(chunks[num_known:]),
    )


def written(*turns: ArchivedTurn) -> io.BytesIO:
    file = io.BytesIO()
    writer = ArchiveWriter(file, {FINGERPRINT: {"layers": 2}}, created=12.5)
    for turn in turns:
        writer.add(turn)
    writer.close()
    return file


def test_an_archive_read_by_the_page_alone_has_the_same_memories() -> None:
    chunks = [replace(chunk, sketch=b"sketch") for chunk in chain(2, 3, 4)]
    file = written(archived(chunks[:2]), archived(chunks, "turn-2", num_known=2))

    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        end_offset = tar.getmember("end.json").offset

    system, dog, cat = chunks
    blobs = [f"chunks/{chunk.key}.safetensors" for chunk in chunks]
    names = ["archive.json", *blobs[:2], "turns/00000001.json", blobs[2], "turns/00000002.json", "end.json"]
    assert list(members) == names
    assert json.loads(members["archive.json"]) == {
        "format": "kv_agent.archive", "format_version": 3, "created": 12.5,
        "fingerprints": {FINGERPRINT: {"layers": 2}},
    }  # fmt: skip
    for name, chunk in zip(blobs, chunks, strict=True):
        assert plain_tensors(members[name], FINGERPRINT)[chunk.key].data == raw(chunk.kv)
    second = json.loads(members["turns/00000002.json"])
    assert second["turn"] == {
        "turn_id": "turn-2", "namespace": "default", "user_id": "default", "agent_id": None,
        "session_id": None,
        "fingerprint": FINGERPRINT, "num_tokens": 7, "text": "text of turn-2 – ünïcödé", "created": 1.0,
        "metadata": {"source": "test", "n": 3, "x": 0.5, "ok": True}, "expires": None, "pinned": False,
        "chunk_keys": [dog.key, cat.key],
    }  # fmt: skip
    assert (second["aliases"], second["context"]) == (["also"], [system.key])
    assert second["chunks"] == [
        {
            "key": cat.key, "content_key": cat.content_key, "parent": cat.parent, "start": cat.start,
            "token_ids": list(cat.token_ids), "checksum": f"blake3:{blake3(raw(cat.kv)).hexdigest()}",
            "num_bytes": cat.kv.nbytes, "vector": base64.b64encode(cat.vector or b"").decode(),
            "sketch": base64.b64encode(b"sketch").decode(),
        }
    ]  # fmt: skip
    assert json.loads(members["end.json"]) == {
        "turns": 2, "chunks": 3, "sha256": hashlib.sha256(file.getvalue()[:end_offset]).hexdigest(),
    }  # fmt: skip


def test_what_was_written_comes_back() -> None:
    chunks = chain(2, 3, 4)
    turns = [archived(chunks[:2]), archived(chunks, "turn-2", num_known=2)]

    archive = Archive(written(*turns))

    for _ in range(2):  # as often as one likes
        for again, turn in zip(archive.turns(), turns, strict=True):
            assert (again.turn, again.aliases, again.context) == (turn.turn, turn.aliases, turn.context)
            for chunk, original in zip(again.chunks, turn.chunks, strict=True):
                assert same_bits(chunk.kv, original.kv)
                assert replace(chunk, kv=original.kv).vector == original.vector
    assert archive.fingerprints == {FINGERPRINT: {"layers": 2}}


def test_an_archive_of_a_newer_release_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(archive_module, "FORMAT_VERSION", archive_module.FORMAT_VERSION + 1)
        file = written(archived(chain(2, 3)))

    with pytest.raises(ConfigError, match=r"format version 4.*upgrade"):
        Archive(file)


def test_an_archive_from_before_turns_could_be_pinned_is_read() -> None:
    one = archived(chain(2, 3))
    older = io.BytesIO()
    container = ContainerWriter(older)
    for member in read_members(written(replace(one, turn=replace(one.turn, pinned=True)))):
        content = json.loads(member.data) if member.name.endswith(".json") else {}
        if member.name.startswith("turns/"):
            assert content["turn"].pop("pinned")
        if member.name == "end.json":
            content["sha256"] = container.sha256
        container.add(member.name, json.dumps(content).encode() if content else member.data)
    container.close()

    (again,) = Archive(older).turns()

    assert again.turn == one.turn


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token_ids": (0, 1, 3)}, "not that of its tokens"),
        ({"parent": ChunkKey("0" * 32)}, "not that of its tokens"),
        ({"content_key": "0" * 32}, "not that of its tokens"),
        ({"key": ChunkKey("0" * 32)}, "is not sound|are not of turn"),
    ],
)
def test_a_chunk_under_a_key_that_is_not_its_own_is_refused(change: dict[str, object], why: str) -> None:
    """However right all checksums are: others would take it for the KV of other tokens."""
    system, dog = chain(2, 3)
    forged = replace(archived([system, dog]), chunks=(system, replace(dog, **change)))  # type: ignore[arg-type]

    with pytest.raises(StorageError, match=why):
        Archive(written(forged))


def test_chunks_of_nobody_and_turns_of_an_unknown_model_are_refused() -> None:
    system, dog, stray = chain(2, 3, 4)
    one = archived([system, dog])

    with pytest.raises(StorageError, match="are not of turn"):
        Archive(written(replace(one, chunks=(*one.chunks, stray))))
    with pytest.raises(StorageError, match=r"header does not name|not that of its tokens"):
        Archive(written(replace(one, turn=replace(one.turn, fingerprint="fp-9"))))  # type: ignore[arg-type]


def test_an_unfinished_archive_is_refused() -> None:
    file = io.BytesIO()
    ArchiveWriter(file, {FINGERPRINT: None}, created=0.0).add(archived(chain(2, 3)))

    with pytest.raises(StorageError, match="its end is missing"):
        Archive(file)


def test_a_member_that_claims_more_bytes_than_the_file_has_is_refused_before_it_is_read() -> None:
    file = io.BytesIO()
    ContainerWriter(file).add("archive.json", b"{}")
    info = tarfile.TarInfo("turns/00000001.json")
    info.size = 8**11 - 1
    file.write(info.tobuf(tarfile.USTAR_FORMAT))

    with pytest.raises(StorageError, match=r"unreadable|ends early"):
        Archive(file)
