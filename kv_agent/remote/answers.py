"""What a server answers, as values. Fields that are not known here are left alone: servers may be newer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kv_agent.chunks import ChunkKey, Scope, TurnId
from kv_agent.engines.base import Refused, Reuse
from kv_agent.errors import ServerError
from kv_agent.memories import Memory, Stats
from kv_agent.remote.exchange import not_understood
from kv_agent.searching import Voice, VoiceName
from kv_agent.storage.retention import Retention


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class StoredAnswer(_Answer):
    id: str


class Done(_Answer):
    """Any object: that it came says it."""


class _VoiceAnswer(_Answer):
    rank: int
    score: float


class MemoryAnswer(_Answer):
    id: str
    text: str
    score: float | None = None
    tokens: int
    created: float
    expires: float | None = None
    pinned: bool
    namespace: str
    user_id: str
    agent_id: str | None = None
    session_id: str | None = None
    metadata: dict[str, bool | int | float | str]
    chunk_ids: list[str]
    voices: dict[VoiceName, _VoiceAnswer] = {}
    neighbour_of: str | None = None

    @property
    def memory(self) -> Memory:
        return Memory(
            id=TurnId(self.id),
            text=self.text,
            score=self.score,
            tokens=self.tokens,
            chunk_ids=tuple(map(ChunkKey, self.chunk_ids)),
            scope=Scope(
                namespace=self.namespace,
                user_id=self.user_id,
                agent_id=self.agent_id,
                session_id=self.session_id,
            ),
            created=self.created,
            expires=self.expires,
            pinned=self.pinned,
            metadata=self.metadata,
            voices={name: Voice(rank=one.rank, score=one.score) for name, one in self.voices.items()},
            neighbour_of=None if self.neighbour_of is None else TurnId(self.neighbour_of),
        )


class FoundAnswer(_Answer):
    memories: list[MemoryAnswer]
    probe_ms: float


class PageAnswer(_Answer):
    memories: list[MemoryAnswer]
    next: str | None


class _LimitsAnswer(_Answer):
    policy: str | None
    max_bytes: int | None
    max_tokens: int | None
    max_memories: int | None
    window_tokens: int | None
    ttl_s: float | None


class StatsAnswer(_Answer):
    namespace: str
    memories: int
    tokens: int
    bytes: int
    evicted: int
    refused: int
    limits: _LimitsAnswer

    @property
    def stats(self) -> Stats:
        return Stats(
            namespace=self.namespace,
            memories=self.memories,
            tokens=self.tokens,
            num_bytes=self.bytes,
            evicted=self.evicted,
            refused=self.refused,
            limits=Retention(**self.limits.model_dump()),
        )


class _Message(_Answer):
    content: str | None = None


class _Choice(_Answer):
    message: _Message


class _RefusedChunk(_Answer):
    chunk_id: str
    reason: str


class UsedMemory(_Answer):
    id: str
    score: float | None


class ReuseAnswer(_Answer):
    exact: int
    adapted: int
    local: int
    computed: int
    chunk_ids: list[str]
    refused: list[_RefusedChunk]
    memories: list[UsedMemory]
    turn_id: str | None = None

    @property
    def reuse(self) -> Reuse:
        return Reuse(
            exact=self.exact,
            adapted=self.adapted,
            local=self.local,
            computed=self.computed,
            chunk_ids=tuple(map(ChunkKey, self.chunk_ids)),
            refused=tuple(Refused(chunk_id=one.chunk_id, reason=one.reason) for one in self.refused),
        )


class ChatAnswer(_Answer):
    """The rest of ``kv_transfer_params`` belongs to vLLM."""

    choices: list[_Choice]
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].message.content or "" if self.choices else ""


def reuse_of(chat: ChatAnswer, url: str) -> ReuseAnswer:
    """What kv_agent says of a chat; raises :class:`~kv_agent.errors.ServerError` if it had no part in it."""
    said = (chat.kv_transfer_params or {}).get("kv_agent")
    if said is None:
        raise ServerError(f"{url} knows no field `memory`; is it served with VLLM_PLUGINS=kv_agent?")
    if isinstance(said, dict) and (error := said.get("error")):
        raise ServerError(f"{url} answered without memory: {error}")
    try:
        return ReuseAnswer.model_validate(said)
    except ValidationError as err:
        raise not_understood(url) from err
