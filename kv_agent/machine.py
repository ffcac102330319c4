"""What of the machine this process may use: memory, how much of it chunks get by default, and CPUs."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MAX_HOST_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudgets:
    """Bytes of chunks kept in host memory: as they are, and compressed."""

    host_bytes: int
    warm_bytes: int


def memory_budgets(available_bytes: int, host_bytes: int | None, warm_bytes: int | None) -> MemoryBudgets:
    """Numbers that are given, 0 too, and sensible ones in place of ``None``.

    By default the host tier gets a quarter of what is available, at most 4 GiB, and the warm tier half of
    what the host tier has.
    """
    host = min(max(0, available_bytes) // 4, MAX_HOST_BYTES) if host_bytes is None else host_bytes
    return MemoryBudgets(host_bytes=host, warm_bytes=host // 2 if warm_bytes is None else warm_bytes)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken without swapping, within the limits of all cgroups this process is in.

    ``root`` is where ``proc`` and ``sys`` are. What cannot be read does not limit.
    """
    limits = [_free_in_cgroup(folder) for folder in _cgroups(root)]
    return max(0, min([_available_on_machine(root), *(limit for limit in limits if limit is not None)]))


@cache
def own_cpus() -> frozenset[int]:
    """The CPUs this process had when this was first asked; none where that cannot be told."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def use_own_cpus() -> None:
    """Let the calling thread run on all of :func:`own_cpus`.

    vLLM binds the thread that steps its CPU engine to one core, and every thread that is started there would
    be bound to the same, in its way, while others are idle.
    """
    if cpus := own_cpus():
        with suppress(OSError):  # they were taken away meanwhile
            os.sched_setaffinity(0, cpus)


def give_back_freed_memory() -> None:
    """Let the system have what was freed and the C library keeps, where it can be told to (glibc).

    It keeps what lies between things in use, for each thread by itself: of chunks that one thread made and
    others pushed out later, as much as all tiers hold.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def leave_out_of_collections() -> None:
    """Let no later garbage collection look through what exists now.

    There are more objects after a start than a server makes in hours, and to look through them all stops
    every thread (470 ms on a core of an AMD EPYC). vLLM does the same in its processes, but for CPU workers.
    """
    gc.collect()
    gc.freeze()


def _available_on_machine(root: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroups(root: Path) -> list[Path]:
    """Folders of the process's memory cgroup and of all above it; version 2, then version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = top / path.lstrip("/")
        # In a container the path may be the host's; then only the top is there.
        folders += [own, *(folder for folder in own.parents if folder == top or top in folder.parents)]
    return folders


def _free_in_cgroup(folder: Path) -> int | None:
    """What is left of a cgroup's limit; file pages that nothing uses right now count as free."""
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number
            free = int((folder / limit).read_text()) - int((folder / used).read_text())
            return free + _stat(folder, idle)
    return None


def _stat(folder: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
