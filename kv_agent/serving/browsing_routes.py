"""The routes under ``/memory`` that show what there is and what was reused lately."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query

from kv_agent.serving import browsing
from kv_agent.serving.browsing_schemas import (
    ChunksAnswer,
    NamespacesAnswer,
    NamesQuery,
    RequestsAnswer,
    RequestsQuery,
    SessionsAnswer,
    SessionsQuery,
    UsersAnswer,
)
from kv_agent.serving.routing import Asking, MemoryId, MemoryRoute, Owner, Server, keyed

router = APIRouter(route_class=MemoryRoute)


@router.get("/memory/namespaces", dependencies=keyed)
async def namespaces(
    server: Server, caller: Asking, wanted: Annotated[NamesQuery, Query()]
) -> NamespacesAnswer:
    """What every namespace of the store holds; for an admin key only."""
    return await server.run(partial(browsing.namespaces, server.service.manager, caller, wanted))


@router.get("/memory/users", dependencies=keyed)
async def users(server: Server, caller: Asking, wanted: Annotated[NamesQuery, Query()]) -> UsersAnswer:
    """The users of the namespace, and how many memories each has."""
    return await server.run(partial(browsing.users, server.service.manager, caller, wanted))


@router.get("/memory/sessions", dependencies=keyed)
async def sessions(
    server: Server, caller: Asking, wanted: Annotated[SessionsQuery, Query()]
) -> SessionsAnswer:
    """The agents and sessions of a user, and how many memories each has."""
    return await server.run(partial(browsing.sessions, server.service.manager, caller, wanted))


@router.get("/memory/requests", dependencies=keyed)
async def requests(
    server: Server, caller: Asking, wanted: Annotated[RequestsQuery, Query()]
) -> RequestsAnswer:
    """What the last requests with memory reused, as far as this server process answered them."""
    found = server.recent.newest(caller.namespace, wanted.limit)
    return RequestsAnswer(requests=[browsing.request_body(one) for one in found])


@router.get("/memory/{memory_id}/chunks", dependencies=keyed)
async def chunks(memory_id: MemoryId, server: Server, caller: Asking, owner: Owner) -> ChunksAnswer:
    """The chunks of one memory: where they stand, how they are kept and who else has them."""

    def found() -> ChunksAnswer:
        memory = server.service.get(caller, memory_id, owner.user_id)
        return browsing.chunks(server.service.manager, memory)

    return await server.run(found)
