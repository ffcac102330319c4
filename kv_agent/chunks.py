"""Values everyone may import: scopes, keys, chunk and turn records. No tensors, no I/O.

Keys are 128-bit BLAKE2b digests in hexadecimal. A *chain key* names tokens in their context, so equal
chain keys mean bit-identical KV; a *content key* names the tokens alone.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NewType

from kv_agent.errors import ConfigError

Fingerprint = NewType("Fingerprint", str)
ChunkKey = NewType("ChunkKey", str)
ContentKey = NewType("ContentKey", str)
TurnId = NewType("TurnId", str)

_DIGEST_BYTES = 16

CodecName = Literal["raw", "raw+zstd", "int8", "int8+zstd", "int4", "int4+zstd"]
RAW: CodecName = "raw"  # KV that is stored as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Whose memory this is. Look-ups never leave ``namespace`` and ``user_id``; the rest narrows."""

    namespace: str = "default"
    user_id: str = "default"
    agent_id: str | None = None
    session_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("namespace", "user_id"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must be a non-empty string")
        for name in ("agent_id", "session_id"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} must be a non-empty string, or None for all")

    def to_dict(self) -> dict[str, str | None]:
        """As request fields."""
        return asdict(self)

    def admits(self, other: Scope) -> bool:
        """Whether a look-up in this scope may see something stored in ``other``."""
        return (
            self.namespace == other.namespace
            and self.user_id == other.user_id
            and self.agent_id in (None, other.agent_id)
            and self.session_id in (None, other.session_id)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFilter:
    """Turns created from ``since`` to before ``until`` (Unix time) that have all this ``metadata``."""

    since: float | None = None
    until: float | None = None
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def admits_all(self) -> bool:
        return self.since is None and self.until is None and not self.metadata


EVERY_TURN = TurnFilter()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRecord:
    """One stored chunk without its tensor: what the catalog knows about it.

    ``start`` is the position of its first token when it was computed. ``parent`` is the chain key of its
    context. The bytes are tensor ``tensor`` in file ``blob`` (relative to the store), written by ``codec``.
    """

    key: ChunkKey
    content_key: ContentKey
    parent: ChunkKey
    fingerprint: Fingerprint
    namespace: str
    user_id: str
    start: int
    token_ids: tuple[int, ...]
    blob: str
    tensor: str
    checksum: str
    num_bytes: int
    codec: str = RAW
    quarantined: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_lossless(self) -> bool:
        return self.codec.partition("+")[0] == RAW

    def stands(self, context: ChunkKey, start: int) -> bool:
        """Whether it was computed behind ``context`` and at position ``start``."""
        return self.parent == context and self.start == start

    def is_exact(self, context: ChunkKey, start: int) -> bool:
        """Whether its KV, put there, is bit for bit what computing its tokens there gives."""
        return self.is_lossless and self.stands(context, start)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """What the user sees as one memory: a turn or an ingested document and the chunks that hold it.

    ``expires`` is when it is forgotten by itself (Unix time), ``None`` for never. While ``pinned`` it stays,
    whatever that says and the limits of its namespace are.
    """

    turn_id: TurnId
    scope: Scope
    fingerprint: Fingerprint
    chunk_keys: tuple[ChunkKey, ...]
    num_tokens: int
    text: str
    created: float
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    expires: float | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChange:
    """One step of the catalog's history that an index follows, in ``seq`` order.

    ``vector`` is the chunk's pooled keys as little-endian float32 bytes; ``None`` means the memory
    went away and must no longer be found.
    """

    seq: int
    entry_id: int
    chunk_key: ChunkKey
    content_key: ContentKey
    turn_id: TurnId
    scope: Scope
    vector: bytes | None


def _digest(kind: bytes, *parts: bytes) -> str:
    hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=kind)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as 32-bit integers; the form that keys hash and the catalog stores."""
    return array("i", token_ids).tobytes()


def tokens_from_bytes(data: bytes) -> tuple[int, ...]:
    """Inverse of :func:`token_bytes`."""
    ids = array("i")
    ids.frombytes(data)
    return tuple(ids)


def root_key(fingerprint: Fingerprint, namespace: str, user_id: str) -> ChunkKey:
    """Chain key of the empty context of one user's sequences."""
    return ChunkKey(_digest(b"root", fingerprint.encode(), namespace.encode(), user_id.encode()))


def chain_key(parent: ChunkKey, token_ids: Sequence[int]) -> ChunkKey:
    """Chain key of ``token_ids`` computed right after the context ``parent``."""
    return ChunkKey(_digest(b"chain", parent.encode(), token_bytes(token_ids)))


def adapted_key(parent: ChunkKey, moved: ChunkKey, skip: int = 0) -> ChunkKey:
    """Chain key of a context that goes on with chunk ``moved``, put there by adapted reuse.

    Its first ``skip`` tokens are left out.

    It differs from every computed context, so what is computed after it is never taken for exact KV
    of the plain token sequence.
    """
    parts = [parent.encode(), moved.encode()]
    if skip:
        parts.append(str(skip).encode())
    return ChunkKey(_digest(b"adapted", *parts))


def content_key(fingerprint: Fingerprint, token_ids: Sequence[int]) -> ContentKey:
    """Key of the same tokens in any context."""
    return ContentKey(_digest(b"content", fingerprint.encode(), token_bytes(token_ids)))
