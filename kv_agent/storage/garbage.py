"""Collecting what a store no longer needs, beside processes that are storing right now.

A file that no row names was left by a crash, or its row is about to be committed. Two things keep the
latter safe: files younger than a grace time stay, and an older one is deleted under the catalog's write
lock, under which whoever commits a row looks whether its file is still there and else writes it again.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kv_agent.errors import ConfigError, StorageError
from kv_agent.storage.blobs import BlobFiles, FoundFile
from kv_agent.storage.catalog import Catalog

GRACE_S = 3600.0

# Files deleted under one hold of the write lock: others wait meanwhile.
_BATCH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What was, or in a dry run would be, collected.

    ``young`` files belong to no chunk but may be being stored; ``foreign`` ones are not named as this
    package names files, so they stay. ``catalog_bytes`` is by how much the catalog shrank.
    """

    num_turns: int
    num_chunks: int
    num_files: int
    file_bytes: int
    young: tuple[str, ...]
    foreign: tuple[str, ...]
    catalog_bytes: int


class Orphans:
    """Files of a store that no row names, by what may be done about them."""

    def __init__(self, older_than_s: float) -> None:
        if not older_than_s >= 0:  # NaN, too
            raise ConfigError(f"the age of files to collect must be >= 0 seconds, got {older_than_s}")
        self._newest = time.time() - older_than_s
        self.old: dict[str, FoundFile] = {}
        self.young: dict[str, FoundFile] = {}
        self.foreign: dict[str, FoundFile] = {}

    def add(self, relpath: str, file: FoundFile) -> None:
        if not BlobFiles.owns(relpath):
            self.foreign[relpath] = file
        elif file.modified > self._newest:
            self.young[relpath] = file
        else:
            self.old[relpath] = file


def collect(root: Path, catalog: Catalog, blobs: BlobFiles, *, older_than_s: float, dry_run: bool) -> Garbage:
    """See :meth:`kv_agent.storage.store.LocalStore.collect_garbage`."""
    files = blobs.files()  # before the rows: what is written from now on is none of our business
    orphans = Orphans(older_than_s)
    dropped = catalog.drop_overdue(time.time(), dry_run=dry_run)
    unused = {relpath: files[relpath] for relpath in dropped.blobs if relpath in files}
    for relpath in catalog.unnamed(files.keys() - unused.keys()):
        orphans.add(relpath, files[relpath])
    if not dry_run:
        for relpath in dropped.blobs:
            blobs.delete(relpath)
    deleted = _delete_old(catalog, blobs, orphans, dry_run=dry_run) | unused
    snapshots = _drop_unfinished_snapshots(root / "index", time.time() - older_than_s, dry_run=dry_run)
    return Garbage(
        num_turns=dropped.num_turns,
        num_chunks=dropped.num_chunks,
        num_files=len(deleted) + len(snapshots),
        file_bytes=sum(file.num_bytes for file in deleted.values()) + sum(snapshots),
        young=tuple(sorted(orphans.young)),
        foreign=tuple(sorted(orphans.foreign)),
        catalog_bytes=0 if dry_run else catalog.shrink(),
    )


def _delete_old(
    catalog: Catalog, blobs: BlobFiles, orphans: Orphans, *, dry_run: bool
) -> dict[str, FoundFile]:
    """The files that went, or in a dry run would go."""
    if dry_run:
        return dict(orphans.old)
    relpaths = sorted(orphans.old)
    deleted: list[str] = []
    for start in range(0, len(relpaths), _BATCH):
        deleted += catalog.unnamed(relpaths[start : start + _BATCH], blobs.delete)
    return {relpath: orphans.old[relpath] for relpath in deleted}


def _drop_unfinished_snapshots(folder: Path, newest: float, *, dry_run: bool) -> list[int]:
    """Index snapshots last modified by ``newest`` whose writer was killed -> bytes of each."""
    sizes: list[int] = []
    try:
        for path in folder.rglob(".*.tmp"):
            with suppress(FileNotFoundError):  # finished meanwhile
                state = path.stat()
                if state.st_mtime <= newest:
                    if not dry_run:
                        path.unlink()
                    sizes.append(state.st_size)
    except OSError as err:
        raise StorageError(f"cannot collect unfinished index snapshots in {folder}: {err}") from err
    return sizes
