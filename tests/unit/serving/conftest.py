"""The memory routes as an application over a real store, with an engine that has no model."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from kv_agent.config import PluginConfig
from kv_agent.engines.base import Call, Completion
from kv_agent.serving import routes
from kv_agent.serving.access import add_key
from kv_agent.serving.server import MemoryServer
from kv_agent.storage.store import LocalStore
from tests.unit.stand_in import StandIn


class ServedStandIn(StandIn):
    """For many threads at once."""

    is_alive = True

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store, now=time.time())
        self._lock = threading.Lock()

    def run(self, calls: Sequence[Call]) -> list[Completion]:
        with self._lock:
            return super().run(calls)


@dataclass(kw_only=True)
class Served:
    """An application, what is behind it, and keys by namespace; ``admin`` is one, too."""

    store: LocalStore
    client: TestClient
    app: FastAPI
    keys_file: Path
    keys: dict[str, str] = field(default_factory=dict)

    def headers(self, name: str = "acme") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    """Another process's view of the store, as it were."""
    store = LocalStore(tmp_path / "store", host_bytes=0)
    yield store
    store.close()


@pytest.fixture
def served(tmp_path: Path, store: LocalStore) -> Iterator[Served]:
    keys_file = tmp_path / "keys.json"
    keys = {name: add_key(keys_file, name, is_admin=name == "admin") for name in ("acme", "other", "admin")}
    app = application(tmp_path, keys_file)
    with TestClient(app) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield Served(store=store, client=client, app=app, keys_file=keys_file, keys=keys)


def application(
    folder: Path,
    keys_file: Path | None = None,
    server_keys: Sequence[str] = (),
    sweep_every_s: float = 3600.0,
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings = PluginConfig(store=folder / "store")
        app.state.kv_agent = await MemoryServer.open(
            _engine(settings.store),
            settings,
            keys=keys_file,
            server_keys=server_keys,
            sweep_every_s=sweep_every_s,
        )
        yield
        await app.state.kv_agent.close()

    app = FastAPI(lifespan=lifespan)
    app.include_router(routes.router)
    return app


def _engine(folder: Path) -> Callable[[], ServedStandIn]:
    return lambda: ServedStandIn(LocalStore(folder, host_bytes=0))
