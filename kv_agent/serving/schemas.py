"""Bodies and answers of the memory routes."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from kv_agent.chunks import TurnFilter, TurnId
from kv_agent.memories import Memory, Share
from kv_agent.placing import Quality
from kv_agent.searching import Mode
from kv_agent.serving.errors import RequestError

MAX_TOP_K = 100
MAX_PAGE = 1000
_LARGEST = 2**63 - 1  # what SQLite can hold
_NO_NUL = r"^[^\x00]*$"  # SQLite ends a text there

Name = Annotated[StrictStr, Field(min_length=1, max_length=256, pattern=_NO_NUL)]
Text = Annotated[StrictStr, Field(max_length=1 << 20, pattern=_NO_NUL)]
Time = Annotated[float, Field(allow_inf_nan=False, strict=True, description="Unix time in seconds")]


def _in_64_bits(value: object) -> object:
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise ValueError("whole numbers have 64 bits at most")
    return value


Value = (
    StrictBool
    | Annotated[StrictInt, Field(ge=-_LARGEST, le=_LARGEST)]
    | Annotated[float, BeforeValidator(_in_64_bits), Field(allow_inf_nan=False, strict=True)]
    | Annotated[StrictStr, Field(max_length=4096, pattern=_NO_NUL)]
)
Metadata = Annotated[
    dict[Name, Value],
    # Otherwise the description of the API would allow any other key, too.
    Field(max_length=64, json_schema_extra={"additionalProperties": False}),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Owned(_Body):
    """Whose memories these are."""

    user_id: Name = "default"
    agent_id: Name | None = None
    session_id: Name | None = None


class StoreBody(Owned):
    """A turn to compute once and keep."""

    prompt: Annotated[Text, Field(min_length=1)]
    response: Text = ""
    system_prompt: Text | None = None
    metadata: Metadata = {}
    ttl_s: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, strict=True, description="forgotten after so many seconds"),
    ] = None


class TurnFilters(_Body):
    """What memories must have; times are those of storing, from ``since`` to before ``until``."""

    since: Time | None = None
    until: Time | None = None
    metadata: Metadata = {}

    @property
    def turn_filter(self) -> TurnFilter:
        return TurnFilter(since=self.since, until=self.until, metadata=self.metadata)


class Filters(TurnFilters):
    """The same, and whose they must be."""

    agent_id: Name | None = None
    session_id: Name | None = None


class QueryBody(Owned):
    """A question to the memories that ``share`` lets this user, agent or session read."""

    query: Annotated[StrictStr, Field(max_length=1 << 15, pattern=_NO_NUL)]
    share: Share = "user"
    top_k: Annotated[StrictInt, Field(ge=1, le=MAX_TOP_K)] = 5
    mode: Mode = "hybrid"
    threshold: Annotated[
        float | None,
        Field(
            allow_inf_nan=False,
            strict=True,
            description="the least score. `hybrid`: reciprocal ranks added up, 1/61 for the first place in"
            " each way of searching; `latent`: the part of the query's tokens that the memory wins, 0 to 1;"
            " `lexical`: BM25, from 0 on, without an upper bound",
        ),
    ] = None
    filters: Filters = Filters()
    neighbours: Annotated[StrictInt, Field(ge=0, le=20)] = 0
    explain: StrictBool = False
    peek: Annotated[
        StrictBool, Field(description="only look: what is found does not count as used, and no event is told")
    ] = False


class OfUser(_Body):
    """Whose a memory must be."""

    user_id: Annotated[Name | None, Field(description="only if it is this user's")] = None


class PageQuery(Owned):
    """Whose memories to list, and which part of them."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 100
    cursor: Annotated[str | None, Field(max_length=1000)] = None


class MemoryField(Owned):
    """What a chat request asks of memory."""

    top_k: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_K)] = 5
    store: StrictBool = True
    share: Share = "user"
    mode: Mode = "hybrid"
    quality: Quality = "fast"
    filters: TurnFilters = TurnFilters()
    neighbours: Annotated[StrictInt, Field(ge=0, le=20)] = 0
    metadata: Metadata = {}
    ttl_s: Annotated[float | None, Field(gt=0, allow_inf_nan=False, strict=True)] = None


