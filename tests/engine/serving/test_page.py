"""The page at ``/memory/ui`` in a real Chromium, on a real server: what people see and do there."""

from __future__ import annotations

import re

import httpx
import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Browser, expect

from tests.engine.serving.asking import chat, remember
from tests.engine.serving.browser import Visit, visiting
from tests.engine.serving.server_process import MemoryServerProcess

pytestmark = pytest.mark.engine

HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script><b>bold</b>'


def cells(visit: Visit, table: str = "table") -> list[list[str]]:
    rows = visit.page.locator(f"{table} >> tbody tr").all()
    return [[cell.inner_text() for cell in row.locator(":scope > *").all()] for row in rows]


def test_a_key_is_asked_for_tried_used_and_forgotten(
    browser: Browser, memory_server: MemoryServerProcess
) -> None:
    with visiting(browser, memory_server.base_url) as visit:
        page = visit.page
        visit.go(until="form.key")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("kva-wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("an API key is needed")
        expect(page.get_by_label("API key")).to_be_focused()

        page.keyboard.type(memory_server.keys["acme"])
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("Overview")
        expect(page.locator(".namespace")).to_have_text("acme")
        assert page.evaluate("Object.entries(localStorage).length") == 0
        assert page.evaluate("document.cookie") == ""
        assert memory_server.keys["acme"] not in page.url

        page.reload()
        visit.settle()
        expect(page.locator("h1")).to_have_text("Overview")
        page.get_by_role("button", name="Forget key").click()
        expect(page.get_by_label("API key")).to_be_focused()
        assert page.evaluate("Object.entries(sessionStorage).length") == 0


def test_the_overview_shows_limits_and_who_has_memories(
    visit: Visit, client: httpx.Client, user: str
) -> None:
    remember(client, "Ana lives in Oslo.", user_id=user)
    for agent, session, name in (("a", "s", "Bo"), ("a", "s", "Cy"), ("b", "t", "Di")):
        remember(client, f"{name} lives in Rome.", user_id=user, agent_id=agent, session_id=session)
    page = visit.page
    visit.go()

    stats = client.get("/memory/stats").json()
    figures = page.locator(".tile .figure").all_inner_texts()
    assert figures[:2] == [f"{stats['memories']:,}", f"{stats['tokens']:,}"]
    for line in ("The engine answers", "The store can be written", "no limit"):
        assert line in visit.text()
    assert page.get_by_role("heading", name="Namespaces").count() == 0
    page.get_by_role("link", name="Memories").focus()  # lets the test scroll as people do
    while page.locator(".user", has_text=user).count() == 0:
        page.get_by_role("button", name="More").click()
        page.wait_for_timeout(100)
    details = page.locator(".user", has_text=user)
    assert "4 memories" in details.locator("summary").inner_text()
    details.locator("summary").click()
    expect(details.locator("tbody tr")).to_have_count(3)
    rows = details.locator("tbody tr").all_inner_texts()
    assert [re.split(r"\s+", row)[:4] for row in rows] == [
        ["no", "agent", "/", "no"],
        ["a", "/", "s", "2"],
        ["b", "/", "t", "1"],
    ]
    details.get_by_role("link", name="a / s").click()
    visit.settle()
    expect(page.locator("h1")).to_have_text("Memories")
    assert [row[1:3] for row in cells(visit)] == [["a", "s"], ["a", "s"]]


def test_an_admin_looks_into_another_namespace_and_back(
    browser: Browser, memory_server: MemoryServerProcess, client: httpx.Client, user: str
) -> None:
    remember(client, "Ana lives in Oslo.", user_id=user)
    with visiting(browser, memory_server.base_url) as visit:
        page = visit.page
        visit.use(memory_server.keys["admin"])
        expect(page.locator(".namespace")).to_have_text("operations")
        page.get_by_role("button", name="Look into acme").click()
        expect(page.locator(".namespace")).to_have_text("acme")
        visit.go(f"#/memories?user={user}")
        assert "Ana lives in Oslo." in visit.text(".results")
        visit.go("#/live")
        expect(page.locator(".state")).to_have_text("Connected")
        remember(client, "Bo lives in Rome.", user_id=user)
        expect(page.locator(".events li", has_text=user)).to_have_count(1)
        page.get_by_role("button", name="Back to own").click()
        expect(page.locator(".namespace")).to_have_text("operations")


def test_memories_are_listed_and_searched_while_one_types(
    visit: Visit, client: httpx.Client, user: str
) -> None:
    names = ["Ana", "Bo", "Cy", "Di"]
    for name in names:
        remember(client, f"{name} lives in Oslo.", user_id=user, session_id=name)
    page = visit.page
    visit.go(f"#/memories?user={user}")
    assert [row[0].split()[0] for row in cells(visit)] == names[::-1]

    page.get_by_label("Search", exact=True).press_sequentially("where is cy", delay=30)
    expect(page.locator("tbody tr")).to_have_count(1)
    assert "Cy lives in Oslo." in visit.text("tbody")
    assert "q=where+is+cy" in page.url
    page.reload()  # the address is enough
    visit.settle()
    assert "Cy lives in Oslo." in visit.text("tbody")
    page.get_by_label("Search", exact=True).fill("xylophone")
    expect(page.locator(".empty")).to_contain_text("Nothing has these words.")
    page.get_by_label("Search", exact=True).fill("")
    expect(page.locator("tbody tr")).to_have_count(4)
    page.get_by_label("Session").fill("Bo")
    expect(page.locator("tbody tr")).to_have_count(1)
    assert "Bo lives in Oslo." in visit.text("tbody")


def test_a_long_list_comes_page_by_page(visit: Visit, client: httpx.Client, user: str) -> None:
    for number in range(53):
        remember(client, f"Number {number} is here.", user_id=user)
    visit.go(f"#/memories?user={user}")
    expect(visit.page.locator("tbody tr")).to_have_count(50)
    visit.page.get_by_role("button", name="More").click()
    expect(visit.page.locator("tbody tr")).to_have_count(53)
    expect(visit.page.get_by_role("button", name="More")).to_have_count(0)
    numbers = [int(row[0].split()[1]) for row in cells(visit)]
    assert numbers == list(range(53))[::-1]


def test_a_memory_shows_its_text_its_facts_and_its_chunks(
    visit: Visit, client: httpx.Client, user: str
) -> None:
    text = " ".join(f"Person {number} lives in Oslo and has a goat." for number in range(20))
    fields = {"agent_id": "a", "metadata": {"source": "mail", "n": 3}, "ttl_s": 3600.0}
    memory_id = remember(client, text, user_id=user, **fields)
    visit.go(f"#/memory/{memory_id}")

    assert text in visit.text(".text")
    about = dict(
        zip(
            visit.page.locator("dt").all_inner_texts(),
            visit.page.locator("dd").all_inner_texts(),
            strict=True,
        )
    )
    memory = client.get(f"/memory/{memory_id}").json()
    assert {name: about[name] for name in ("User", "Agent", "Session", "Tokens", "source", "n", "Id")} == {
        "User": user, "Agent": "a", "Session": "none", "Tokens": str(memory["tokens"]),
        "source": "mail", "n": "3", "Id": memory_id,
    }  # fmt: skip
    assert about["Forgotten"] == "in 1 hour"
    chunks = client.get(f"/memory/{memory_id}/chunks").json()["chunks"]
    assert len(chunks) > 3
    shown = [[*row[1:4], row[5], row[6]] for row in cells(visit)]
    assert shown == [
        [str(chunk["tokens"]), str(chunk["start"]), str(chunk["position"]), chunk["codec"], "no"]
        for chunk in chunks
    ]
    lengths = ", ".join(str(chunk["tokens"]) for chunk in chunks)
    assert visit.page.get_by_role("img", name=f"Chunks of {lengths} tokens").count() == 1


def test_a_memory_is_pinned_kept_on_second_thought_and_forgotten(
    visit: Visit, client: httpx.Client, user: str
) -> None:
    memory_id = remember(client, "Ana lives in Oslo.", user_id=user)
    page = visit.page
    visit.go(f"#/memory/{memory_id}")

    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.get_by_role("button", name="Unpin")).to_be_focused()
    assert client.get(f"/memory/{memory_id}").json()["pinned"]
    page.get_by_role("button", name="Unpin").click()
    expect(page.get_by_role("button", name="Pin", exact=True)).to_be_focused()
    assert not client.get(f"/memory/{memory_id}").json()["pinned"]

    page.get_by_role("button", name="Forget", exact=True).click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_role("button", name="Forget", exact=True)).to_be_focused()
    assert client.get(f"/memory/{memory_id}").status_code == 200

    page.get_by_role("button", name="Forget", exact=True).click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator("h1")).to_have_text("Memories")
    expect(page.get_by_role("status").filter(has_text="forgotten")).to_be_visible()
    assert client.get(f"/memory/{memory_id}").status_code == 404
    expect(page.locator(".empty")).to_contain_text(f"{user} has no memories yet.")


