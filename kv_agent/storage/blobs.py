"""Blob files on local disk: written atomically and durably, read one tensor at a time.

Reading does not use ``safetensors.safe_open``: it reports every failure to open as a missing file, so
running out of file descriptors would look like lost data, and it maps the file, so a disk error would
kill the process with SIGBUS instead of raising.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.storage import codec

_FOLDER = "blobs"
_NAME = re.compile(r"[0-9A-Za-z_-]{2,200}")
_RELPATH = re.compile(_FOLDER + r"/[0-9A-Za-z_-]{2}/[0-9A-Za-z_-]{2,200}\.(safetensors|[0-9a-f]+\.tmp)")


class MissingBlobError(StorageError):
    """The store is there but the blob file is not: its chunks are lost. Quarantine them."""


class BlobFiles:
    """Files ``blobs/<first two characters of name>/<name>.safetensors`` under ``root``. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable_folders: set[Path] = set()

    def write(self, name: str, data: bytes) -> str:
        """Store ``data`` durably and return its path relative to the root.

        An existing file of that name is replaced in one step; readers see the old or the new one.
        """
        if not _NAME.fullmatch(name):
            raise StorageError(f"blob name {name!r} must be 2 to 200 letters, digits, '_' or '-'")
        relpath = f"{_FOLDER}/{name[:2]}/{name}.safetensors"
        path = self._root / relpath
        temporary = path.with_name(f"{name}.{secrets.token_hex(8)}.tmp")
        try:
            self._make_folder(path.parent)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            # The rename itself survives a power loss only after this.
            _sync_folder(path.parent)
        except OSError as err:
            raise StorageError(f"cannot store {relpath} ({len(data)} bytes) in {self._root}: {err}") from err
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

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by relative path, including ``.tmp`` files that a crash left behind."""
        found: dict[str, int] = {}
        try:
            for path in (self._root / _FOLDER).glob("*/*"):
                with suppress(FileNotFoundError):  # deleted or renamed meanwhile
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        except OSError as err:
            raise StorageError(f"cannot list the blobs in {self._root}: {err}") from err
        return found

    def _resolve(self, relpath: str) -> Path:
        if not _RELPATH.fullmatch(relpath):
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
