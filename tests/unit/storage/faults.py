"""Real trouble with the disk, begun and ended: what the kernel refuses to this process.

Some need rights that not every machine gives; those say so before anything is tried.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_CAPABILITY_VERSION_3 = 0x20080522


def give_up_privileges() -> None:
    """From now on permissions hold for this process, even if it is root's."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _LIBC.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up capabilities")


def can_mount() -> bool:
    probe = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x00020000))"  # CLONE_NEWNS
    return subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def enter_own_mounts() -> None:
    """What is mounted from now on is there for this process alone, and gone with it."""
    if _LIBC.unshare(0x00020000) != 0:
        raise OSError(ctypes.get_errno(), "cannot unshare mounts")
    _mount("--make-rprivate", "/")


def mount_tmpfs(folder: Path, num_bytes: int) -> None:
    _mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder))


def _mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True)


@contextmanager
def filled(folder: Path, free_bytes: int) -> Iterator[None]:
    """Another file takes all of the disk but ``free_bytes``."""
    filler = folder / "filler"
    state = os.statvfs(folder)
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - free_bytes))
    yield
    filler.unlink()


@contextmanager
def unwritable(root: Path) -> Iterator[None]:
    """Nothing may be made, written or deleted in the folders and files of the store."""
    paths = [root, *root.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & 0o555)
    yield
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode)


@contextmanager
def renamed(root: Path) -> Iterator[None]:
    """The folder is gone."""
    away = root.with_name(f"{root.name} elsewhere")
    root.rename(away)
    yield
    away.rename(root)


@contextmanager
def unmounted(root: Path, *, how_to_return: Callable[[], None]) -> Iterator[None]:
    """An empty folder stands where the disk was mounted; nothing may be left in it."""
    subprocess.run(["umount", "--lazy", str(root)], check=True)
    yield
    assert list(root.iterdir()) == []
    how_to_return()


def bind(source: Path, root: Path) -> None:
    """``root`` is a mount of the disk that really is at ``source``."""
    _mount("--bind", str(source), str(root))


@contextmanager
def mounted_read_only(root: Path) -> Iterator[None]:
    """Nothing more can be opened for writing; a mount with files open for writing would refuse to change."""
    bind(root, root)
    _mount("-o", "remount,ro,bind", str(root))
    yield
    subprocess.run(["umount", "--lazy", str(root)], check=True)


@contextmanager
def replaced_by_an_empty_folder(root: Path) -> Iterator[None]:
    """As after unmounting, where mounting is not allowed."""
    with renamed(root):
        root.mkdir()
        yield
        root.rmdir()  # fails if something was left in it


@contextmanager
def limited(which: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (limit, hard))
    yield
    resource.setrlimit(which, (soft, hard))


@contextmanager
def out_of_descriptors() -> Iterator[None]:
    """Not one more file can be opened."""
    lowest_free = os.dup(0)
    os.close(lowest_free)
    with limited(resource.RLIMIT_NOFILE, lowest_free):
        yield
