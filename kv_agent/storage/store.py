"""The local store: blob files, their catalog and a host cache, kept consistent with each other.

Bytes are durable before a row names them, and a row is gone before its bytes are, so that a crash at
any moment leaves at worst a file nobody refers to.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord, ContentKey, TurnId, TurnRecord
from kv_agent.errors import StorageError
from kv_agent.storage import checking, codec, garbage
from kv_agent.storage.blobs import BlobFiles, MissingBlobError
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.checking import BadChunk, Inspection
from kv_agent.storage.garbage import GRACE_S, Garbage
from kv_agent.storage.lru import ChunkCache
from kv_agent.storage.turn_writes import AddResult, UnknownChunkError

logger = logging.getLogger(__name__)

_PUT_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewChunk:
    """A chunk to be stored: ``kv`` is contiguous ``[L, 2, T, H, D]`` on the CPU.

    Whoever passes it on no longer modifies ``kv``. A chunk that can be found has its pooled keys as
    ``vector`` (little-endian float32) and those of its tokens as ``sketch``.
    """

    key: ChunkKey
    content_key: ContentKey
    parent: ChunkKey
    start: int
    token_ids: tuple[int, ...]
    kv: Tensor
    vector: bytes | None
    sketch: bytes | None = None

    def __post_init__(self) -> None:
        if self.kv.dim() != 5 or self.kv.shape[2] != len(self.token_ids):
            raise ValueError(
                f"chunk {self.key}: kv of shape {tuple(self.kv.shape)} is not [L, 2, T, H, D] with"
                f" T = {len(self.token_ids)} tokens"
            )


class LocalStore:
    """One directory that any number of threads and processes on this machine may share."""

    def __init__(self, root: Path, host_bytes: int) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise StorageError(f"cannot create the store directory {root}: {err}") from err
        self._root = root
        self._blobs = BlobFiles(root)
        self._cache = ChunkCache(host_bytes)
        self._catalog = Catalog(root / "catalog.sqlite3")

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    def put_turn(
        self,
        turn: TurnRecord,
        context: Sequence[NewChunk | ChunkKey],
        content: Sequence[NewChunk],
        *,
        is_part: bool = False,
    ) -> AddResult:
        """Store a turn and those of its chunks whose bytes the store does not have yet.

        When this returns, the turn survives a crash. Content chunks named in ``turn.chunk_keys`` may
        be left out of ``content`` when they are stored already, and such context be given as a bare key.
        With ``is_part`` context is added to a turn that must be there.
        """
        given = {chunk.key for chunk in (*context, *content) if isinstance(chunk, NewChunk)}
        for _ in range(_PUT_ATTEMPTS - 1):
            try:
                return self._put_turn(turn, context, content, is_part)
            except UnknownChunkError as err:
                if not err.keys <= given:
                    raise
                # Another process forgot a chunk after we had found it stored: write it this time.
        return self._put_turn(turn, context, content, is_part)

    def load(self, record: ChunkRecord) -> Tensor:
        """The chunk's tensor, verified; shared with the cache, so never modify it.

        Raises :class:`MissingBlobError` or :class:`CorruptChunkError` when the bytes are lost, and a
        plain :class:`StorageError` when they may be fine.
        """
        cached = self._cache.get(record.key)
        if cached is not None:
            return cached
        tensor = self._read(record)
        self._cache.put(record.key, tensor)
        return tensor

    def quarantine(self, key: ChunkKey, reason: str) -> None:
        """No longer offer a chunk whose bytes turned out to be bad or lost."""
        self._catalog.quarantine(key, reason)
        self._cache.discard(key)

    def forget(self, turn_ids: Iterable[TurnId]) -> None:
        """Delete turns and whatever bytes only they used; unknown ids are fine."""
        ids = list(turn_ids)
        keys = self._catalog.chunk_keys_of_turns(ids)
        unused_blobs = self._catalog.forget(ids)
        for key in keys - self._catalog.chunks(keys).keys():
            self._cache.discard(key)
        for relpath in unused_blobs:
            self._blobs.delete(relpath)

    def forget_expired(self, now: float) -> None:
        """Delete turns whose time is over at ``now`` (Unix time), as :meth:`forget` does."""
        if expired := self._catalog.expired(now):
            self.forget(expired)

    def stats(self) -> dict[str, int]:
        """The catalog's counts, and ``host_bytes`` and ``host_chunks`` of this process's cache."""
        return {
            **self._catalog.stats(),
            "host_bytes": self._cache.used_bytes,
            "host_chunks": len(self._cache),
        }

    def check(self) -> list[str]:
        """Compare rows with files, reading every byte -> problems in words, none if all is well.

        A file that is being stored right now is one of them, see :meth:`inspect`.
        """
        found = self.inspect(older_than_s=0)
        return [*found.problems, *found.young]

    def inspect(self, older_than_s: float = GRACE_S) -> Inspection:
        """As :meth:`check`; a file without a row is a problem once it is ``older_than_s`` seconds old."""
        return checking.inspect(self._catalog, self._blobs, self._read, older_than_s)

    def repair(self, found: Inspection) -> list[BadChunk]:
        """Quarantine the chunks whose bytes are lost or damaged -> those that now are.

        Computing their tokens again stores them again. Files are for :meth:`collect_garbage`.
        """
        quarantined = []
        for bad in found.bad_chunks:
            key, blob = bad.record.key, bad.record.blob
            if bad.is_gone and self._catalog.quarantine(key, bad.problem, blob):
                self._cache.discard(key)
                quarantined.append(bad)
        return quarantined

    def collect_garbage(self, older_than_s: float = GRACE_S, *, dry_run: bool = False) -> Garbage:
        """Delete what nobody can find any more; safe while others store.

        That is turns whose time is over, chunks of no turn, files ``older_than_s`` seconds old that no row
        names, and free pages of the catalog. A dry run only tells.
        """
        return garbage.collect(
            self._root, self._catalog, self._blobs, older_than_s=older_than_s, dry_run=dry_run
        )

    def close(self) -> None:
        """Close the catalog; twice is harmless."""
        self._catalog.close()

    def _put_turn(
        self,
        turn: TurnRecord,
        context: Sequence[NewChunk | ChunkKey],
        content: Sequence[NewChunk],
        is_part: bool,
    ) -> AddResult:
        chunks = {chunk.key: chunk for chunk in (*context, *content) if isinstance(chunk, NewChunk)}
        stored = self._catalog.chunks(chunks)
        live = {key for key, record in stored.items() if not record.quarantined}
        new = {key: chunk for key, chunk in chunks.items() if key not in live}
        name = _blob_name(turn)
        blob = self._blobs.relpath(name)
        records = {key: _record(chunk, turn, blob) for key, chunk in new.items()}

        def write_missing_blob() -> None:
            if new and not self._blobs.has(blob):
                data = codec.encode({key: chunk.kv for key, chunk in new.items()}, turn.fingerprint)
                self._blobs.write(name, data)

        with suppress(MissingBlobError):  # collected as garbage while it was written; see before_commit
            write_missing_blob()
        try:
            result = self._catalog.add_turn(
                turn,
                # A live context chunk goes by its key alone: were it forgotten meanwhile, a record would
                # bring back its row without its bytes.
                [records.get(key, key) for key in map(_key_of, context)],
                [records[chunk.key] for chunk in content if chunk.key in records],
                {key: chunk.vector for key, chunk in chunks.items() if chunk.vector is not None},
                {key: chunk.sketch for key, chunk in chunks.items() if chunk.sketch is not None},
                is_part=is_part,
                # Whoever collected it meanwhile needs the lock that is held now to do so again.
                before_commit=write_missing_blob,
            )
        except (StorageError, ValueError):
            self._delete_unused([blob] if new else [])
            raise
        if new and not result.new_chunks:  # another process stored the same chunks first
            self._delete_unused([blob])
        self._delete_unused(result.unused_blobs)
        for key in result.new_chunks:
            self._cache.put(key, new[key].kv)
        return result

    def _delete_unused(self, relpaths: Iterable[str]) -> None:
        for relpath in relpaths:
            try:
                self._blobs.delete(relpath)
            except StorageError as err:  # costs disk space only; check() finds it
                logger.warning("an unused file stays behind: %s", err)

    def _read(self, record: ChunkRecord) -> Tensor:
        tensor = self._blobs.read_tensor(record.blob, record.tensor)
        codec.verify(tensor, record)
        return tensor


def _key_of(chunk: NewChunk | ChunkKey) -> ChunkKey:
    return chunk.key if isinstance(chunk, NewChunk) else chunk


def _blob_name(turn: TurnRecord) -> str:
    # Unique, because the same turn id may be stored again - by a retry, another process or a re-capture -
    # and then must neither replace nor delete a file that rows already name.
    readable = re.sub(r"[^0-9A-Za-z_-]", "_", turn.turn_id)[:64]
    return f"{readable}-{secrets.token_hex(8)}"


def _record(chunk: NewChunk, turn: TurnRecord, blob: str) -> ChunkRecord:
    return ChunkRecord(
        key=chunk.key,
        content_key=chunk.content_key,
        parent=chunk.parent,
        fingerprint=turn.fingerprint,
        namespace=turn.scope.namespace,
        user_id=turn.scope.user_id,
        start=chunk.start,
        token_ids=chunk.token_ids,
        blob=blob,
        tensor=chunk.key,
        sha256=codec.checksum(chunk.kv),
        num_bytes=chunk.kv.nbytes,
    )
