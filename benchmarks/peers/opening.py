"""All peers that run here, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import example, lmcache, mooncake
from benchmarks.peers.asking import Engine
from benchmarks.peers.environments import PeerUnavailable
from kv_agent.machine import available_bytes

# Opens an engine of a model; the folder is its own. Raises PeerUnavailable.
Opener = Callable[[Path, Path], AbstractContextManager[Engine]]
Openers = Mapping[str, Opener]

NONE: Openers = {}
# Measured: an engine with its server takes up to 4.5 GiB; the rest is for what others do meanwhile.
NEEDS_BYTES = 6 << 30
# What comes with vLLM.
BUNDLED: Openers = {"ExampleConnector": example.opened}
# These have packages of their own, which the first run installs.
ALL: Openers = {**BUNDLED, "LMCache": lmcache.opened, "Mooncake": mooncake.opened}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Engines by name, and by the other names why they are not there."""

    engines: Mapping[str, Engine]
    skipped: Mapping[str, str]


def open_peers(
    openers: Openers,
    model: Path,
    folder: Path,
    stack: ExitStack,
    free_bytes: Callable[[], int] = available_bytes,
) -> Peers:
    """Start one after the other; ``stack`` ends them and their servers.

    One that would leave the machine short of memory is skipped: the kernel would kill something instead,
    which need not be ours.
    """
    engines: dict[str, Engine] = {}
    skipped: dict[str, str] = {}
    for name, opener in openers.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        try:
            _check_memory(free_bytes())
            engines[name] = stack.enter_context(opener(model, own))
        except PeerUnavailable as err:
            skipped[name] = str(err)
    return Peers(engines=engines, skipped=skipped)


def _check_memory(free_bytes: int) -> None:
    if free_bytes < NEEDS_BYTES:
        free, needs = free_bytes / (1 << 30), NEEDS_BYTES / (1 << 30)
        raise PeerUnavailable(f"{free:.1f} GiB of memory are free, and {needs:.0f} have to be")
