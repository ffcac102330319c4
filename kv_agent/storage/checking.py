"""Whether rows and files of a store agree, found out by reading every byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kv_agent.chunks import ChunkRecord
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.storage.blobs import BlobFiles, FoundFile, MissingBlobError
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.garbage import Orphans


@dataclass(frozen=True, slots=True, kw_only=True)
class BadChunk:
    """A chunk whose bytes could not be read; with ``is_gone`` they never will be: lost or damaged."""

    record: ChunkRecord
    problem: str
    is_gone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is wrong with a store, in words; nothing in :attr:`problems` means it is sound.

    ``young`` files may be being stored right now, so they are no problem yet. Nobody but the user can do
    anything about ``beyond_repair``.
    """

    bad_chunks: tuple[BadChunk, ...]
    orphans: tuple[str, ...]
    young: tuple[str, ...]
    beyond_repair: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        return [*(chunk.problem for chunk in self.bad_chunks), *self.orphans, *self.beyond_repair]


def inspect(
    catalog: Catalog, blobs: BlobFiles, read: Callable[[ChunkRecord], object], older_than_s: float
) -> Inspection:
    """See :meth:`kv_agent.storage.store.LocalStore.inspect`; ``read`` raises unless a chunk is sound."""
    files_before = blobs.files()
    used_blobs: set[str] = set()
    bad_chunks: list[BadChunk] = []
    for record in catalog.all_chunks():
        used_blobs.add(record.blob)
        if not record.quarantined and (bad := _bad_chunk(catalog, read, record)):
            bad_chunks.append(bad)
    # Listed before the rows and still there after them: not a file that a turn stored or forgotten
    # meanwhile explains.
    orphans = Orphans(older_than_s)
    for relpath in sorted(files_before.keys() & blobs.files().keys() - used_blobs):
        orphans.add(relpath, files_before[relpath])
    return Inspection(
        bad_chunks=tuple(bad_chunks),
        orphans=_sentences(orphans.old, "a crash left it, or it is being stored right now"),
        young=_sentences(orphans.young, "it is being stored right now, or a crash left it"),
        beyond_repair=(
            *_sentences(orphans.foreign, "kv_agent does not name files like this; move it away"),
            *catalog.damage(),
        ),
    )


def _bad_chunk(
    catalog: Catalog, read: Callable[[ChunkRecord], object], record: ChunkRecord
) -> BadChunk | None:
    try:
        read(record)
    except StorageError as err:
        # Not a problem if it was forgotten, quarantined or replaced while we looked.
        if catalog.chunks([record.key]).get(record.key) != record:
            return None
        is_gone = isinstance(err, MissingBlobError | CorruptChunkError)
        kind = "lost" if isinstance(err, MissingBlobError) else "damaged" if is_gone else "unreadable"
        return BadChunk(record=record, problem=f"chunk {record.key} is {kind}: {err}", is_gone=is_gone)
    return None


def _sentences(files: dict[str, FoundFile], why: str) -> tuple[str, ...]:
    return tuple(
        f"file {relpath} ({file.num_bytes} bytes) belongs to no chunk: {why}"
        for relpath, file in files.items()
    )
