"""What memories are to those who use them, in this process and over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kv_agent.chunks import ChunkKey, Scope, TurnId
from kv_agent.engines.base import Reuse
from kv_agent.errors import ConfigError
from kv_agent.searching import Voice, VoiceName
from kv_agent.storage.retention import Retention

Share = Literal["user", "agent", "session"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One stored turn. ``score`` is that of the search's mode, ``None`` when nothing was searched.

    ``voices`` says, when asked for, what each way of searching thought of it; ``neighbour_of`` names the
    memory beside which it stands, when it was not found itself.
    """

    id: TurnId
    text: str
    score: float | None
    tokens: int
    chunk_ids: tuple[ChunkKey, ...]
    scope: Scope
    created: float
    expires: float | None = None
    pinned: bool = False
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    voices: Mapping[VoiceName, Voice] = field(default_factory=dict)
    neighbour_of: TurnId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What was found, and how long the model took for the query's keys, 0 if it was not asked."""

    memories: tuple[Memory, ...]
    probe_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A generated answer, what was reused for it, and the memories it was given (oldest first).

    ``ttft_s`` is the time from the call to the first token, the search included.
    """

    text: str
    reuse: Reuse
    memories: tuple[Memory, ...]
    turn_id: TurnId | None
    ttft_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A prompt for the engine: its tokens, salt and plugin fields, and the memories in it, oldest first."""

    token_ids: tuple[int, ...]
    cache_salt: str
    options: Mapping[str, Any]
    memories: tuple[Memory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a namespace holds and may hold.

    ``evicted`` memories went so that others could stay, ``refused`` ones were too large to be kept at all.
    """

    namespace: str
    memories: int
    tokens: int
    num_bytes: int
    evicted: int
    refused: int
    limits: Retention


def reading_scope(scope: Scope, share: Share) -> Scope:
    """What a memory of ``scope`` reads; raises :class:`ConfigError` where that is not said."""
    if share not in ("user", "agent", "session"):
        raise ConfigError(f'share must be "user", "agent" or "session", got {share!r}')
    for level in ("agent", "session"):
        if share == level and getattr(scope, f"{level}_id") is None:
            raise ConfigError(f'share="{level}" needs {level}_id')
    return Scope(
        namespace=scope.namespace,
        user_id=scope.user_id,
        agent_id=scope.agent_id if share != "user" else None,
        session_id=scope.session_id if share == "session" else None,
    )
