"""Members of an archive file: an uncompressed tar whose last member holds a checksum of all before it.

The caller opens the file. Reading never trusts a length: a member is read only if the file has its bytes.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import SEEK_END
from typing import BinaryIO

from kv_agent.errors import StorageError

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of the archive; ``sha256_before`` is that of all bytes before its header."""

    name: str
    data: bytes
    sha256_before: str


class ContainerWriter:
    """Appends members to a file that is empty so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o600
        for part in (info.tobuf(tarfile.USTAR_FORMAT, "ascii"), data, bytes(-len(data) % _BLOCK)):
            self._file.write(part)
            self._digest.update(part)

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Write what tells tar that this is the end; the file itself stays open."""
        self._file.write(bytes(2 * _BLOCK))


def damaged(why: str) -> StorageError:
    return StorageError(f"this archive is damaged or cut off: {why}; use another copy or export again")


def read_members(file: BinaryIO) -> Iterator[Member]:
    """All members from the start of the file; a damaged header or a missing byte is a StorageError."""
    left = file.seek(0, SEEK_END)
    file.seek(0)
    digest = hashlib.sha256()
    while left:
        sha256_before = digest.hexdigest()
        header = _read(file, _BLOCK, left)
        if header == bytes(_BLOCK):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as err:
            raise damaged(f"a header in it is unreadable ({err})") from err
        if not info.isreg() or info.size < 0:
            raise damaged(f"{info.name!r} in it is not a regular file")
        padded = -(-info.size // _BLOCK) * _BLOCK
        data = _read(file, padded, left - _BLOCK)
        digest.update(header)
        digest.update(data)
        left -= _BLOCK + padded
        yield Member(name=info.name, data=data[: info.size], sha256_before=sha256_before)


def _read(file: BinaryIO, num_bytes: int, left: int) -> bytes:
    data = file.read(num_bytes) if num_bytes <= left else b""
    if len(data) < num_bytes:
        raise damaged("the file ends early")
    return data
