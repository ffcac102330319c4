"""What is known of one request while it is in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from kv_agent.chunks import Scope
from kv_agent.config import RequestOptions
from kv_agent.vllm_plugin.chains import ChainIndex
from kv_agent.vllm_plugin.plan import CheckedPlan
from kv_agent.vllm_plugin.resolver import Resolved


class EngineRequest(Protocol):
    """The part of vLLM's ``Request`` that decisions need."""

    request_id: str
    prompt_token_ids: list[int] | None
    num_prompt_tokens: int
    num_computed_tokens: int
    cache_salt: str | None
    kv_transfer_params: dict[str, Any] | None
    lora_request: Any
    mm_features: list[Any]
    prompt_embeds: Any

    @property
    def all_token_ids(self) -> Sequence[int]: ...


@dataclass(slots=True, kw_only=True)
class RequestState:
    """One request while it is in the engine."""

    options: RequestOptions
    scope: Scope
    prompt: list[int]
    salt: str | None
    resolved: Future[Resolved] | None = None
    resolve_deadline: float = 0.0
    plan: CheckedPlan
    known: ChainIndex = field(default_factory=ChainIndex)
    asked: bool = False  # vLLM looked for cached tokens and has not admitted the request since
    local: int = 0  # tokens of vLLM's own prefix cache at the last look-up
    cached_end: int = 0  # end of the tokens cached at admission: the local hit and what we load behind it
    trusted: bool = True  # whether the local hit surely holds what the plan says
    pays: bool | None = None  # whether to load, once that was decided
    at_once: bool = False  # whether the step that lets it in puts back what is in memory
    probe: bytes | None = None
    error: str | None = None
