"""The routes under ``/memory``: HTTP in, HTTP out."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Response, WebSocket
from starlette.websockets import WebSocketDisconnect

from kv_agent.chunks import Scope
from kv_agent.serving import browsing_routes, page_routes
from kv_agent.serving.access import NAMESPACE_HEADER, bearer
from kv_agent.serving.errors import ErrorBody, RequestError, answer_to
from kv_agent.serving.events import Listener
from kv_agent.serving.routing import (
    HEALTH,
    Asking,
    MemoryId,
    MemoryRoute,
    Owner,
    Server,
    keyed,
    opened,
    server_of,
)
from kv_agent.serving.schemas import (
    ForgetAnswer,
    ForgetBody,
    HealthAnswer,
    ListAnswer,
    MemoryBody,
    PageQuery,
    PinAnswer,
    QueryAnswer,
    QueryBody,
    StatsAnswer,
    StoreAnswer,
    StoreBody,
)

# What comes meanwhile is sent together: of a thousand listeners each event would be a thousand writes.
_PAUSE_S = 0.2

router = APIRouter(
    route_class=MemoryRoute,
    tags=["memory"],
    responses={
        "4XX": {"model": ErrorBody, "description": "The request cannot be done as it is"},
        "5XX": {"model": ErrorBody, "description": "The engine or the store cannot do it now"},
    },
)
# Before those of one memory, whose id might be anything.
router.include_router(page_routes.router)
router.include_router(browsing_routes.router)


@router.post("/memory/store", dependencies=keyed)
async def store(body: StoreBody, server: Server, caller: Asking) -> StoreAnswer:
    """Compute a turn once and keep its KV; when this answers it is on disk and can be found."""
    return StoreAnswer(id=await server.run(partial(server.service.store, caller, body)))


@router.post("/memory/query", dependencies=keyed)
async def query(body: QueryBody, server: Server, caller: Asking) -> QueryAnswer:
    """The memories that fit a query best."""
    return await server.run(partial(server.service.query, caller, body))


@router.post("/memory/forget", dependencies=keyed)
async def forget(body: ForgetBody, server: Server, caller: Asking) -> ForgetAnswer:
    """Forget all memories of a user that a filter admits, with their KV."""
    return ForgetAnswer(ids=list(await server.run(partial(server.service.forget, caller, body))))


@router.get("/memory/stats", dependencies=keyed)
async def stats(server: Server, caller: Asking) -> StatsAnswer:
    """What the namespace of the key holds and may hold."""
    rate = server.access.requests_per_minute(caller.namespace)
    return await server.run(partial(server.service.stats, caller, rate))


@router.get(HEALTH, responses={503: {"model": HealthAnswer}})
async def health(server: Server, response: Response) -> HealthAnswer:
    """Whether the engine answers and the store can be written; 503 if not. No key is needed."""
    found = await server.health()
    response.status_code = 200 if found.status == "ok" else 503
    return found


@router.get("/memory", dependencies=keyed)
async def page(server: Server, caller: Asking, wanted: Annotated[PageQuery, Query()]) -> ListAnswer:
    """The memories of a user, agent or session, newest first, page by page."""
    scope = Scope(
        namespace=caller.namespace,
        user_id=wanted.user_id,
        agent_id=wanted.agent_id,
        session_id=wanted.session_id,
    )
    return await server.run(partial(server.service.page, scope, wanted.limit, wanted.cursor))


@router.get("/memory/{memory_id}", dependencies=keyed)
async def get(memory_id: MemoryId, server: Server, caller: Asking, owner: Owner) -> MemoryBody:
    """One memory."""
    return await server.run(partial(server.service.get, caller, memory_id, owner.user_id))


@router.delete("/memory/{memory_id}", dependencies=keyed)
async def forget_one(memory_id: MemoryId, server: Server, caller: Asking, owner: Owner) -> ForgetAnswer:
    """Forget one memory, with its KV."""
    gone = await server.run(partial(server.service.forget_one, caller, memory_id, owner.user_id))
    return ForgetAnswer(ids=[gone])


@router.put("/memory/{memory_id}/pin", dependencies=keyed)
async def pin(memory_id: MemoryId, server: Server, caller: Asking, owner: Owner) -> PinAnswer:
    """Keep a memory whatever its time to live and the limits are."""
    pinned = await server.run(partial(server.service.pin, caller, memory_id, True, owner.user_id))
    return PinAnswer(id=pinned, pinned=True)


@router.delete("/memory/{memory_id}/pin", dependencies=keyed)
async def unpin(memory_id: MemoryId, server: Server, caller: Asking, owner: Owner) -> PinAnswer:
    """Let a memory go again as any other."""
    unpinned = await server.run(partial(server.service.pin, caller, memory_id, False, owner.user_id))
    return PinAnswer(id=unpinned, pinned=False)


@router.websocket("/memory/stream")
async def stream(websocket: WebSocket) -> None:
    """Events of the key's namespace as JSON texts, until the client leaves."""
    key = bearer(websocket.headers.get("Authorization")) or websocket.query_params.get("key")
    wanted = websocket.headers.get(NAMESPACE_HEADER) or websocket.query_params.get("namespace")
    websocket.scope["query_string"] = b""  # which the server would log, with the key in it
    try:
        server = server_of(websocket.app.state)
        caller = server.admit_key(key, wanted)
        listener = server.hub.add(caller.namespace)
    except RequestError as err:
        answer = answer_to(err)
        if (memory := opened(websocket.app.state)) is not None:
            memory.metrics.refused("stream", answer.status_code)
        await websocket.send_denial_response(answer)
        return
    try:
        await websocket.accept()
        async with anyio.create_task_group() as sending:
            sending.start_soon(_send, websocket, listener)
            await _leaving(websocket)
            sending.cancel_scope.cancel()
    finally:
        server.hub.remove(caller.namespace, listener)


async def _send(websocket: WebSocket, listener: Listener) -> None:
    with suppress(WebSocketDisconnect):  # which the other side of the connection notices, too
        while True:
            await websocket.send_text(await listener.next())
            if not listener.has_more:
                await anyio.sleep(_PAUSE_S)


async def _leaving(websocket: WebSocket) -> None:
    """Return when the client is gone; what it says is of no interest."""
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
