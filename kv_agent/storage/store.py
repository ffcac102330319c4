"""The local store: blob files, their catalog and tiers in memory, kept consistent with each other.

Bytes are durable before a row names them, and a row is gone before its bytes are, so that a crash at
any moment leaves at worst a file nobody refers to.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord, ContentKey, Scope, TurnId, TurnRecord
from kv_agent.config import Fsync
from kv_agent.errors import StorageError
from kv_agent.machine import work_aside
from kv_agent.storage import blob_content, checking, garbage
from kv_agent.storage.blobs import BlobFiles, MissingBlobError
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.checking import BadChunk, Inspection
from kv_agent.storage.codecs import PLAIN, Codec, Payload, codec_of
from kv_agent.storage.eviction import Evictor
from kv_agent.storage.garbage import GRACE_S, Garbage
from kv_agent.storage.ledger import Gone
from kv_agent.storage.policy import Policy, policy_named
from kv_agent.storage.ranking import AccessWindow
from kv_agent.storage.retention import Retention, default_disk_bytes
from kv_agent.storage.tier_stack import Move, TierStack, memory_tiers
from kv_agent.storage.tiers import DiskTier, Loaded, StoredChunk, TierWatcher
from kv_agent.storage.turn_writes import AddResult, UnknownChunkError

logger = logging.getLogger(__name__)

_PUT_ATTEMPTS = 3
_EXPIRED_AT_ONCE = 100  # turns, under one hold of the catalog's write lock: others wait meanwhile


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewChunk:
    """A chunk to be stored: ``kv`` is contiguous ``[L, 2, T, H, D]`` on the CPU, or coded already.

    Whoever passes it on no longer modifies ``kv``. A chunk that can be found has its pooled keys as
    ``vector`` (little-endian float32) and those of its tokens as ``sketch``.
    """

    key: ChunkKey
    content_key: ContentKey
    parent: ChunkKey
    start: int
    token_ids: tuple[int, ...]
    kv: Payload
    vector: bytes | None
    sketch: bytes | None = None

    def __post_init__(self) -> None:
        if len(self.kv.shape) != 5 or self.kv.shape[2] != len(self.token_ids):
            raise ValueError(
                f"chunk {self.key}: kv of shape {tuple(self.kv.shape)} is not [L, 2, T, H, D] with"
                f" T = {len(self.token_ids)} tokens"
            )


class LocalStore:
    """One directory that any number of threads and processes on this machine may share.

    ``device_bytes``, ``host_bytes`` and ``warm_bytes`` bound this process's copies of chunks, see
    :mod:`~kv_agent.storage.tier_stack`; ``device`` is where the engine needs KV. ``fsync`` says whether
    storing waits until the disk has the bytes. ``policy`` says who goes first where there is no room, on disk
    and in the tiers, unless a namespace names its own. ``disk_bytes`` is what the files of all namespaces may
    take, by default most of what is free, see :func:`~kv_agent.storage.retention.default_disk_bytes`. Storing
    a turn makes room for it, unless ``makes_room`` leaves that to another process, see :meth:`make_room`.
    """

    def __init__(
        self,
        root: Path,
        host_bytes: int,
        *,
        warm_bytes: int = 0,
        device_bytes: int = 0,
        device: torch.device | None = None,
        promote_after: int = 1,
        policy: Policy | None = None,
        codec: Codec = PLAIN,
        fsync: Fsync = "always",
        disk_bytes: int | None = None,
        makes_room: bool = True,
    ) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise StorageError(f"cannot create the store directory {root}: {err}") from err
        self._root = root
        self.codec = codec
        self._blobs = BlobFiles(root, fsync)
        policy = policy or policy_named("lru")
        memory = memory_tiers(
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            warm_bytes=warm_bytes,
            device=device,
            policy=policy,
        )
        self._catalog = Catalog(root / "catalog.sqlite3", fsync)
        if disk_bytes is None:
            used_bytes = self._catalog.ledger.held(None).num_bytes
            disk_bytes = default_disk_bytes(self._blobs.free_bytes(), used_bytes)
        self._evictor = Evictor(self._catalog, policy, disk_bytes)
        self._disk_bytes = disk_bytes
        self._makes_room = makes_room
        self._tiers = TierStack(
            memory,
            DiskTier(self._read, self.disk_counts),
            AccessWindow(promote_after),
            ThreadPoolExecutor(1, "kv-agent-tiers", initializer=work_aside),
        )

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

        When this returns, the turn survives a crash of the process and, if the store syncs, a power loss.
        Content chunks named in ``turn.chunk_keys`` may be left out of ``content`` when they are stored
        already, and such context be given as a bare key. With ``is_part`` context is added to a turn that
        must be there. Then turns go that exceed the limits; this one does if there is no room for it at all.
        """
        turn = self._evictor.with_expiry(turn)
        given = {chunk.key: chunk for chunk in (*context, *content) if isinstance(chunk, NewChunk)}
        with self._tiers.entering(given) as moves:
            for _ in range(_PUT_ATTEMPTS - 1):
                try:
                    return self._put_turn(turn, context, content, given, moves, is_part)
                except UnknownChunkError as err:
                    if not err.keys <= given.keys():
                        raise
                    # Another process forgot a chunk after we had found it stored: it is written now.
            return self._put_turn(turn, context, content, given, moves, is_part)

    def make_room(self, scope: Scope, stored: TurnId, *, is_new: bool = True) -> None:
        """Let turns go that exceed the limits now that this one is stored; after trouble the next tries.

        It goes itself if there is no room for it at all, unless it was there before.
        """
        for gone in self._evictor.make_room(scope, stored, is_new=is_new):
            self._let_go(gone)

    def retention(self, namespace: str) -> Retention:
        """The limits that apply to a namespace: its own, else those of all others."""
        return self._catalog.ledger.retention(namespace)

    def set_retention(self, namespace: str | None, retention: Retention | None) -> None:
        """Set the limits of a namespace for all processes, ``None`` being all that have none of their own.

        Without ``retention`` they are taken away. What exceeds them goes when the next turn is stored there.
        """
        self._catalog.ledger.set_retention(namespace, retention)

    def load(self, record: ChunkRecord, delta: int = 0) -> Loaded:
        """The chunk for a place ``delta`` above its own, verified; shared with tiers, so never modify it.

        Keys in fewer bits that no tier keeps stand there already. It is on the store's ``device`` if the tier
        there has it, else on the CPU. Raises :class:`MissingBlobError` or :class:`CorruptChunkError` when the
        bytes are lost, and a plain :class:`StorageError` when they may be fine.
        """
        return self._tiers.load(record, delta)

    def note_uses(self, chunks: Sequence[StoredChunk]) -> None:
        """Somebody uses chunks that were in memory without :meth:`load`: count that all the same."""
        self._tiers.note_uses(chunks)

    def watch_memory(self, watcher: TierWatcher) -> None:
        """Tell ``watcher`` which chunks come into memory as tensors from now on, and go again."""
        self._tiers.watch(watcher)

    def stored(self, record: ChunkRecord) -> Payload:
        """The chunk as its bytes are on disk, verified; raises as :meth:`load` does."""
        payload = self._blobs.read_chunk(record.blob, record.tensor)
        blob_content.verify(payload, record)
        return payload

    def quarantine(self, key: ChunkKey, reason: str) -> None:
        """No longer offer a chunk whose bytes turned out to be bad or lost."""
        self._catalog.quarantine(key, reason)
        self._tiers.discard(key)

    def forget(self, turn_ids: Iterable[TurnId]) -> None:
        """Delete turns and whatever bytes only they used; unknown ids are fine."""
        keys = self._catalog.chunk_keys_of_turns(ids := list(turn_ids))
        unused_blobs = self._catalog.forget(ids)
        try:
            for relpath in unused_blobs:
                self._blobs.delete(relpath)
        finally:  # behind that, for who reads them meanwhile would keep a copy
            for key in keys - self._catalog.chunks(keys).keys():
                self._tiers.discard(key)

    def forget_expired(self, now: float) -> int:
        """Delete turns whose time is over at ``now`` (Unix time), as :meth:`forget` does -> how many."""
        num_gone = 0
        is_more = bool(self._catalog.expired(now))  # mostly there are none: then nobody waits for a lock
        while is_more:
            gone = self._catalog.ledger.expire(now, _EXPIRED_AT_ONCE)
            self._let_go(gone)
            num_gone += len(gone.turn_ids)
            is_more = len(gone.turn_ids) == _EXPIRED_AT_ONCE
        return num_gone

    def disk_counts(self) -> dict[str, int]:
        """``bytes`` of the files, ``chunks`` in them, and the ``limit`` of the bytes."""
        ledger = self._catalog.ledger
        num_bytes, num_chunks = ledger.held(None).num_bytes, ledger.totals().num_chunks
        return {"bytes": num_bytes, "chunks": num_chunks, "limit": self._disk_bytes}

    def free_bytes(self) -> int:
        """How many more bytes the disk takes, whatever the limit."""
        return self._blobs.free_bytes()

    def memory_counts(self) -> dict[str, dict[str, int]]:
        """What each tier in memory of this process counts, by its name, without asking the disk."""
        return self._tiers.memory_counts()

    def stats(self) -> dict[str, int]:
        """The catalog's counts, and what each tier of this process counts, as ``tier_NAME_WHAT``.

        ``host_bytes`` and ``host_chunks`` are those of the tier ``host``, 0 if there is none. Turns that were
        evicted or refused count from all processes, since the store exists.
        """
        tiers = self._tiers.counts()
        accounts = self._catalog.ledger.accounts().values()
        return {
            **self._catalog.stats(),
            "host_bytes": tiers.get("tier_host_bytes", 0),
            "host_chunks": tiers.get("tier_host_chunks", 0),
            **tiers,
            "evicted_turns": sum(account.evicted_turns for account in accounts),
            "evicted_bytes": sum(account.evicted_bytes for account in accounts),
            "refused_turns": sum(account.refused_turns for account in accounts),
        }

    def check(self) -> list[str]:
        """Compare rows with files, reading every byte -> problems in words, none if all is well.

        A file that is being stored right now is one of them, see :meth:`inspect`.
        """
        found = self.inspect(older_than_s=0)
        return [*found.problems, *found.young]

    def inspect(self, older_than_s: float = GRACE_S) -> Inspection:
        """As :meth:`check`; a file without a row is a problem once it is ``older_than_s`` seconds old."""
        return checking.inspect(self._catalog, self._blobs, self.stored, older_than_s)

    def repair(self, found: Inspection) -> list[BadChunk]:
        """Quarantine the chunks whose bytes are lost or damaged -> those that now are.

        Computing their tokens again stores them again. Files are for :meth:`collect_garbage`.
        """
        quarantined = []
        for bad in found.bad_chunks:
            key, blob = bad.record.key, bad.record.blob
            if bad.is_gone and self._catalog.quarantine(key, bad.problem, blob):
                self._tiers.discard(key)
                quarantined.append(bad)
        return quarantined

    def collect_garbage(self, older_than_s: float = GRACE_S, *, dry_run: bool = False) -> Garbage:
        """Delete what nobody can find any more; safe while others store.

        That is turns whose time is over, chunks of no turn, files ``older_than_s`` seconds old that no row
        names, and free pages of the catalog. A dry run only tells.
        """
        found = garbage.collect(
            self._root, self._catalog, self._blobs, older_than_s=older_than_s, dry_run=dry_run
        )
        copies = self._tiers.chunk_keys()
        for key in copies - self._catalog.chunks(copies).keys():
            self._tiers.discard(key)
        return found

    def close(self) -> None:
        """Close tiers and catalog; twice is harmless."""
        self._tiers.close()
        self._catalog.close()

    def _put_turn(
        self,
        turn: TurnRecord,
        context: Sequence[NewChunk | ChunkKey],
        content: Sequence[NewChunk],
        chunks: Mapping[ChunkKey, NewChunk],
        moves: Mapping[ChunkKey, Move],
        is_part: bool,
    ) -> AddResult:
        stored = self._catalog.chunks(chunks)
        live = {key for key, record in stored.items() if not record.quarantined}
        new = {key: chunk for key, chunk in chunks.items() if key not in live}
        name = _blob_name(turn)
        blob = self._blobs.relpath(name)
        payloads = {key: self._payload(chunk) for key, chunk in new.items()}
        draft = blob_content.Draft(payloads, turn.fingerprint)

        def write_missing_blob() -> None:
            if new and not self._blobs.has(blob):
                self._blobs.write(name, draft.parts())

        with suppress(MissingBlobError):  # collected as garbage while it was written; see before_commit
            write_missing_blob()
        records = {
            key: _record(chunk, turn, blob, payloads[key], draft.checksum(key)) for key, chunk in new.items()
        }
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
            if isinstance(kv := new[key].kv, Tensor):
                self._tiers.put(records[key], kv, moves[key])
        if self._makes_room:
            self.make_room(turn.scope, result.turn_id, is_new=result.new_turn)
        return result

    def _let_go(self, gone: Gone) -> None:
        self._delete_unused(gone.blobs)  # first, as in `forget`
        for key in gone.keys:
            self._tiers.discard(key)

    def _delete_unused(self, relpaths: Iterable[str]) -> None:
        for relpath in relpaths:
            try:
                self._blobs.delete(relpath)
            except StorageError as err:  # costs disk space only; check() finds it
                logger.warning("an unused file stays behind: %s", err, extra={"event": "file_left"})

    def _payload(self, chunk: NewChunk) -> Payload:
        return self.codec.encode(chunk.kv, chunk.start) if isinstance(chunk.kv, Tensor) else chunk.kv

    def _read(self, record: ChunkRecord, delta: int) -> Loaded:
        turned = 0 if record.is_lossless else delta  # decoding other keys turns them to any place
        return Loaded(self.codec.decode(self.stored(record), record.start + turned), delta - turned)


def _key_of(chunk: NewChunk | ChunkKey) -> ChunkKey:
    return chunk.key if isinstance(chunk, NewChunk) else chunk


def _blob_name(turn: TurnRecord) -> str:
    # Unique, because the same turn id may be stored again - by a retry, another process or a re-capture -
    # and then must neither replace nor delete a file that rows already name.
    readable = re.sub(r"[^0-9A-Za-z_-]", "_", turn.turn_id)[:64]
    return f"{readable}-{secrets.token_hex(8)}"


def _record(chunk: NewChunk, turn: TurnRecord, blob: str, payload: Payload, checksum: str) -> ChunkRecord:
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
        checksum=checksum,
        num_bytes=payload.nbytes,
        codec=codec_of(payload),
    )
