"""Memories in one file, as JSON and blobs in a container; FORMAT.md describes it byte by byte."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kv_agent.chunks import (
    ChunkKey,
    ContentKey,
    Fingerprint,
    Scope,
    TurnId,
    TurnRecord,
    chain_key,
    content_key,
)
from kv_agent.errors import ConfigError, CorruptChunkError
from kv_agent.storage import blob_content
from kv_agent.storage.container import ContainerWriter, Member, damaged, read_members
from kv_agent.storage.store import NewChunk

FORMAT = "kv_agent.archive"
FORMAT_VERSION = 3  # 1 knew no codecs; until 2 checksums were SHA-256

_HEADER, _END = "archive.json", "end.json"
_CHUNKS, _TURNS = "chunks/", "turns/"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedTurn:
    """A turn, its further ids, what it stands behind, and those of its chunks that no turn before had."""

    turn: TurnRecord
    aliases: tuple[TurnId, ...]
    context: tuple[ChunkKey, ...]
    chunks: tuple[NewChunk, ...]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_M = TypeVar("_M", bound=_Model)
_JSON: TypeAdapter[object] = TypeAdapter(object)


class _Header(_Model):
    model_config = ConfigDict(extra="ignore")  # so that a newer version is told from damage

    format: Literal["kv_agent.archive"]
    format_version: int
    created: float
    fingerprints: dict[str, dict[str, Any] | None]


class _End(_Model):
    turns: int
    chunks: int
    sha256: str


class _Chunk(_Model):
    key: str
    content_key: str
    parent: str
    start: int
    token_ids: tuple[int, ...]
    checksum: Annotated[str, Field(validation_alias=AliasChoices("checksum", "sha256"))]  # as of old
    num_bytes: int
    vector: str | None
    sketch: str | None


class _Turn(_Model):
    turn_id: str
    namespace: str
    user_id: str
    agent_id: str | None
    session_id: str | None
    fingerprint: str
    num_tokens: int
    text: str
    created: float
    metadata: dict[str, bool | int | float | str]
    expires: float | None
    pinned: bool = False  # older archives do not say
    chunk_keys: tuple[str, ...]


class _Entry(_Model):
    turn: _Turn
    aliases: tuple[str, ...]
    context: tuple[str, ...]
    chunks: tuple[_Chunk, ...]


class ArchiveWriter:
    """Writes turns one by one; without :meth:`close` the file is no archive."""

    def __init__(
        self, file: BinaryIO, fingerprints: Mapping[Fingerprint, Mapping[str, Any] | None], created: float
    ) -> None:
        self._container = ContainerWriter(file)
        self._num_turns = self._num_chunks = 0
        known = {name: None if details is None else dict(details) for name, details in fingerprints.items()}
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "created": created}
        self._add(_HEADER, header | {"fingerprints": known})

    def add(self, archived: ArchivedTurn) -> None:
        turn = archived.turn
        for chunk in archived.chunks:
            blob = blob_content.encode({chunk.key: chunk.kv}, turn.fingerprint)
            self._container.add(f"{_CHUNKS}{chunk.key}.safetensors", blob)
        self._num_turns += 1
        self._num_chunks += len(archived.chunks)
        columns = {**asdict(turn), **asdict(turn.scope)}
        del columns["scope"]
        entry = {
            "turn": columns,
            "aliases": archived.aliases,
            "context": archived.context,
            "chunks": [_chunk_to_json(chunk) for chunk in archived.chunks],
        }
        self._add(f"{_TURNS}{self._num_turns:08}.json", entry)

    def close(self) -> None:
        """Write the end, which makes the archive whole."""
        end = {"turns": self._num_turns, "chunks": self._num_chunks, "sha256": self._container.sha256}
        self._add(_END, end)
        self._container.close()

    def _add(self, name: str, value: object) -> None:
        self._container.add(name, _JSON.dump_json(value))


class Archive:
    """An archive that has been read to its end and found whole; the caller keeps the file open.

    Raises :class:`StorageError` if it is damaged, :class:`ConfigError` if it is none or of a newer release.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        members = read_members(file)
        self._header = _header(next(members, None))
        for _ in self._turns(members):
            pass

    @property
    def fingerprints(self) -> dict[Fingerprint, dict[str, Any] | None]:
        """The models whose memories these are, with what their fingerprints were made of if that is known."""
        return {Fingerprint(name): details for name, details in self._header.fingerprints.items()}

    def turns(self) -> Iterator[ArchivedTurn]:
        """All turns in the order in which they were exported, one at a time in memory."""
        members = read_members(self._file)
        next(members)
        return self._turns(members)

    def _turns(self, members: Iterable[Member]) -> Iterator[ArchivedTurn]:
        blobs: dict[str, bytes] = {}
        num_turns = num_chunks = 0
        for member in members:
            if member.name == _END:
                end = _parsed(_End, member)
                if (end.turns, end.chunks, end.sha256) != (num_turns, num_chunks, member.sha256_before):
                    raise damaged("its bytes are not those that were written")
                return
            if member.name.startswith(_CHUNKS):
                blobs[member.name.removeprefix(_CHUNKS).removesuffix(".safetensors")] = member.data
                continue
            num_turns += 1
            if member.name != f"{_TURNS}{num_turns:08}.json":
                raise damaged(f"{member.name!r} does not belong where it is")
            archived = _turn_from_json(_parsed(_Entry, member), blobs)
            if archived.turn.fingerprint not in self._header.fingerprints:
                raise damaged(f"{member.name} is of a model that its header does not name")
            num_chunks += len(blobs)
            blobs.clear()
            yield archived
        raise damaged("its end is missing")


