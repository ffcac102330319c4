"""A real Chromium that looks at the page, and what may never happen while it does."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright
from starlette.types import ASGIApp

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
TIMEOUT_MS = 20_000
# Chromium says of every refused request that it was; what the page makes of it is for tests to see.
_EXPECTED = "Failed to load resource: the server responded with a status of"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed, see scripts/browser.sh")
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


@dataclass(kw_only=True)
class Visit:
    """One tab on a server's page. ``wrong`` is what should never happen."""

    page: Page
    base_url: str
    wrong: list[str] = field(default_factory=list)

    def go(self, view: str = "#/", *, until: str = ".view > *") -> None:
        """Open a view as if by its address; it is there when this returns."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.base_url}/memory/ui{view}")
        self.settle(until)

    def settle(self, until: str = ".view > *") -> None:
        """Wait until the view is drawn."""
        self.page.wait_for_selector(f"main:not([aria-busy]) {until}")
        self.page.wait_for_selector("[aria-busy]", state="detached")

    def use(self, key: str, namespace: str | None = None, *, until: str = ".view > *") -> None:
        """Open the page with a key as if it had been given before."""
        self.page.goto(f"{self.base_url}/memory/ui/page.css")  # of the same origin, and asks for nothing
        self.page.evaluate("key => sessionStorage.setItem('kv_agent.key', key)", key)
        if namespace is not None:
            self.page.evaluate("name => sessionStorage.setItem('kv_agent.namespace', name)", namespace)
        self.go(until=until)

    def text(self, selector: str = "main") -> str:
        return self.page.inner_text(selector)


@contextmanager
def visiting(browser: Browser, base_url: str, **options: Any) -> Iterator[Visit]:
    """A tab of its own; the test fails if it asked another host, broke the policy or threw an error."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    visit = Visit(page=page, base_url=base_url)
    host = urlsplit(base_url).netloc

    def asked(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "about") and parts.netloc != host:
            visit.wrong.append(f"asked {url}")

    def said(kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith(_EXPECTED):
            visit.wrong.append(f"{kind}: {text}")

    page.on("request", lambda request: asked(request.url))
    page.on("websocket", lambda socket: asked(socket.url))
    page.on("console", lambda message: said(message.type, message.text))
    page.on("pageerror", lambda error: visit.wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: visit.wrong.append(f"dialog: {dialog.message}"))
    page.add_init_script(
        "addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective))"
    )
    try:
        yield visit
    finally:
        context.close()
    assert visit.wrong == []


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """An application on a port of its own -> its address; for set-ups that need no engine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait(lambda: server.started or not thread.is_alive())
        (socket,) = server.servers[0].sockets
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def _wait(done: Callable[[], bool]) -> None:
    while not done():
        threading.Event().wait(0.01)
