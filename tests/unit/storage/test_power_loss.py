"""What a power loss may take: of blobs whatever was not synced, of the catalog nothing that was committed.

The disk of these tests keeps files and names as lazily as the operating system may. That SQLite syncs its
commits is its own promise; ``test_catalog_trouble.py`` looks that it was asked to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_agent.config import Fsync
from kv_agent.errors import CorruptChunkError
from kv_agent.storage.blobs import MissingBlobError
from kv_agent.storage.store import LocalStore
from tests.unit.storage.forking import Forks, Say
from tests.unit.storage.scenarios import SCENARIOS, begun, content_of, require_done, require_sound
from tests.unit.storage.steps import Step, stepping
from tests.unit.storage.stores import holds

pytestmark = pytest.mark.slow

DIED = 77


class LazyDisk:
    """Which new names and contents would survive a power loss, by what was synced since the beginning."""

    def __init__(self) -> None:
        self._contents: dict[str, bool] = {}  # path -> whether the content was synced
        self._durable: set[str] = set()
        self._last: Step | None = None

    def reached(self, step: Step) -> None:
        """The step before this one has been taken."""
        if self._last is not None:
            self._taken(self._last)
        if step.name == "fsync":  # what the descriptor means is known now
            step = Step("fsync", (os.readlink(f"/proc/self/fd/{step.args[0]}"),))
        self._last = step

    def _taken(self, step: Step) -> None:
        match step.name, [os.fspath(arg) if isinstance(arg, Path) else arg for arg in step.args]:
            case "open", [path, flags, *_] if flags & os.O_CREAT:
                self._contents[path] = False
            case "mkdir", [path, *_]:
                self._contents.setdefault(path, True)
            case "replace", [old, new]:
                self._contents[new] = self._contents.pop(old)
            case "unlink", [path, *_]:
                self._contents.pop(path, None)
            case "fsync", [path] if os.path.isdir(path):
                self._durable |= {name for name in self._contents if os.path.dirname(name) == path}
            case "fsync", [path]:
                self._contents[path] = True

    def losses(self) -> dict[str, list[str]]:
        """Names that may be gone, and files that may be empty where their names are not."""
        return {
            "names": sorted(self._contents.keys() - self._durable),
            "contents": sorted(path for path, is_synced in self._contents.items() if not is_synced),
        }


def lose_power_at(say: Say, root: str, name: str, number: int, fsync: Fsync) -> None:
    """Act, and die before the step of that number, or after the last; tell what the disk may lose."""
    disk, left = LazyDisk(), number

    def act(step: Step) -> None:
        nonlocal left
        disk.reached(step)
        left -= not step.is_read
        if left < 0:
            Path(root, "losses").write_text(json.dumps(disk.losses()))
            os._exit(DIED)

    with stepping() as steps:
        store = LocalStore(Path(root), host_bytes=0, fsync=fsync)
        steps.act = act
        SCENARIOS[name].act(store)
        disk.reached(Step("the end"))
    Path(root, "losses").write_text(json.dumps(disk.losses()))


def lose(what: str, paths: list[Path]) -> None:
    """The names that were not durable, or the contents where the names by chance were."""
    for path in paths:
        if what == "contents":
            os.truncate(path, 0)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


def outages(tmp_path: Path, forks: Forks, name: str, fsync: Fsync) -> Iterator[LocalStore]:
    """The store after a power loss at every step of the scenario, and after the last one."""
    template = begun(tmp_path / "template", SCENARIOS[name])
    number, exit_code = 0, DIED
    while exit_code == DIED:
        dead = shutil.copytree(template, tmp_path / f"{number} dead")
        ((exit_code, _),) = forks.run(lose_power_at, [(str(dead), name, number, fsync)])
        losses = json.loads((dead / "losses").read_text())
        for what, paths in losses.items():
            root = shutil.copytree(dead, tmp_path / f"{number} without {what}")
            lose(what, [root / Path(path).relative_to(dead) for path in paths])
            store = LocalStore(root, host_bytes=0, fsync="never")
            yield store
            store.close()
        number += 1
    assert exit_code == 0


@pytest.mark.parametrize("name", ["the first turn", "another turn"])
def test_with_fsync_a_power_loss_takes_no_byte_that_a_row_names(
    tmp_path: Path, forks: Forks, name: str
) -> None:
    for store in outages(tmp_path, forks, name, "always"):
        require_sound(store, SCENARIOS[name])
        require_done(store, SCENARIOS[name])


def test_without_fsync_a_power_loss_may_take_a_turn_but_never_gives_wrong_bytes(
    tmp_path: Path, forks: Forks
) -> None:
    num_lost = 0
    for store in outages(tmp_path, forks, "another turn", "never"):
        assert holds(store, content_of("0"))
        for record in store.catalog.chunks(chunk.key for chunk in content_of("1")).values():
            try:
                store.load(record)
            except (MissingBlobError, CorruptChunkError):
                num_lost += 1
        store.repair(store.inspect(0))  # as reading them does
        require_done(store, SCENARIOS["another turn"])

    assert num_lost  # or nothing was lost, and the test above shows nothing
