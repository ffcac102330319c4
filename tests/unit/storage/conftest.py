"""An empty catalog and an empty store in the directory of a test, and a clock that stands still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_agent.storage.catalog import Catalog
from kv_agent.storage.store import LocalStore
from tests.unit.storage.clock import Clock


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    yield catalog
    catalog.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    """Without a host cache, so that every load reads the disk."""
    store = LocalStore(tmp_path / "store", host_bytes=0)
    yield store
    store.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()
