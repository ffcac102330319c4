"""Requests and answers without I/O: what is sent and when it is sent again, what a refusal means.

An operation is a generator: it yields what is to be done, is sent what came of it, and returns a value. So
whoever does it, waiting or not, has only to do it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from kv_agent.errors import ConfigError, KVAgentError, ServerError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

MAX_TRIES = 4  # of one request that comes too often
MAX_WAIT_S = 60.0  # before the next of them; a server that wants more is told to the caller
_WAIT_S = 1.0  # where the server does not say how long

NAMESPACE_HEADER = "X-Memory-Namespace"
NO_SUCH_ROUTE = "Not Found"  # what the server answers to a path that it does not know


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request. ``path`` follows the base URL; ``body`` is JSON, or nothing."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back; ``url`` is where from, ``retry_after`` the header of that name."""

    url: str
    status: int
    body: bytes
    retry_after: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


Steps = Generator[Ask | Pause, Reply | None, T]


class _NotFoundError(ConfigError):
    """The server knows the path, but not what it names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is, and the headers of every request."""

    base_url: str
    headers: Mapping[str, str]

    @classmethod
    def of(cls, base_url: str, api_key: str | None, namespace: str | None) -> Address:
        """``base_url`` with or without the ``/v1`` of OpenAI clients; raises :class:`ConfigError`."""
        try:
            parts = urlsplit(base_url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url or parts.query or parts.fragment:
            raise ConfigError(f'base_url must be like "http://localhost:8000", got {base_url!r}')
        headers = {"Accept": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {_header(api_key, 'api_key')}"
        if namespace is not None:
            headers[NAMESPACE_HEADER] = _header(namespace, "namespace")
        return cls(base_url=base_url.rstrip("/").removesuffix("/v1"), headers=headers)


def ask(
    method: str, path: str, body: Mapping[str, Any] | None = None, params: Mapping[str, object] | None = None
) -> Ask:
    """A request; what is ``None`` among the parameters is left out. Raises :class:`ConfigError`."""
    known = {name: str(value) for name, value in (params or {}).items() if value is not None}
    try:
        "".join(known.values()).encode()  # half a surrogate pair, say
        content = None if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as err:
        raise ConfigError(f"this cannot be sent to a server: {err}") from err
    if content is None:
        return Ask(method=method, path=path, params=known)
    return Ask(
        method=method, path=path, params=known, body=content, headers={"Content-Type": "application/json"}
    )


def answered(asked: Ask, model: type[M]) -> Steps[M]:
    """Send a request, again where it came too often -> its answer.

    Raises :class:`ConfigError` for what the client can change, :class:`ServerError` for the rest, both with
    what the server says.
    """
    reply = yield from _sent(asked)
    if not 200 <= reply.status < 300:
        raise _refusal(reply)
    try:
        return model.model_validate_json(reply.body)
    except ValidationError as err:
        raise not_understood(reply.url) from err


def found(asked: Ask, model: type[M]) -> Steps[M | None]:
    """As :func:`answered`; ``None`` if the id that is asked for is not there."""
    try:
        return (yield from answered(asked, model))
    except _NotFoundError:
        return None


def not_understood(url: str) -> ServerError:
    """What an answer means that is not as agreed."""
    return ServerError(f"{url} answered with something else than was asked for; is kv_agent running there?")


def _sent(asked: Ask) -> Steps[Reply]:
    num_tries = 0
    while True:
        reply = yield asked
        assert reply is not None
        num_tries += 1
        wait_s = _seconds(reply.retry_after)
        if reply.status != 429 or num_tries == MAX_TRIES or wait_s > MAX_WAIT_S:
            return reply
        yield Pause(seconds=wait_s)


def _seconds(retry_after: str | None) -> float:
    try:
        wait_s = float(retry_after or "")
    except ValueError:  # a date, say
        return _WAIT_S
    return max(wait_s, 0.0) if math.isfinite(wait_s) else _WAIT_S


def _refusal(reply: Reply) -> KVAgentError:
    sentence = _sentence(reply.body)
    status, url = reply.status, reply.url
    if status == 401:
        key = "give api_key=…; `kv-agent keys add NAMESPACE` makes one"
        return ConfigError(f"{url} does not accept this API key, or there is none: {key}")
    if status == 404 and sentence in (None, NO_SUCH_ROUTE):
        start = "start it with `kv-agent serve`, or with VLLM_PLUGINS=kv_agent"
        return ConfigError(f"{url}: there is no memory on this server; {start}")
    if status == 404:
        return _NotFoundError(sentence)
    if status == 429:
        return ServerError(f"{url} is asked too often: {sentence or 'try again later'}")
    if 400 <= status < 500:
        return ConfigError(sentence or f"{url} refused the request with status {status}")
    if 300 <= status < 400:
        return ConfigError(f"{url} is somewhere else now (status {status}); change base_url")
    return ServerError(f"{url} answered with status {status}: {sentence or 'its log may say why'}")


def _sentence(body: bytes) -> str | None:
    """What an answer in vLLM's error format says."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = said.get("error", said.get("detail")) if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) and message else None


def _header(text: str, name: str) -> str:
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(f"{name} must be printable ASCII without spaces to go to a server")
    return text
