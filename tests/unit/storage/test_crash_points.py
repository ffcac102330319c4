"""A process that dies, or a step that fails, at every single step of every operation of a store.

What SQLite itself does between two of its statements is its own affair; ``test_crashes.py`` kills at random.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kv_agent.errors import StorageError
from kv_agent.storage.store import LocalStore
from tests.unit.storage.forking import Forks, Say
from tests.unit.storage.scenarios import SCENARIOS, begun, put, require_done, require_held, require_sound
from tests.unit.storage.steps import Act, Step, stepping

pytestmark = pytest.mark.slow

DIED = 77


def die_at(say: Say, root: str, name: str, number: int) -> None:
    """Act, and die before the step of that number."""
    with stepping() as steps:
        store = LocalStore(Path(root), host_bytes=0)
        steps.act = dying(number)
        SCENARIOS[name].act(store)


def die_while_opening(say: Say, root: str, number: int) -> None:
    with stepping() as steps:
        steps.act = dying(number)
        LocalStore(Path(root), host_bytes=0)


def dying(number: int) -> Act:
    left = number

    def act(step: Step) -> None:
        nonlocal left
        left -= not step.is_read
        if left < 0:
            os._exit(DIED)

    return act


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_process_that_dies_at_any_step_leaves_no_row_without_bytes(
    tmp_path: Path, forks: Forks, record_property: Callable[[str, object], None], name: str
) -> None:
    template = begun(tmp_path / "template", SCENARIOS[name])
    number, exit_code = 0, DIED
    while exit_code == DIED:
        root = shutil.copytree(template, tmp_path / str(number))
        ((exit_code, _),) = forks.run(die_at, [(str(root), name, number)])
        store = LocalStore(root, host_bytes=0, fsync="never")
        require_sound(store, SCENARIOS[name])
        require_done(store, SCENARIOS[name])
        store.close()
        number += 1

    assert exit_code == 0
    record_property(f"crash points of {name}", number - 1)


def test_a_process_that_dies_while_it_makes_a_store_leaves_one_that_can_be_opened(
    tmp_path: Path, forks: Forks
) -> None:
    number, exit_code = 0, DIED
    while exit_code == DIED:
        root = tmp_path / str(number)
        ((exit_code, _),) = forks.run(die_while_opening, [(str(root), number)])
        store = LocalStore(root, host_bytes=0, fsync="never")
        put(store, "1")
        require_held(store, frozenset("1"))
        assert store.check() == []
        store.close()
        number += 3  # most are statements of one migration, which is one transaction

    assert exit_code == 0


class Interrupt(BaseException):
    """As a signal raises it."""


def failure(step: Step) -> Exception:
    if step.is_system_call:
        code = errno.EMFILE if step.name == "open" else errno.ENOSPC
        return OSError(code, os.strerror(code))
    return sqlite3.OperationalError("database or disk is full")


class Failing:
    """Every step works but the one of that number."""

    def __init__(self, number: int, *, is_interrupt: bool) -> None:
        self.left = number
        self._is_interrupt = is_interrupt

    def __call__(self, step: Step) -> None:
        self.left -= 1
        if self.left == -1:
            raise Interrupt if self._is_interrupt else failure(step)


@pytest.mark.parametrize("is_interrupt", [False, True])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_step_that_fails_harms_nothing_and_the_same_process_goes_on(
    tmp_path: Path, name: str, is_interrupt: bool
) -> None:
    scenario = SCENARIOS[name]
    template = begun(tmp_path / "template", scenario)
    number, failing = 0, None
    with stepping() as steps:
        while failing is None or failing.left < 0:
            root = shutil.copytree(template, tmp_path / str(number))
            store = LocalStore(root, host_bytes=0)
            steps.act = failing = Failing(number, is_interrupt=is_interrupt)
            with suppress(Interrupt if is_interrupt else StorageError):
                scenario.act(store)
            steps.act = None
            require_sound(store, scenario)
            require_done(store, scenario)
            store.close()
            number += 1

    assert number > 20
