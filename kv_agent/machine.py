"""What of the machine this process may use: memory, how much of it chunks get by default, CPUs, threads."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MAX_HOST_BYTES = 4 << 30

# The CPUs of the nearest process above that OpenMP has bound to nothing, for those that it has.
_CPUS = "KV_AGENT_CPUS"
# With one of these set, OpenMP binds the main thread to a core as soon as its library is loaded.
_BINDS = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_OPENMP = re.compile(r"/\S*/lib[gi]?omp[0-9]*[-.]\S+$", re.MULTILINE)


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
    """The CPUs this process may use; none where that cannot be told.

    To be asked before anything binds threads, and in the process that starts others before it does: vLLM's
    workers are bound to a core each, by variables of OpenMP, before a line of ours runs in them.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    if any(name in os.environ for name in _BINDS):
        with suppress(KeyError, ValueError):
            return frozenset(map(int, os.environ[_CPUS].split(",")))
    cpus = frozenset(os.sched_getaffinity(0))
    os.environ[_CPUS] = ",".join(map(str, sorted(cpus)))
    return cpus


def work_aside() -> None:
    """Make the calling thread one that leaves the engine's alone: on any of :func:`own_cpus`, with no team.

    It would be bound to the core of the thread that steps vLLM's CPU engine, which is the one that starts
    it. And the first time it used OpenMP, as torch does, it would get threads to help it: from then on there
    are more than cores, so that libgomp lets threads sleep that wait for work, and to wake them a hundred
    times a step costs the model more than the help is worth (9 of 102 ms on two cores of an AMD EPYC).
    """
    if cpus := own_cpus():
        with suppress(OSError):  # they were taken away meanwhile
            os.sched_setaffinity(0, cpus)
    import torch  # not needed by who only asks for memory

    torch.get_num_threads()  # sets the thread's number the first time, so that comes first
    for library in _openmp_libraries():
        with suppress(OSError, AttributeError):  # it only has such a name
            ctypes.CDLL(library).omp_set_num_threads(1)  # counts for this thread alone


@cache
def _openmp_libraries() -> frozenset[str]:
    """Those that are loaded; torch has its own, and so may others."""
    with suppress(OSError):
        return frozenset(_OPENMP.findall(Path("/proc/self/maps").read_text(errors="replace")))
    return frozenset()


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
