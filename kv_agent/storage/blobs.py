"""Blob files on local disk: written atomically and durably, read one tensor at a time.

Reading does not use ``safetensors.safe_open``: it reports every failure to open as a missing file, so
running out of file descriptors would look like lost data, and it maps the file, so a disk error would
kill the process with SIGBUS instead of raising.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.storage import codec

_FOLDER = "blobs"
_NAME = re.compile(r"[0-9A-Za-z_-]{2,200}")
_RELPATH = re.compile(_FOLDER + r"/[0-9A-Za-z_-]{2}/[0-9A-Za-z_-]{2,200}\.(safetensors|[0-9a-f]+\.tmp)")


class MissingBlobError(StorageError):
    """The store is there but the blob file is not: its chunks are lost. Quarantine them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file in the blob folder; ``modified`` is Unix time."""

    num_bytes: int
    modified: float


class BlobFiles:
    """Files ``blobs/<first two characters of name>/<name>.safetensors`` under ``root``. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable_folders: set[Path] = set()

    @staticmethod
    def relpath(name: str) -> str:
        """Where the file of that name is, relative to the root."""
        if not _NAME.fullmatch(name):
            raise StorageError(f"blob name {name!r} must be 2 to 200 letters, digits, '_' or '-'")
        return f"{_FOLDER}/{name[:2]}/{name}.safetensors"

    def write(self, name: str, data: bytes) -> str:
        """Store ``data`` durably and return its path relative to the root.

        An existing file of that name is replaced in one step; readers see the old or the new one. Raises
        :class:`MissingBlobError` when the unfinished file was deleted under its feet.
        """
        relpath = self.relpath(name)
        path = self._root / relpath
        try:
            self._make_folder(path.parent)
            with _replaced(path) as file:
                file.write(data)
        except OSError as err:
            kind = MissingBlobError if isinstance(err, FileNotFoundError) else StorageError
            raise kind(f"cannot store {relpath} ({len(data)} bytes) in {self._root}: {err}") from err
        return relpath

    def read_tensor(self, relpath: str, tensor_name: str) -> Tensor:
        """Only that tensor's bytes, as a contiguous CPU tensor the caller owns."""
        path = self._resolve(relpath)
        try:
            with open(path, "rb", buffering=0) as file:
                return _read_tensor(file, tensor_name)
        except FileNotFoundError as err:
            if not (self._root / _FOLDER).is_dir():  # an unmounted disk must not quarantine everything
                raise StorageError(f"no folder {_FOLDER} in {self._root}; is the disk mounted?") from err
            raise MissingBlobError(f"blob {relpath} is missing in {self._root}") from err
        except OSError as err:
            raise StorageError(f"cannot read blob {relpath} in {self._root}: {err}") from err
        except CorruptChunkError as err:
            raise CorruptChunkError(f"blob {relpath}: {err}") from err

    def delete(self, relpath: str) -> None:
        """Remove a file; a missing one is fine."""
        try:
            self._resolve(relpath).unlink(missing_ok=True)
        except OSError as err:
            raise StorageError(f"cannot delete blob {relpath} in {self._root}: {err}") from err

    def has(self, relpath: str) -> bool:
        """Whether the file is there; its content is not looked at."""
        return self._resolve(relpath).is_file()

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
            raise StorageError(f"cannot list the blobs in {self._root}: {err}") from err
        return found

    @staticmethod
    def owns(relpath: str) -> bool:
        """Whether :meth:`write` could have made a file of this name."""
        return _RELPATH.fullmatch(relpath) is not None

    def _resolve(self, relpath: str) -> Path:
        if not self.owns(relpath):
            raise CorruptChunkError(f"blob path {relpath!r} does not name a file in the blob folder")
        return self._root / relpath

    def _make_folder(self, folder: Path) -> None:
        if folder in self._durable_folders and folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever made the folders may not have synced them yet, so every process does it once.
        _sync_folder(folder.parent)
        _sync_folder(self._root)
        self._durable_folders.add(folder)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is there, durably, once the block ends without an error; else what was there stays."""
    try:
        with _replaced(path, mode=0o600) as file:  # what is in it is as private as the store
            yield file
    except OSError as err:
        raise StorageError(f"cannot write {path}: {err}") from err


@contextmanager
def existing_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be read; trouble with the disk is a :class:`StorageError`."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as err:
        raise StorageError(f"cannot read {path}: {err}") from err


@contextmanager
def _replaced(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    # The rename itself survives a power loss only after this.
    _sync_folder(path.parent)


def _read_tensor(file: FileIO, name: str) -> Tensor:
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = _read_exactly(file, min(codec.PREFIX_BYTES, file_bytes))
    header = _read_exactly(file, codec.header_bytes(bytes(prefix.numpy()), file_bytes))
    span = codec.find_tensor(bytes(header.numpy()), name, file_bytes)
    file.seek(span.start)
    data = _read_exactly(file, span.end - span.start)
    return data.view(span.dtype).view(span.shape)


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
