"""What all memory routes share: who asks, how large a body may be, and how refusals are answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Message

from kv_agent.errors import KVAgentError
from kv_agent.serving.access import NAMESPACE_HEADER, Caller
from kv_agent.serving.errors import RequestError, answer_to
from kv_agent.serving.schemas import OfUser
from kv_agent.serving.server import MemoryServer

MAX_BODY_BYTES = 1 << 20
STATE = "kv_agent"  # the attribute of the application's state that holds the MemoryServer
HEALTH = "/memory/health"  # the one route that needs no key

_OFF = "memory is off: this vLLM runs without KVAgentConnector, see --kv-transfer-config in kv_agent's README"


class MemoryRoute(APIRoute):
    """Knows the caller before it reads the body, bounds that, and answers refusals in vLLM's format."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                server = server_of(request.app.state)
                if self.path != HEALTH:
                    header = request.headers.get
                    request.state.caller = server.admit(header("Authorization"), header(NAMESPACE_HEADER))
                return await handle(Request(request.scope, _bounded(request)))
            except (RequestValidationError, HTTPException, KVAgentError) as err:
                return answer_to(err)

        async def handler(request: Request) -> Response:
            started = time.perf_counter()
            status = 500  # unless there is an answer
            try:
                answer = await answered(request)
                status = answer.status_code
                return answer
            finally:
                if (server := opened(request.app.state)) is not None:
                    took_s = time.perf_counter() - started
                    server.metrics.answered(request.method, self.path, status, took_s)

        return handler


def opened(state: Any) -> MemoryServer | None:
    """What was opened with the application; ``None`` where memory is off."""
    return getattr(state, STATE, None)


def server_of(state: Any) -> MemoryServer:
    """As :func:`opened`; raises :class:`RequestError` (503) where memory is off."""
    server = opened(state)
    if server is None:
        raise RequestError(503, _OFF)
    return server


# Coroutines: FastAPI hands other dependencies to a thread, which takes longer than all they do.
async def _server_of(request: Request) -> MemoryServer:
    return server_of(request.app.state)


async def _caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


_KEY = HTTPBearer(auto_error=False, description="an API key of a namespace, where the server has keys")
keyed = [Depends(_KEY)]
Server = Annotated[MemoryServer, Depends(_server_of)]
Asking = Annotated[Caller, Depends(_caller_of)]
MemoryId = Annotated[str, Path(min_length=1, max_length=256)]
Owner = Annotated[OfUser, Query()]


def _bounded(request: Request) -> Callable[[], Coroutine[Any, Any, Message]]:
    """The request's body, but for what is too much of it, whatever it claims to be."""
    too_large = HTTPException(413, f"a body may have {MAX_BODY_BYTES} bytes at most")
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise too_large
        return message

    claimed = request.headers.get("Content-Length", "")
    if claimed.isdecimal() and int(claimed) > MAX_BODY_BYTES:
        raise too_large
    return receive
