"""Blob files on local disk: written atomically and durably, read one tensor at a time.

Reading does not use ``safetensors.safe_open``: it reports every failure to open as a missing file, so
running out of file descriptors would look like lost data, and it maps the file, so a disk error would
kill the process with SIGBUS instead of raising.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kv_agent.config import Fsync
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.storage import blob_content
from kv_agent.storage.blob_content import Part
from kv_agent.storage.codecs import Payload

_FOLDER = "blobs"
_NAME = re.compile(r"[0-9A-Za-z_-]{2,200}")
_RELPATH = re.compile(_FOLDER + r"/[0-9A-Za-z_-]{2}/[0-9A-Za-z_-]{2,200}\.(safetensors|[0-9a-f]+\.tmp)")

_EARLY_BYTES = 1 << 20  # of less it is not worth while to tell the disk before all is there

_ADVICE = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space or raise the quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "mount the disk writable",
    errno.EACCES: "make the folder writable for this process",
    errno.EPERM: "make the folder writable for this process",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
}


class MissingBlobError(StorageError):
    """The store is there but the blob file is not: its chunks are lost. Quarantine them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file in the blob folder; ``modified`` is Unix time."""

    num_bytes: int
    modified: float


class BlobFiles:
    """Files ``blobs/<first two characters of name>/<name>.safetensors`` under ``root``. Thread-safe.

    With ``fsync="never"`` a power loss may leave files empty or torn, or take them, after they were written.
    """

    def __init__(self, root: Path, fsync: Fsync = "always") -> None:
        self._root = root
        self._syncs = fsync == "always"
        self._durable_folders: set[Path] = set()
        try:
            # Here and never again: were the folder gone later, its disk would be, too.
            (root / _FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StorageError(f"cannot use {root} as a store: {_told(err)}") from err

    @staticmethod
    def relpath(name: str) -> str:
        """Where the file of that name is, relative to the root."""
        if not _NAME.fullmatch(name):
            raise StorageError(f"blob name {name!r} must be 2 to 200 letters, digits, '_' or '-'")
        return f"{_FOLDER}/{name[:2]}/{name}.safetensors"

    def write(self, name: str, parts: Iterable[Part]) -> str:
        """Store a new file, durably if this class syncs, and return its path relative to the root.

        Nobody may look for a file of that name before. Raises :class:`MissingBlobError` when the unfinished
        file was deleted under its feet.
        """
        relpath = self.relpath(name)
        path = self._root / relpath
        num_bytes = 0
        try:
            folders = self._made_folders(path.parent)
            with _replaced(path, sync=folders if self._syncs else (), is_known=False) as file:
                for offset, data in parts:
                    file.seek(offset)
                    file.write(data)
                    num_bytes += len(data)
                    if self._syncs and len(data) >= _EARLY_BYTES:
                        _start_writing(file, offset, len(data))
            self._durable_folders.add(path.parent)
        except OSError as err:
            if isinstance(err, FileNotFoundError):
                self._require_folder(err)
            kind = MissingBlobError if isinstance(err, FileNotFoundError) else StorageError
            raise kind(f"cannot store {relpath} ({num_bytes} bytes) in {self._root}: {_told(err)}") from err
        return relpath

    def read_chunk(self, relpath: str, tensor_name: str) -> Payload:
        """Only that chunk's bytes, in memory the caller owns."""
        path = self._resolve(relpath)
        try:
            with open(path, "rb", buffering=0) as file:
                return _read_chunk(file, tensor_name)
        except FileNotFoundError as err:
            self._require_folder(err)
            raise MissingBlobError(f"blob {relpath} is missing in {self._root}") from err
        except OSError as err:
            raise StorageError(f"cannot read blob {relpath} in {self._root}: {_told(err)}") from err
        except CorruptChunkError as err:
            raise CorruptChunkError(f"blob {relpath}: {err}") from err

    def delete(self, relpath: str) -> None:
        """Remove a file; a missing one is fine."""
        try:
            self._resolve(relpath).unlink(missing_ok=True)
        except OSError as err:
            raise StorageError(f"cannot delete blob {relpath} in {self._root}: {_told(err)}") from err

    def has(self, relpath: str) -> bool:
        """Whether the file is there; its content is not looked at."""
        return os.path.isfile(self._resolve(relpath))

    def files(self) -> dict[str, FoundFile]:
        """Every file by relative path, including ``.tmp`` files that a crash left behind."""
        found: dict[str, FoundFile] = {}
        try:
            for path in (self._root / _FOLDER).glob("*/*"):
                with suppress(FileNotFoundError):  # deleted or renamed meanwhile
                    state = path.lstat()
                    if stat.S_ISREG(state.st_mode):
                        relpath = path.relative_to(self._root).as_posix()
                        found[relpath] = FoundFile(num_bytes=state.st_size, modified=state.st_mtime)
        except OSError as err:
            raise StorageError(f"cannot list the blobs in {self._root}: {_told(err)}") from err
        return found

    def free_bytes(self) -> int:
        """How many more bytes the disk takes."""
        try:
            return shutil.disk_usage(self._root).free
        except OSError as err:
            raise StorageError(f"cannot see how much room there is in {self._root}: {err}") from err

    @staticmethod
    def owns(relpath: str) -> bool:
        """Whether :meth:`write` could have made a file of this name."""
        return _RELPATH.fullmatch(relpath) is not None

    def _resolve(self, relpath: str) -> Path:
        if not self.owns(relpath):
            raise CorruptChunkError(f"blob path {relpath!r} does not name a file in the blob folder")
        return self._root / relpath

    def _require_folder(self, err: OSError) -> None:
        """A file is not there: an unmounted disk must not quarantine everything."""
        if not os.path.isdir(self._root / _FOLDER):
            raise StorageError(f"no folder {_FOLDER} in {self._root}; is the disk mounted?") from err

    def _made_folders(self, folder: Path) -> tuple[Path, ...]:
        """The folder, made if it is not there, and those that name it, unless that is durable already."""
        if folder in self._durable_folders and folder.is_dir():
            return (folder,)
        folder.mkdir(exist_ok=True)
        # Whoever made the folders may not have synced them yet, so every process does it once.
        return (folder, folder.parent, self._root)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is there, durably, once the block ends without an error; else what was there stays."""
    try:
        # What is in it is as private as the store.
        with _replaced(path, sync=[path.parent], mode=0o600) as file:
            yield file
    except OSError as err:
        raise StorageError(f"cannot write {path}: {_told(err)}") from err


@contextmanager
def existing_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be read; trouble with the disk is a :class:`StorageError`."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as err:
        raise StorageError(f"cannot read {path}: {err}") from err


@contextmanager
def _replaced(
    path: Path, *, sync: Sequence[Path], is_known: bool = True, mode: int = 0o666
) -> Iterator[BinaryIO]:
    """A new file in place of what was there; it and then the folders ``sync`` are synced, if there are any.

    One whose name is not yet known to anybody has it before it is synced, and then ext4 and the like write
    their journal but once: what the folders need is in it already.
    """
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    written = temporary
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            if not is_known:
                os.replace(temporary, path)
                written = path
            if sync:
                os.fsync(file.fileno())
        if is_known:
            os.replace(temporary, path)
            written = path
        for folder in sync:
            _sync_folder(folder)  # a name survives a power loss only after this
    except BaseException:
        with suppress(OSError):
            written.unlink()
        raise


def _start_writing(file: BinaryIO, offset: int, num_bytes: int) -> None:
    """Let the disk begin with these bytes; without it it has nothing to do until the file is synced."""
    file.flush()
    with suppress(OSError):  # it is advice
        os.posix_fadvise(file.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _read_chunk(file: FileIO, name: str) -> Payload:
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = _read_exactly(file, min(blob_content.PREFIX_BYTES, file_bytes))
    header = _read_exactly(file, blob_content.header_bytes(bytes(prefix.numpy()), file_bytes))
    span = blob_content.find_tensor(bytes(header.numpy()), name, file_bytes)
    file.seek(span.start)
    return span.payload(_read_exactly(file, span.end - span.start))


def _read_exactly(file: FileIO, num_bytes: int) -> Tensor:
    """The next bytes of an unbuffered file, read straight into the memory of a uint8 tensor."""
    data = torch.empty(num_bytes, dtype=torch.uint8)
    view = data.numpy().data
    done = 0
    while done < num_bytes:
        count = file.readinto(view[done:])
        if not count:
            raise CorruptChunkError("the file ended early")
        done += count
    return data


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _told(err: OSError) -> str:
    advice = _ADVICE.get(err.errno or 0)
    return f"{err}; {advice}" if advice else str(err)
