"""The page at ``/memory/ui`` by keyboard, on a phone, in light and dark, for screen readers, elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright")

from fastapi import FastAPI
from playwright.sync_api import Browser, expect
from starlette.applications import Starlette
from starlette.routing import Mount

from kv_agent.serving import routes
from tests.engine.serving.asking import chat, remember
from tests.engine.serving.browser import DESKTOP, PHONE, Visit, chromium, listening, visiting
from tests.engine.serving.server_process import MemoryServerProcess
from tests.unit.serving.conftest import application

pytestmark = pytest.mark.engine

LONG = "x" * 200  # a name without a place to break
SCRIPTS = Path(__file__).parent
CONTRASTS = (SCRIPTS / "contrasts.js").read_text(encoding="utf-8")
FLAWS = (SCRIPTS / "flaws.js").read_text(encoding="utf-8")
ENOUGH = 4.5  # contrast of texts, WCAG AA


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def views(memory_server: MemoryServerProcess) -> dict[str, str]:
    """Every view with something in it, with names as long as they may be."""
    with memory_server.client() as client:
        fields = {"user_id": LONG, "agent_id": LONG, "session_id": LONG, "metadata": {LONG: LONG}}
        memory_id = remember(client, f"Ana lives in {LONG}. " + "She has a goat. " * 30, **fields)
        remember(client, "Bo lives in Rome.", **fields)
        client.put(f"/memory/{memory_id}/pin")
        for _ in range(3):
            chat(client, "Where does Ana live?", user_id=LONG, agent_id=LONG, session_id=LONG)
    return {
        "overview": "#/",
        "memories": f"#/memories?user={LONG}",
        "search": f"#/memories?user={LONG}&q=lives",
        "nothing": "#/memories?user=nobody",
        "memory": f"#/memory/{memory_id}",
        "query": f"#/query?q=Where+does+Ana+live%3F&user={LONG}&neighbours=1",
        "live": "#/live",
    }


def look_at(visit: Visit, name: str, view: str, client: httpx.Client) -> None:
    """Open a view and all that it folds away."""
    visit.go(view)
    if name == "live":
        expect(visit.page.locator(".state")).to_have_text("Connected")
        client.post("/memory/query", json={"query": "Ana", "user_id": LONG, "mode": "lexical"})
        expect(visit.page.locator(".events li").first).to_be_visible()
    visit.page.evaluate("document.querySelectorAll('main details').forEach(one => { one.open = true; })")
    if name == "overview":
        expect(visit.page.locator(".user table").first).to_be_visible()
    visit.settle()


def test_the_audit_finds_what_is_wrong(browser: Browser) -> None:
    page = browser.new_page()
    page.set_content(
        "<style>body { background: #fff } p { color: #777 } b { color: #757575 }</style>"
        '<body><h1>A</h1><h3 id="a">B</h3><h1 id="a">C</h1><p>grey</p><b>darker</b><svg></svg>'
        '<input aria-describedby="nowhere"><button></button><svg role="img"></svg><table></table>'
        '<i tabindex="3"></i></body>'
    )
    flaws = sorted({flaw.split(":")[0] for flaw in page.evaluate(FLAWS)})
    contrasts = {text: round(contrast, 2) for text, contrast in page.evaluate(CONTRASTS)}
    page.close()

    assert flaws == [
        "0 header", "0 html[lang=en]", "0 main", "0 nav", "0 nav [aria-current=page]", "2 h1", "an id twice",
        "an order of its own", "aria-describedby leads nowhere", "no caption", "no image and not hidden",
        "no label", "no name", "skips a level",
    ]  # fmt: skip
    assert contrasts == {"A": 21, "B": 21, "C": 21, "grey": 4.48, "darker": 4.61}


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_can_be_read(
    browser: Browser,
    memory_server: MemoryServerProcess,
    client: httpx.Client,
    views: dict[str, str],
    tmp_path: Path,
    size: dict[str, int],
    scheme: str,
) -> None:
    with visiting(browser, memory_server.base_url, viewport=size, color_scheme=scheme) as visit:
        visit.use(memory_server.keys["admin"], "acme")
        for name, view in views.items():
            look_at(visit, name, view, client)
            visit.page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
            assert visit.page.evaluate(FLAWS) == [], name
            poor = [one for one in visit.page.evaluate(CONTRASTS) if one[1] < ENOUGH]
            assert poor == [], name
            width = visit.page.evaluate("document.documentElement.scrollWidth")
            assert width <= size["width"], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_question_for_a_key_can_be_read(
    browser: Browser, memory_server: MemoryServerProcess, scheme: str
) -> None:
    with visiting(browser, memory_server.base_url, viewport=PHONE, color_scheme=scheme) as visit:
        visit.use("wrong", until="form.key .trouble")
        assert visit.page.evaluate(FLAWS) == []
        assert [one for one in visit.page.evaluate(CONTRASTS) if one[1] < ENOUGH] == []


def focused(visit: Visit) -> str:
    script = "document.activeElement.labels?.[0]?.textContent || document.activeElement.textContent.trim()"
    return str(visit.page.evaluate(script))


def test_everything_is_done_by_keyboard_alone(
    browser: Browser, memory_server: MemoryServerProcess, client: httpx.Client
) -> None:
    memory_id = remember(client, "Ana lives in Oslo.", user_id="typist")
    with visiting(browser, memory_server.base_url) as visit:
        page = visit.page
        visit.use(memory_server.keys["acme"])

        def press(*keys: str) -> None:
            for key in keys:
                page.keyboard.press(key)

        seen = []
        for _ in range(6):
            press("Tab")
            seen.append(focused(visit))
            outline = page.evaluate("getComputedStyle(document.activeElement).outline")
            assert "solid 3px" in outline, seen
        assert seen == ["Skip to content", "Overview", "Memories", "Query", "Live", "Forget key"]
        press(*["Shift+Tab"] * 5, "Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        assert page.url.endswith("#/") or page.url.endswith("/ui")

        press("Shift+Tab", "Shift+Tab", "Shift+Tab")
        assert focused(visit) == "Query"
        press("Enter")
        visit.settle()
        assert focused(visit) == "Query"  # the heading
        press("Tab")
        assert focused(visit) == "What would you ask?"
        page.keyboard.type("Where does Ana live?")
        press("Tab", "Control+a")
        page.keyboard.type("typist")
        press("Enter")
        expect(page.locator(".hit")).to_have_count(1)
        while focused(visit) != "Open":
            press("Tab")
        press("Enter")
        visit.settle()
        while focused(visit) != "Forget":
            press("Tab")
        press("Enter")
        assert focused(visit) == "Keep it"  # the harmless one
        press("Tab", "Tab", "Tab")  # nowhere behind the question
        assert page.evaluate("!document.activeElement.closest('main')")
        press("Escape")
        assert focused(visit) == "Forget"
        assert client.get(f"/memory/{memory_id}").status_code == 200
        press("Enter", "Tab", "Enter")
        expect(page.locator("h1")).to_have_text("Memories")
        assert client.get(f"/memory/{memory_id}").status_code == 404


def test_nothing_moves_for_those_who_do_not_want_it(
    browser: Browser, memory_server: MemoryServerProcess
) -> None:
    durations = "[...document.querySelectorAll('*')].map(n => getComputedStyle(n).transitionDuration)"
    with visiting(browser, memory_server.base_url, reduced_motion="reduce") as visit:
        visit.use(memory_server.keys["acme"])
        assert set(visit.page.evaluate(durations)) == {"0s"}


def test_behind_a_prefix_and_without_keys_the_page_is_the_same(browser: Browser, tmp_path: Path) -> None:
    inner = application(tmp_path)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with inner.router.lifespan_context(inner):
            yield

    outer = Starlette(routes=[Mount("/some/prefix", app=inner)], lifespan=lifespan)
    with listening(outer) as address, visiting(browser, f"{address}/some/prefix") as visit:
        page = visit.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url.replace("ws:", "http:")))
        page.goto(f"{visit.base_url}/memory/ui/")  # one slash too many
        visit.settle()
        assert page.url == f"{visit.base_url}/memory/ui"
        assert page.get_by_role("button", name="Forget key").count() == 0
        expect(page.locator(".empty")).to_contain_text("Nobody has a memory here yet.")
        visit.go("#/memories")
        assert "default has no memories yet." in visit.text()
        visit.go("#/live")
        expect(page.locator(".state")).to_have_text("Connected")
        assert "No request with memory yet." in visit.text()
        remember_here(visit, "Ana lives in Oslo.")
        expect(page.locator(".events li")).to_have_count(1)
        page.get_by_role("link", name="Memories").click()
        expect(page.locator("tbody tr")).to_have_count(1)
        assert all(url.startswith(visit.base_url) for url in asked if url != "about:blank")


def remember_here(visit: Visit, prompt: str) -> None:
    answer = httpx.post(f"{visit.base_url}/memory/store", json={"prompt": prompt}, trust_env=False)
    assert answer.status_code == 200, answer.text


def test_where_memory_is_off_the_page_says_so(browser: Browser) -> None:
    app = FastAPI()
    app.include_router(routes.router)
    with listening(app) as address, visiting(browser, address) as visit:
        visit.go(until=".trouble")
        expect(visit.page.get_by_role("alert")).to_contain_text("memory is off: this vLLM runs without")
        expect(visit.page.get_by_role("button", name="Try again")).to_be_visible()


def test_what_the_server_refuses_is_shown_and_can_be_tried_again(browser: Browser, tmp_path: Path) -> None:
    with listening(application(tmp_path)) as address, visiting(browser, address) as visit:
        page = visit.page
        visit.go()
        body: dict[str, Any] = {"error": {"message": "more than 60 requests per minute; wait 3.0 s"}}
        page.route("**/memory/users**", lambda route: route.fulfill(status=429, json=body))
        page.get_by_role("link", name="Memories").click()
        expect(page.get_by_role("alert")).to_contain_text("more than 60 requests per minute; wait 3.0 s")
        page.unroute_all()
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".empty")).to_contain_text("default has no memories yet.")
