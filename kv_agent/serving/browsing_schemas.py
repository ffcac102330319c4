"""Questions and answers of the routes that show what there is."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kv_agent.serving.recent import KEPT
from kv_agent.serving.schemas import Name, bad_cursor

Limit = Annotated[int, Field(ge=1, le=1000)]
Cursor = Annotated[str | None, Field(max_length=4000)]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NamesQuery(_Query):
    """Which part of a list."""

    limit: Limit = 100
    cursor: Cursor = None


class SessionsQuery(NamesQuery):
    """Whose sessions, and which part of them."""

    user_id: Name = "default"


class RequestsQuery(_Query):
    """How many of the newest."""

    limit: Annotated[int, Field(ge=1, le=KEPT)] = KEPT


class NamespaceBody(BaseModel):
    """``tokens`` are all whose KV is kept, those of system prompts, too; ``bytes`` are on disk."""

    namespace: str
    memories: int
    tokens: int
    bytes: int


class NamespacesAnswer(BaseModel):
    """In order; ``next`` is the cursor of the next page, null on the last one."""

    namespaces: list[NamespaceBody]
    next: str | None = None


class UserBody(BaseModel):
    """``tokens`` are those of the memories, ``newest`` is the time of the newest, null where none is left."""

    user_id: str
    memories: int
    tokens: int
    newest: float | None


class UsersAnswer(BaseModel):
    """In order; ``next`` is the cursor of the next page, null on the last one."""

    users: list[UserBody]
    next: str | None = None


class SessionBody(BaseModel):
    """What a user has of one agent and session; null is what was stored without one."""

    agent_id: str | None
    session_id: str | None
    memories: int
    tokens: int
    newest: float | None


class SessionsAnswer(BaseModel):
    """Agent by agent, in order; ``next`` is the cursor of the next page, null on the last one."""

    user_id: str
    sessions: list[SessionBody]
    next: str | None = None


class ChunkBody(BaseModel):
    """One chunk of a memory.

    It has ``tokens`` tokens from token ``start`` of the memory on; when it was computed it stood at
    ``position`` of its prompt. ``bytes`` is its size on disk, written by ``codec``. ``damaged``: its bytes
    turned out to be bad or lost, its tokens will be computed. ``other_memories`` have the same chunk.
    """

    id: str
    text: str
    tokens: int
    start: int
    position: int
    bytes: int
    codec: str
    damaged: bool
    other_memories: int


class ChunksAnswer(BaseModel):
    """The chunks of a memory in their order."""

    id: str
    chunks: list[ChunkBody]


class RequestBody(BaseModel):
    """What one request with memory reused: tokens of its prompt by where their KV came from.

    ``ids`` are the memories in the prompt, ``recall_ms`` is what finding and placing them took. ``failed``:
    memory could not be used, the request was answered without.
    """

    at: float
    user_id: str
    agent_id: str | None
    session_id: str | None
    ids: list[str]
    exact: int
    adapted: int
    local: int
    computed: int
    recall_ms: float
    failed: bool


class RequestsAnswer(BaseModel):
    """Newest first; only those that this server process answered since it started, the last hundred."""

    requests: list[RequestBody]


def cursor_of(*names: str | None) -> str:
    """Where the page after these names begins."""
    return base64.urlsafe_b64encode(json.dumps(names).encode()).decode()


def read_names(cursor: str | None, count: int) -> list[str] | None:
    """The names that a cursor holds, '' for null; ``None`` without one."""
    if cursor is None:
        return None
    try:
        names = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError) as err:
        raise bad_cursor() from err
    if not isinstance(names, list) or len(names) != count:
        raise bad_cursor()
    if not all(name is None or isinstance(name, str) for name in names):
        raise bad_cursor()
    return [name or "" for name in names]