def test_a_query_shows_what_would_be_retrieved_and_why(visit: Visit, client: httpx.Client, user: str) -> None:
    for name, town in (("Ana", "Oslo"), ("Bo", "Rome"), ("Cy", "Hanoi")):
        remember(client, f"{name} lives in {town}.", user_id=user)
    page = visit.page
    visit.go("#/query")
    assert "Nothing asked yet." in visit.text()
    page.get_by_label("What would you ask?").fill("Where does Bo live?")
    page.get_by_label("User").fill(user)
    page.get_by_label("How many").fill("2")
    page.get_by_role("button", name="Query").click()
    expect(page.locator(".hit")).to_have_count(2)

    body = {"query": "Where does Bo live?", "user_id": user, "top_k": 2, "explain": True}
    expected = client.post("/memory/query", json=body).json()["memories"]
    assert [hit.locator(".text").inner_text() for hit in page.locator(".hit").all()] == [
        memory["text"] for memory in expected
    ]
    assert "Bo lives in Rome." in expected[0]["text"]
    ways = {"Words": "lexical", "Model's keys": "latent"}
    for hit, memory in zip(page.locator(".hit").all(), expected, strict=True):
        rows = [
            [cell.inner_text() for cell in row.locator(":scope > *").all()]
            for row in hit.locator("tbody tr").all()
        ]
        assert {ways[way]: int(place) for way, place, *_ in rows} == {
            name: voice["rank"] for name, voice in memory["voices"].items()
        }
        # "1/61 = 0.0164": what each way adds, together the score.
        total = sum(1 / int(adds.split(" = ")[0].removeprefix("1/")) for *_, adds in rows)
        assert total == pytest.approx(memory["score"])
        assert float(hit.locator(".score strong").inner_text()) == pytest.approx(total, rel=0.01)
    assert re.search(r"Found in [\d.]+ ms, [\d.]+ ms of it the model", visit.text(".results"))

    page.get_by_label("Search by").select_option("lexical")
    page.get_by_role("button", name="Query").click()
    expect(page.locator(".results")).to_contain_text("the model was not asked")
    page.go_back()
    expect(page.locator(".results")).to_contain_text("of it the model")
    assert page.get_by_label("Search by").input_value() == "hybrid"


