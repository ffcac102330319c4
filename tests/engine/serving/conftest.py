"""One API server with memory for all tests of a session: starting it takes half a minute. And a browser."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from kv_agent.serving.access import add_key
from tests.engine.serving.server_process import MemoryServerProcess, serving

if TYPE_CHECKING:  # only the tests of the page need it
    from playwright.sync_api import Browser

    from tests.engine.serving.browser import Visit


@pytest.fixture(scope="session")
def memory_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryServerProcess]:
    """With keys of two namespaces and an admin's; tests share it and use users of their own."""
    folder = tmp_path_factory.mktemp("memory-server")
    keys_file = folder / "keys.json"
    keys = {
        "acme": add_key(keys_file, "acme"),
        "other": add_key(keys_file, "other"),
        "admin": add_key(keys_file, "operations", is_admin=True),
    }
    with serving(folder, keys=keys, keys_file=keys_file) as server:
        yield server


@pytest.fixture
def client(memory_server: MemoryServerProcess) -> Iterator[httpx.Client]:
    """With the key of ``acme``; what the server logs meanwhile is shown if the test fails."""
    seen = len(memory_server.log.read_bytes())
    with memory_server.client() as client:
        yield client
    sys.stdout.write(memory_server.log.read_bytes()[seen:].decode(errors="replace"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.engine.serving.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser, memory_server: MemoryServerProcess) -> Iterator[Visit]:
    """On a computer, with the key of ``acme``."""
    from tests.engine.serving.browser import visiting

    with visiting(browser, memory_server.base_url) as visit:
        visit.use(memory_server.keys["acme"])
        yield visit


@pytest.fixture
def user() -> str:
    """Somebody whom no other test knows."""
    return f"user-{uuid.uuid4().hex[:8]}"
