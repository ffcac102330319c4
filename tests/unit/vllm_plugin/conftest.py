"""A scheduler's half at its desk and a worker's half on its bench, closed after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.vllm_plugin.bench import Bench
from tests.unit.vllm_plugin.builders import FakeCatalog
from tests.unit.vllm_plugin.scheduling import Desk
from tests.unit.vllm_plugin.told import Told


@pytest.fixture
def catalog() -> FakeCatalog:
    return FakeCatalog()


@pytest.fixture
def desk(catalog: FakeCatalog) -> Iterator[Desk]:
    desk = Desk(catalog)
    yield desk
    desk.close()


@pytest.fixture(params=[{}, {"direct": True}, {"has_streams": True}], ids=["staged", "direct", "streamed"])
def benches(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Bench]]:
    """Every test for all ways into the cache."""
    opened: list[Bench] = []

    def make(**options: object) -> Bench:
        opened.append(Bench(tmp_path / "store", **{**request.param, **options}))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(torch, "get_device_module", lambda device: told)
    return told


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches()