class ForgetBody(_Body):
    """Which memories of a user to forget; ``all`` instead of any filter."""

    user_id: Name
    agent_id: Name | None = None
    session_id: Name | None = None
    since: Time | None = None
    until: Time | None = None
    metadata: Metadata = {}
    all: StrictBool = False

    @property
    def turn_filter(self) -> TurnFilter:
        return TurnFilter(since=self.since, until=self.until, metadata=self.metadata)

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        is_narrowed = bool(self.agent_id or self.session_id or not self.turn_filter.admits_all)
        if is_narrowed == self.all:
            raise ValueError('give a filter, or "all": true for all memories of this user, not both')
        return self


class VoiceBody(BaseModel):
    """Where one way of searching had a memory: ``rank`` from 1, and its own score."""

    rank: int
    score: float


class MemoryBody(BaseModel):
    """One memory. ``score`` is null where nothing was searched, and for neighbours."""

    id: str
    text: str
    score: float | None = None
    tokens: int
    created: float
    expires: float | None = None
    pinned: bool = False
    namespace: str
    user_id: str
    agent_id: str | None = None
    session_id: str | None = None
    metadata: dict[str, bool | int | float | str] = {}
    chunk_ids: list[str] = []
    voices: dict[str, VoiceBody] = {}
    neighbour_of: str | None = None

    @classmethod
    def of(cls, memory: Memory) -> Self:
        return cls(
            id=memory.id,
            text=memory.text,
            score=memory.score,
            tokens=memory.tokens,
            created=memory.created,
            expires=memory.expires,
            pinned=memory.pinned,
            namespace=memory.scope.namespace,
            user_id=memory.scope.user_id,
            agent_id=memory.scope.agent_id,
            session_id=memory.scope.session_id,
            metadata=dict(memory.metadata),
            chunk_ids=list(memory.chunk_ids),
            voices={name: VoiceBody(rank=one.rank, score=one.score) for name, one in memory.voices.items()},
            neighbour_of=memory.neighbour_of,
        )


class StoreAnswer(BaseModel):
    """The memory is on disk and can be found."""

    id: str


class QueryAnswer(BaseModel):
    """``memories`` best first, then neighbours, oldest first.

    ``probe_ms`` is the part of ``took_ms`` in which the model computed the query's keys.
    """

    memories: list[MemoryBody]
    took_ms: float
    probe_ms: float


class ListAnswer(BaseModel):
    """Newest first; ``next`` is the cursor of the next page, null on the last one."""

    memories: list[MemoryBody]
    next: str | None = None


class ForgetAnswer(BaseModel):
    """What was forgotten, oldest first."""

    ids: list[str]


class PinAnswer(BaseModel):
    id: str
    pinned: bool


class LimitsBody(BaseModel):
    """What applies to the namespace; null is no limit."""

    policy: str | None
    max_bytes: int | None
    max_tokens: int | None
    max_memories: int | None
    window_tokens: int | None
    ttl_s: float | None
    requests_per_minute: int | None


class StatsAnswer(BaseModel):
    """What a namespace holds. ``store`` counts all namespaces together, for an admin key only."""

    namespace: str
    memories: int
    tokens: int
    bytes: int
    evicted: int
    refused: int
    limits: LimitsBody
    store: dict[str, int] | None = None


class HealthAnswer(BaseModel):
    """``index_lag``: changes that the indexes in memory will follow at their next search, at most."""

    status: Literal["ok", "unwell"]
    engine: bool
    store: bool
    index_lag: int


def cursor_after(memories: Sequence[Memory]) -> str:
    """Where the page after these begins."""
    last = memories[-1]
    return base64.urlsafe_b64encode(json.dumps([last.created, last.id]).encode()).decode()


def read_cursor(text: str) -> tuple[float, TurnId]:
    """The time and the id of the last memory of the page before."""
    try:
        created, turn_id = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError) as err:
        raise bad_cursor() from err
    if not isinstance(created, int | float) or not isinstance(turn_id, str) or not math.isfinite(created):
        raise bad_cursor()
    return float(created), TurnId(turn_id)


def bad_cursor() -> RequestError:
    """The answer to what was made up."""
    return RequestError(400, "this is no cursor that a list answered with", param="cursor")