def test_a_query_is_narrowed_by_all_that_the_form_has(visit: Visit, client: httpx.Client, user: str) -> None:
    for name, agent, number in (("Ana", "a", 1), ("Bo", "b", 1), ("Cy", "b", 2)):
        fields = {"agent_id": agent, "session_id": "s", "metadata": {"n": number}}
        remember(client, f"{name} lives in Oslo.", user_id=user, **fields)
    page = visit.page
    visit.go(f"#/query?q=Oslo&user={user}&mode=lexical&agent=b&metadata=n%3D2&neighbours=1")
    assert page.locator(".hit .text").all_inner_texts() == [
        "Cy lives in Oslo.\nI will remember that.",
        "Bo lives in Oslo.\nI will remember that.",
    ]
    expect(page.get_by_role("heading", name="Turns beside them")).to_be_visible()
    page.get_by_label("Stored before").fill("2001-01-01T00:00:00")
    page.get_by_role("button", name="Query").click()
    expect(page.locator(".empty")).to_contain_text("Nothing fits.")
    page.get_by_label("Read").select_option("session")
    page.get_by_label("Agent").fill("")
    page.get_by_role("button", name="Query").click()
    page.get_by_label("Session").fill("")
    page.get_by_role("button", name="Query").click()
    expect(page.get_by_role("alert")).to_contain_text('share="session" needs session_id')


def test_memories_of_another_namespace_are_never_shown(
    visit: Visit, memory_server: MemoryServerProcess, user: str
) -> None:
    with memory_server.client("other") as other:
        secret = remember(other, "The password is walrus.", user_id=user)
        visit.go("#/live")
        expect(visit.page.locator(".state")).to_have_text("Connected")
        chat(other, "What is the password?", user_id=user)
        with memory_server.client("acme") as client:
            remember(client, "Ana lives in Oslo.", user_id=user)
        expect(visit.page.locator(".events li", has_text=user)).to_have_count(1)
        assert secret[:8] not in visit.text()
        assert user not in visit.text(".charts")
        visit.go(f"#/memory/{secret}", until=".trouble")
        expect(visit.page.get_by_role("alert")).to_contain_text("there is no such memory")
        for view in (
            f"memories?user={user}&q=password",
            f"query?q=password&user={user}",
            f"memories?user={user}",
        ):
            visit.go(f"#/{view}", until=".results > *")
            assert "walrus" not in visit.text()


def test_hostile_texts_stay_texts(visit: Visit, client: httpx.Client) -> None:
    fields = {"user_id": HOSTILE, "agent_id": HOSTILE, "session_id": HOSTILE}
    memory_id = remember(client, HOSTILE, metadata={HOSTILE: HOSTILE}, **fields)
    encoded = str(httpx.QueryParams({"user": HOSTILE, "q": "bold", "mode": "lexical"}))
    page = visit.page
    for view in (
        "#/",
        f"#/memories?{encoded}",
        f"#/memory/{memory_id}",
        f"#/query?{encoded}",
        "#/memory/%3Cimg%3E",
        "#/live",
    ):
        visit.go(view)
        if view == "#/live":
            expect(page.locator(".state")).to_have_text("Connected")
            chat(client, HOSTILE, **fields)
            expect(page.locator(".events li", has_text="<img").first).to_be_visible()
            page.get_by_text("The same as a table").click()
        if view == "#/":
            page.locator(".user", has_text="<img").locator("summary").click()
            expect(page.locator(".user table")).to_contain_text("<img")
        if "img%3E" not in view:
            assert "<img src=x" in visit.text()
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img, main script, main b").count() == 0
    page.goto(f"{visit.base_url}/memory/ui#/memory/{memory_id}")
    visit.settle()
    page.get_by_role("button", name="Forget", exact=True).click()
    assert "<img src=x" in page.inner_text("dialog")
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator(".results")).to_contain_text("<img src=x")  # the chat's
    assert page.evaluate("window.hacked") is None
