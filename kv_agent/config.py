"""Configuration and request fields as they enter from outside: parsed once, unknown keys are errors.

``PluginConfig`` is the object under ``kv_agent`` in vLLM's ``kv_connector_extra_config``;
``RequestOptions`` is the object under ``kv_agent`` in a request's ``kv_transfer_params``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kv_agent.chunks import CodecName, Scope
from kv_agent.errors import ConfigError

STORE_ENV = "KV_AGENT_STORE"

# Whether a turn that was stored survives a power loss. It survives the process in any case.
Fsync = Literal["always", "never"]

# See kv_agent.storage.policy, which has their classes.
PolicyName = Literal["lru", "fifo", "importance"]

ChunkId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(min_length=1, max_length=256)]
M = TypeVar("M", bound=BaseModel)


def default_store_dir() -> Path:
    """``KV_AGENT_STORE`` if set, else ``kv_agent`` in the user's cache folder."""
    if chosen := os.environ.get(STORE_ENV):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError:  # no home folder, as in some containers
        base = Path(tempfile.gettempdir())
    return base / "kv_agent"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PluginConfig(_Strict):
    """Settings of the connector, the same for scheduler and workers.

    ``device_bytes``, ``host_bytes`` and ``warm_bytes`` bound the chunks kept in GPU memory, in host memory
    and, compressed, there; ``None`` fits the machine, see :func:`kv_agent.machine.memory_budgets`. A chunk
    moves up among them once it was asked for ``promote_after`` times. ``queue_bytes`` bounds what waits to be
    written. ``codec`` is how KV is written from now on, whatever is stored already.
    With ``fsync`` ``"never"`` storing does not wait for the disk, and a power loss may cost the newest turns.
    ``policy`` says who goes first where there is no room, unless a namespace names its own. ``disk_bytes``
    bounds the store's files; ``None`` is most of what is free. Without ``make_room`` another process lets
    memories go that exceed the limits. With ``load`` ``"faster"`` KV is put back only where that took less
    time lately than computing its tokens. ``pooled_layers`` are the layers whose keys a search compares.
    """

    store: Path = Field(default_factory=default_store_dir)
    codec: CodecName = "raw"
    fsync: Fsync = "always"
    chunk_tokens: int = Field(default=128, ge=1, le=65_536)
    device_bytes: int = Field(default=0, ge=0)
    host_bytes: int | None = Field(default=None, ge=0)
    warm_bytes: int | None = Field(default=None, ge=0)
    promote_after: int = Field(default=1, ge=1, le=100)
    queue_bytes: int = Field(default=512 << 20, gt=0)
    policy: PolicyName = "lru"
    disk_bytes: int | None = Field(default=None, gt=0)
    make_room: bool = True
    pooled_layers: tuple[int, ...] = Field(default=(0,), min_length=1)
    load_threads: int = Field(default=4, ge=1, le=64)
    load: Literal["always", "faster"] = "always"


class Placement(_Strict):
    """Put chunk ``chunk_id``, but for its first ``skip`` tokens, at token positions from ``start`` on."""

    chunk_id: ChunkId
    start: int = Field(ge=0)
    skip: int = Field(default=0, ge=0)


class PlanOptions(_Strict):
    """Which chunks go where; tokens from ``fresh_start`` on are the fresh turn, always computed."""

    placements: tuple[Placement, ...] = Field(max_length=65_536)
    fresh_start: int = Field(ge=0)


class ProbeOptions(_Strict):
    """Return the pre-RoPE keys of prompt tokens ``[start, end)``; ``end`` defaults to the prompt's."""

    start: int = Field(default=0, ge=0)
    end: int | None = Field(default=None, gt=0)


class ScopeOptions(_Strict):
    """A :class:`Scope` as it comes in a request."""

    namespace: Name = "default"
    user_id: Name = "default"
    agent_id: Name | None = None
    session_id: Name | None = None

    def to_scope(self) -> Scope:
        return Scope(**self.model_dump())


class RequestOptions(_Strict):
    """What one request asks of the plugin.

    ``content_start`` says where the turn's own content begins: tokens before it (a system prompt,
    say) are stored as context but never returned by a search. Without it the new tokens are the content.
    ``ttl_s`` seconds after it was captured the turn is forgotten. With ``part_of`` (all chunks of a stored
    turn of this very scope, in order) the new tokens become no turn: they are kept with that one, and go with
    it.
    """

    scope: ScopeOptions | None = None
    store: bool = True
    content_start: int | None = Field(default=None, ge=0)
    metadata: dict[str, str | int | float | bool] = Field(default_factory=dict)
    part_of: tuple[ChunkId, ...] = Field(default=(), max_length=65_536)
    ttl_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    plan: PlanOptions | None = None
    probe: ProbeOptions | None = None


def parse(model: type[M], raw: Mapping[str, Any] | None, where: str) -> M:
    """Validate ``raw``; raises :class:`ConfigError` naming the field and the place it came from."""
    try:
        return model.model_validate(dict(raw or {}))
    except ValidationError as err:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in err.errors())
        known = ", ".join(model.model_fields)
        raise ConfigError(f"{where}: {problems} (known keys: {known})") from err
