"""Files out of the system's page cache and proof that they were, and the plainest way to read them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

_BLOCK_BYTES = 1 << 20


def drop(paths: Iterable[Path]) -> None:
    """Write files to the disk and take them out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not on the disk yet stays in the cache
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bytes_from_disk() -> int:
    """Bytes that the disk has read for this process so far; readahead counts, the page cache does not."""
    with open("/proc/self/io", encoding="ascii") as lines:
        (found,) = (int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    return found


def read_through(paths: Iterable[Path], *, hashes: bool = False) -> None:
    """Read files from end to end, one after the other, into memory that is used again."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(block):
                if hashes:
                    blake3(block[:count]).digest()
