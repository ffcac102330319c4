"""What memory needs of an engine, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kv_agent.chunks import ChunkKey, Fingerprint, TurnId


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A chunk that was asked for and computed instead."""

    chunk_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """Where the KV of a prompt's tokens came from.

    ``exact`` and ``adapted`` were re-injected, ``local`` were in the engine's own prefix cache,
    ``computed`` were computed. The four add up to the prompt.
    """

    exact: int = 0
    adapted: int = 0
    local: int = 0
    computed: int = 0
    chunk_ids: tuple[ChunkKey, ...] = ()
    refused: tuple[Refused, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to an engine. ``options`` are the plugin's request fields."""

    token_ids: tuple[int, ...]
    max_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came of a :class:`Call`. ``probe``: keys by token, see ``retrieval.sketches``."""

    text: str
    token_ids: tuple[int, ...]
    reuse: Reuse
    turn_id: TurnId | None
    probe: bytes | None
    ttft_s: float
    logprobs: tuple[Mapping[int, float], ...] = ()


class Engine(Protocol):
    """Runs token sequences and, through the plugin, captures, probes and re-injects their KV."""

    @property
    def fingerprint(self) -> Fingerprint: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_model_len(self) -> int: ...
    def run(self, calls: Sequence[Call]) -> list[Completion]: ...
    def close(self) -> None: ...
