"""What happens to memories, shown on the page while it does."""

from __future__ import annotations

import math
import re
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect

from tests.engine.serving.asking import chat, remember
from tests.engine.serving.browser import Visit

pytestmark = pytest.mark.engine


def test_a_chat_appears_among_the_events_and_in_the_charts(
    visit: Visit, client: httpx.Client, user: str
) -> None:
    memory_id = remember(client, "Ana lives in Oslo.", user_id=user)
    page = visit.page
    visit.go("#/live")
    expect(page.locator(".state")).to_have_text("Connected")

    reuse = chat(client, "Where does Ana live?", user_id=user, agent_id="asking", session_id="s")

    injected = page.locator(".events li", has_text="injected").filter(has_text=user)
    expect(injected).to_have_count(1)
    put_back = reuse["exact"] + reuse["adapted"]
    assert put_back > 0
    assert f"{put_back} tokens put back, {reuse['computed']} computed" in injected.inner_text()
    expect(injected.get_by_role("link", name=memory_id[:8])).to_have_count(1)
    expect(page.locator(".events li", has_text="stored").filter(has_text=user)).to_have_count(1)
    page.get_by_text("The same as a table").click()
    row = page.locator(".charts tbody tr", has_text=user)
    expect(row).to_have_count(1)
    shown = [cell.inner_text() for cell in row.locator(":scope > *").all()]
    share = f"{math.floor(100 * put_back / (put_back + reuse['local'] + reuse['computed']) + 0.5)} %"
    assert shown[1] == f"{user} · agent asking · session s"
    assert shown[2:8] == [
        "1", *(str(reuse[name]) for name in ("exact", "adapted", "local", "computed")),
        share,
    ]  # fmt: skip
    (request, *others) = client.get("/memory/requests").json()["requests"]
    assert (request["user_id"], request["ids"], request["failed"]) == (user, [memory_id], False)
    assert request["recall_ms"] > 0
    bars = page.get_by_role("img", name="Prompt tokens of each request")
    assert min(len(others) + 1, 28) <= bars.locator("g").count() <= 29  # as many as there is room for
    tallest = bars.locator("g").last.locator("rect").all()
    heights = [float(rect.get_attribute("height") or 0) for rect in tallest]
    numbers = [reuse[name] for name in ("exact", "adapted", "local", "computed") if reuse[name]]
    assert [height / sum(heights) for height in heights] == pytest.approx(
        [number / sum(numbers) for number in numbers]
    )
    line = page.get_by_role("img", name=re.compile(f"Share of prompt tokens put back .*{share}"))
    assert line.locator("circle").count() == len(others) + 1
    injected.get_by_role("link").click()
    visit.settle()
    assert "Ana lives in Oslo." in visit.text()


def test_events_wait_while_paused_and_a_lost_connection_comes_back(
    visit: Visit, client: httpx.Client, user: str
) -> None:
    page = visit.page
    sockets: list[Any] = []
    page.route_web_socket("**/stream**", lambda socket: (socket.connect_to_server(), sockets.append(socket)))
    visit.go("#/live")
    expect(page.locator(".state")).to_have_text("Connected")
    page.get_by_role("button", name="Pause").click()
    remember(client, "Ana lives in Oslo.", user_id=user)
    expect(page.get_by_role("button", name=re.compile(r"Resume \(\d+ new\)"))).to_be_visible()
    assert page.locator(".events li", has_text=user).count() == 0
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".events li", has_text=user)).to_have_count(1)

    sockets[-1].close(code=1012)
    expect(page.locator(".state")).to_contain_text("trying again")
    expect(page.locator(".state")).to_have_text("Connected")
    assert len(sockets) == 2
    remember(client, "Bo lives in Rome.", user_id=user)
    expect(page.locator(".events li", has_text=user)).to_have_count(2)
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".events li").count() == 0
