"""What there is in a namespace, for those who look around. No HTTP, and everything blocks."""

from __future__ import annotations

from itertools import accumulate

from kv_agent.chunks import ChunkKey, Scope, TurnId
from kv_agent.manager import CacheManager
from kv_agent.serving.access import Caller
from kv_agent.serving.browsing_schemas import (
    ChunkBody,
    ChunksAnswer,
    NamespaceBody,
    NamespacesAnswer,
    NamesQuery,
    RequestBody,
    SessionBody,
    SessionsAnswer,
    SessionsQuery,
    UserBody,
    UsersAnswer,
    cursor_of,
    read_names,
)
from kv_agent.serving.errors import RequestError
from kv_agent.serving.recent import AnsweredRequest
from kv_agent.serving.schemas import MemoryBody


def namespaces(manager: CacheManager, caller: Caller, wanted: NamesQuery) -> NamespacesAnswer:
    """A page of all namespaces of the store; 403 without an admin's key."""
    if not caller.is_admin:
        raise RequestError(403, "only an admin key may see which namespaces there are")
    (after,) = read_names(wanted.cursor, 1) or [""]
    found = manager.store.catalog.overview.namespaces(wanted.limit + 1, after)
    page = list(found.items())[: wanted.limit]
    return NamespacesAnswer(
        namespaces=[
            NamespaceBody(
                namespace=name, memories=held.num_memories, tokens=held.num_tokens, bytes=held.num_bytes
            )
            for name, held in page
        ],
        next=cursor_of(page[-1][0]) if len(found) > wanted.limit else None,
    )


def users(manager: CacheManager, caller: Caller, wanted: NamesQuery) -> UsersAnswer:
    """A page of the users of the caller's namespace."""
    (after,) = read_names(wanted.cursor, 1) or [""]
    found = manager.store.catalog.overview.users(caller.namespace, wanted.limit + 1, after)
    page = found[: wanted.limit]
    return UsersAnswer(
        users=[
            UserBody(
                user_id=one.scope.user_id, memories=one.num_memories, tokens=one.num_tokens, newest=one.newest
            )
            for one in page
        ],
        next=cursor_of(page[-1].scope.user_id) if len(found) > wanted.limit else None,
    )


def sessions(manager: CacheManager, caller: Caller, wanted: SessionsQuery) -> SessionsAnswer:
    """A page of the agents and sessions of one user."""
    owner = Scope(namespace=caller.namespace, user_id=wanted.user_id)
    after = None
    if (names := read_names(wanted.cursor, 2)) is not None:
        agent, session = names
        after = Scope(
            namespace=caller.namespace,
            user_id=wanted.user_id,
            agent_id=agent or None,
            session_id=session or None,
        )
    found = manager.store.catalog.overview.sessions(owner, wanted.limit + 1, after)
    page = found[: wanted.limit]
    return SessionsAnswer(
        user_id=wanted.user_id,
        sessions=[
            SessionBody(
                agent_id=one.scope.agent_id,
                session_id=one.scope.session_id,
                memories=one.num_memories,
                tokens=one.num_tokens,
                newest=one.newest,
            )
            for one in page
        ],
        next=cursor_of(page[-1].scope.agent_id, page[-1].scope.session_id)
        if len(found) > wanted.limit
        else None,
    )


def chunks(manager: CacheManager, memory: MemoryBody) -> ChunksAnswer:
    """The chunks of a memory that the caller may see."""
    keys = [ChunkKey(key) for key in memory.chunk_ids]
    records = manager.chunk_records(keys)
    present = [records[key] for key in keys if key in records]
    starts = accumulate((record.num_tokens for record in present), initial=0)
    others = manager.store.catalog.overview.sharing(TurnId(memory.id), keys)
    return ChunksAnswer(
        id=memory.id,
        chunks=[
            ChunkBody(
                id=record.key,
                text=manager.prompts.text_of(record.token_ids),
                tokens=record.num_tokens,
                start=start,
                position=record.start,
                bytes=record.num_bytes,
                codec=record.codec,
                damaged=record.quarantined,
                other_memories=others.get(record.key, 0),
            )
            for record, start in zip(present, starts, strict=False)
        ],
    )


def request_body(request: AnsweredRequest) -> RequestBody:
    """As it is told to those who ask."""
    return RequestBody(
        at=request.at,
        user_id=request.scope.user_id,
        agent_id=request.scope.agent_id,
        session_id=request.scope.session_id,
        ids=list(request.ids),
        exact=request.exact,
        adapted=request.adapted,
        local=request.local,
        computed=request.computed,
        recall_ms=request.recall_ms,
        failed=request.failed,
    )
