"""Requests and answers as httpx has them, for clients that wait and those that do not."""

from __future__ import annotations

import httpx

from kv_agent.errors import ServerError
from kv_agent.remote.exchange import Address, Ask, Reply

TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 10.0


def timeouts(timeout_s: float) -> httpx.Timeout:
    """Connecting takes long only where nobody answers."""
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))


def request_of(client: httpx.Client | httpx.AsyncClient, address: Address, ask: Ask) -> httpx.Request:
    return client.build_request(
        ask.method,
        address.base_url + ask.path,
        params=dict(ask.params),
        content=ask.body,
        headers={**address.headers, **ask.headers},
    )


def reply_of(response: httpx.Response) -> Reply:
    return Reply(
        url=str(response.url.copy_with(query=None)),
        status=response.status_code,
        body=response.content,
        retry_after=response.headers.get("Retry-After"),
    )


def no_answer(address: Address, err: httpx.HTTPError | httpx.InvalidURL) -> ServerError:
    """What it means that a request got no answer."""
    url = address.base_url
    if isinstance(err, httpx.ConnectTimeout):
        return ServerError(f"{url} cannot be reached in time; is the server running there?")
    if isinstance(err, httpx.TimeoutException):
        return ServerError(
            f"{url} did not answer in time; look at the server's log, or give a larger timeout_s"
        )
    return ServerError(f"{url} gave no answer ({err or type(err).__name__}); is the server running there?")
