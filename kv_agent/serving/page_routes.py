"""The page at ``/memory/ui``: static files of the package, which hold nothing of anybody."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import PurePath

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from kv_agent.serving.errors import RequestError, answer_to

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_INDEX = "index.html"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFile:
    """A file of the page; ``etag`` changes with its content."""

    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """All files of the page by their names."""
    files = {}
    for entry in (resources.files("kv_agent.serving") / "page").iterdir():
        if (media_type := _TYPES.get(PurePath(entry.name).suffix)) is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[entry.name] = PageFile(content=content, media_type=media_type, etag=etag)
    return files


# Addresses in the page are relative to this one, so that it works behind any prefix.
@router.api_route("/memory/ui", methods=["GET", "HEAD"])
def index(request: Request) -> Response:
    """The page itself."""
    return _answer(_INDEX, request)


@router.api_route("/memory/ui/", methods=["GET", "HEAD"])
def with_slash() -> Response:
    """To where the page is; relative, for whoever is behind a prefix."""
    return RedirectResponse("../ui", 308, headers=_HEADERS)


@router.api_route("/memory/ui/{name}", methods=["GET", "HEAD"])
def file(name: str, request: Request) -> Response:
    """What the page is made of."""
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    found = page_files().get(name)
    if found is None:
        return answer_to(RequestError(404, "the page has no such file", headers=_HEADERS))
    headers = {**_HEADERS, "ETag": found.etag}
    if _knows(request.headers.get("If-None-Match", ""), found.etag):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)


def _knows(header: str, etag: str) -> bool:
    """Whether a browser has this already; a proxy that compressed it made the tag a weak one."""
    return etag in [known.strip().removeprefix("W/") for known in header.split(",")]