def _header(member: Member | None) -> _Header:
    if member is None or member.name != _HEADER:
        raise ConfigError("this file is no archive of kv_agent; `kv-agent export` writes one")
    header = _parsed(_Header, member)
    if header.format_version > FORMAT_VERSION:
        raise ConfigError(
            f"the archive has format version {header.format_version}, this release of kv_agent knows up to"
            f" {FORMAT_VERSION}; upgrade kv_agent"
        )
    return header


def _parsed(model: type[_M], member: Member) -> _M:
    try:
        return model.model_validate_json(member.data)
    except ValidationError as err:
        why = err.errors(include_url=False, include_input=False)[0]["msg"]  # never what a memory says
        raise damaged(f"{member.name} is unreadable ({why})") from err


def _chunk_to_json(chunk: NewChunk) -> dict[str, Any]:
    return {
        "key": chunk.key,
        "content_key": chunk.content_key,
        "parent": chunk.parent,
        "start": chunk.start,
        "token_ids": chunk.token_ids,
        "checksum": blob_content.checksum(chunk.kv),
        "num_bytes": chunk.kv.nbytes,
        "vector": _to_base64(chunk.vector),
        "sketch": _to_base64(chunk.sketch),
    }


def _turn_from_json(entry: _Entry, blobs: Mapping[str, bytes]) -> ArchivedTurn:
    fields = entry.turn.model_dump()
    scope = Scope(**{name: fields.pop(name) for name in ("namespace", "user_id", "agent_id", "session_id")})
    turn = TurnRecord(**fields, scope=scope)
    if blobs.keys() != {chunk.key for chunk in entry.chunks}:
        raise damaged(f"the chunks of turn {turn.turn_id!r} are not the ones it names")
    if strangers := blobs.keys() - {*entry.context, *turn.chunk_keys}:
        raise damaged(f"chunks {sorted(strangers)} are not of turn {turn.turn_id!r}")
    return ArchivedTurn(
        turn=turn,
        aliases=tuple(map(TurnId, entry.aliases)),
        context=tuple(map(ChunkKey, entry.context)),
        chunks=tuple(_chunk_from_json(chunk, blobs[chunk.key], turn.fingerprint) for chunk in entry.chunks),
    )


def _chunk_from_json(chunk: _Chunk, blob: bytes, fingerprint: Fingerprint) -> NewChunk:
    key, parent, text_key = ChunkKey(chunk.key), ChunkKey(chunk.parent), ContentKey(chunk.content_key)
    try:
        kv = blob_content.decode(blob, key)
        # A key says which tokens, behind which context and of which model: the one thing others rely on.
        expected = (chain_key(parent, chunk.token_ids), content_key(fingerprint, chunk.token_ids))
        if (key, text_key) != expected:
            raise CorruptChunkError("its key is not that of its tokens")
        if kv.nbytes != chunk.num_bytes or not blob_content.is_of(kv, chunk.checksum):
            raise CorruptChunkError("its checksum differs")
        return NewChunk(
            key=key,
            content_key=text_key,
            parent=parent,
            start=chunk.start,
            token_ids=chunk.token_ids,
            kv=kv,
            vector=_from_base64(chunk.vector),
            sketch=_from_base64(chunk.sketch),
        )
    except (CorruptChunkError, ValueError, OverflowError) as err:
        raise damaged(f"chunk {key} in it is not sound ({err})") from err


def _to_base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _from_base64(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text, validate=True)
