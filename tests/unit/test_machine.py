"""How much memory there is, on made-up machines, and what chunks get of it."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kv_agent.machine import MemoryBudgets, available_bytes, give_back_freed_memory, memory_budgets

GIB = 1 << 30


@pytest.mark.parametrize(
    ("available", "host", "warm", "expected"),
    [
        (8 * GIB, None, None, (2 * GIB, GIB)),
        (1000 * GIB, None, None, (4 * GIB, 2 * GIB)),
        (16 * GIB, None, None, (4 * GIB, 2 * GIB)),
        (16 * GIB - 4, None, None, (4 * GIB - 1, 2 * GIB - 1)),
        (0, None, None, (0, 0)),
        (-5, None, None, (0, 0)),
        (8 * GIB, 0, None, (0, 0)),
        (8 * GIB, None, 0, (2 * GIB, 0)),
        (8 * GIB, 0, 77, (0, 77)),
        (8 * GIB, 100 * GIB, None, (100 * GIB, 50 * GIB)),
        (0, 10, 20, (10, 20)),
    ],
)
def test_budgets(available: int, host: int | None, warm: int | None, expected: tuple[int, int]) -> None:
    host_bytes, warm_bytes = expected
    assert memory_budgets(available, host, warm) == MemoryBudgets(
        host_bytes=host_bytes, warm_bytes=warm_bytes
    )


def machine(root: Path, files: dict[str, str]) -> Path:
    everywhere = {"proc/meminfo": "MemTotal: 64000 kB\nMemFree: 10 kB\nMemAvailable:   50000 kB\n"}
    for name, text in (everywhere | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_cgroups_all_that_is_available_counts(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, {})) == 50_000 * 1024


@pytest.mark.parametrize("folder", ["sys/fs/cgroup/", "sys/fs/cgroup/a/", "sys/fs/cgroup/a/b/"])
def test_the_limit_of_a_cgroup_or_of_one_above_it_counts(tmp_path: Path, folder: str) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "123\n",
        f"{folder}memory.max": "9000\n",
        f"{folder}memory.current": "5000\n",
        f"{folder}memory.stat": "anon 1\nfile 900\ninactive_file 700\ntotal_inactive_file 9\n",
    }
    assert available_bytes(machine(tmp_path, files)) == 9000 - 5000 + 700


def test_the_smallest_of_several_limits_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/memory.max": "9000",
        "sys/fs/cgroup/a/memory.current": "1000",
        "sys/fs/cgroup/memory.max": "7000",
        "sys/fs/cgroup/memory.current": "2500",
    }
    assert available_bytes(machine(tmp_path, files)) == 4500


def test_version_1_of_cgroups_counts_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:hugetlb,memory:/not/here\n1:name=systemd:/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "6000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 300\n",
        "sys/fs/cgroup/x/memory.max": "1",
        "sys/fs/cgroup/x/memory.current": "0",
    }
    assert available_bytes(machine(tmp_path, files)) == 4300


def test_a_cgroup_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "100",
        "sys/fs/cgroup/memory.current": "900",
    }
    assert available_bytes(machine(tmp_path, files)) == 0


def test_this_machine_has_some_memory_and_not_more_than_all(tmp_path: Path) -> None:
    page_bytes = resource.getpagesize()
    all_pages = int(Path("/proc/meminfo").read_text().split()[1]) * 1024 // page_bytes

    assert page_bytes <= available_bytes() <= all_pages * page_bytes
    assert page_bytes <= available_bytes(tmp_path)  # nothing to read there


def test_what_was_freed_between_things_in_use_goes_back_to_the_system() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library has no malloc_trim")
    freed = []
    kept = []
    for _ in range(600):
        freed.append(bytearray(os.urandom(1) * 100_000))  # less than what is mapped by itself
        kept.append(bytearray(b"x" * 600))  # more than Python keeps in pools of its own
    held = resident_bytes()
    freed.clear()
    give_back_freed_memory()
    assert resident_bytes() < held - 40_000_000
    assert all(one == b"x" * 600 for one in kept)


def test_a_c_library_that_cannot_give_memory_back_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_agent.machine.ctypes.CDLL", lambda _: object())
    give_back_freed_memory()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_collections_look_only_through_what_was_made_later() -> None:
    program = """
import gc, weakref
from kv_agent.machine import leave_out_of_collections

class Thing: pass
def cycle():
    thing = Thing(); thing.itself = thing
    return thing
garbage, kept = weakref.ref(cycle()), cycle()
leave_out_of_collections()
later = cycle()
looked_through = set(map(id, gc.get_objects()))
assert garbage() is None
assert id(kept) not in looked_through and id(later) in looked_through
assert len(looked_through) < gc.get_freeze_count() / 10
later = weakref.ref(later)
gc.collect()
assert later() is None
"""
    subprocess.run([sys.executable, "-c", program], check=True)  # this process needs its collections


def ran(program: str, **variables: str) -> str:
    """What another process prints, started without and then with these variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KV_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    return done.stdout


TWO_CPUS = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"
)


@TWO_CPUS
def test_a_thread_of_a_process_that_openmp_has_bound_runs_on_the_cpus_of_its_parent() -> None:
    """As vLLM's executor and its worker, whose variables come between them."""
    child = """
import torch, os, threading
from kv_agent.machine import work_aside
print(len(os.sched_getaffinity(0)))
def run():
    work_aside()
    print(len(os.sched_getaffinity(0)))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    parent = f"""
import os, subprocess, sys
from kv_agent.machine import own_cpus
own_cpus()
bound = {{**os.environ, "GOMP_CPU_AFFINITY": "0 1", "OMP_NUM_THREADS": "2"}}
subprocess.run([sys.executable, "-c", {child!r}], env=bound, check=True)
"""
    assert ran(parent).split() == ["1", str(len(os.sched_getaffinity(0)))]


@TWO_CPUS
def test_a_process_that_is_bound_by_its_user_has_those_cpus() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {0}); from kv_agent.machine import own_cpus; print(*own_cpus())"
    )

    assert ran(program, KV_AGENT_CPUS="0,1") == "0\n"
    assert ran(program, OMP_PROC_BIND="true") == "0\n"
    assert ran(program, OMP_PROC_BIND="true", KV_AGENT_CPUS="anything") == "0\n"


@TWO_CPUS
def test_a_thread_that_works_aside_gets_no_helpers_and_takes_none_from_others() -> None:
    program = """
import os, threading
import torch
from kv_agent.machine import work_aside

def work():
    x = torch.randn(1500, 1500)
    x.add_(1).bfloat16().float().sum()

def aside():
    work_aside()
    work()
    print(len(os.listdir("/proc/self/task")) - before)

torch.set_num_threads(2)
work()
before = len(os.listdir("/proc/self/task")) + 1
thread = threading.Thread(target=aside)
thread.start()
thread.join()
print(torch.get_num_threads())
other = threading.Thread(target=lambda: print(torch.get_num_threads()))
other.start()
other.join()
"""
    assert ran(program).split() == ["0", "2", "2"]
