"""The files of the page at ``/memory/ui``: how they are answered, and that they are whole."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urljoin

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from kv_agent.serving import routes
from kv_agent.serving.page_routes import page_files
from tests.unit.serving.conftest import Served
from tests.unit.serving.test_routes import error_of

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "kv_agent" / "serving" / "page"
NAMES = sorted(path.name for path in PAGE.iterdir())
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def text_of(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def test_the_page_needs_no_key_and_comes_with_strict_headers(served: Served) -> None:
    del served.client.headers["Authorization"]

    answer = served.client.get("/memory/ui")

    assert (answer.status_code, answer.text) == (200, text_of("index.html"))
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Security-Policy"] == POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_answered_once_per_content(served: Served, name: str) -> None:
    path = f"/memory/ui/{name}"
    answer = served.client.get(path)

    assert answer.content == (PAGE / name).read_bytes()
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    assert answer.headers["Content-Type"] == f"{kinds[Path(name).suffix]}; charset=utf-8"
    assert answer.headers["Content-Security-Policy"] == POLICY
    etag = answer.headers["ETag"]
    for known in (etag, f"W/{etag}", f'"old", {etag}'):
        again = served.client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
    assert served.client.get(path, headers={"If-None-Match": '"old"'}).status_code == 200
    assert served.client.head(path).status_code == 200


@pytest.mark.parametrize(
    "name", ["nothing.js", "page", "..%2Froutes.py", "%2e%2e", "index.html%00", "a/b.js"]
)
def test_nothing_else_is_answered(served: Served, name: str) -> None:
    answer = served.client.get(f"/memory/ui/{name}")
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_a_slash_too_many_leads_back_whatever_the_prefix(served: Served) -> None:
    answer = served.client.get("/memory/ui/", follow_redirects=False)

    assert answer.status_code == 308
    there = urljoin("https://host/some/prefix/memory/ui/", answer.headers["Location"])
    assert there == "https://host/some/prefix/memory/ui"


def test_the_page_is_there_while_memory_is_off() -> None:
    app = FastAPI()
    app.include_router(routes.router)
    with TestClient(app) as client:
        assert client.get("/memory/ui").status_code == 200
        assert "memory is off" in error_of(client.get("/memory/stats"), 503)["message"]


def test_the_page_is_no_part_of_the_described_interface(served: Served) -> None:
    assert not [path for path in served.client.get("/openapi.json").json()["paths"] if "/ui" in path]


def test_all_that_the_files_name_is_there() -> None:
    html = text_of("index.html")
    named = re.findall(r'(?:src|href)="ui/([^"]+)"', html)
    assert {"page.css", "page.js"} <= set(named)
    seen = {"index.html", *named}
    for name in (name for name in NAMES if name.endswith(".js")):
        seen |= set(re.findall(r'from "\./([^"]+)"', text_of(name)))
    assert sorted(seen) == NAMES == sorted(page_files())


def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup() -> None:
    for name in NAMES:
        text = text_of(name)
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s'\"]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        for way_in in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "DOMParser",
        ):
            assert way_in not in text, name
        assert not re.search(r"<script>|<style|\sstyle=|\son\w+=\"", text), name
        assert "@import" not in text, name


def test_no_file_is_too_long_to_read() -> None:
    for name in NAMES:
        lines = text_of(name).splitlines()
        assert len(lines) <= 400, name
        too_wide = [line for line in lines if len(line) > 110 and "data:image/svg+xml" not in line]
        assert too_wide == [], name


def test_the_wheel_has_the_files() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["kv_agent.serving"]
    for name in NAMES:
        assert any(fnmatch(f"page/{name}", pattern) for pattern in patterns), name
