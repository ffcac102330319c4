"""From a rendered prompt to the same prompt with memories in it. Blocks: never call it on an event loop."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kv_agent.chunks import Scope, TurnId
from kv_agent.engines.vllm_calls import PLUGIN_KEY
from kv_agent.manager import CacheManager
from kv_agent.memories import Memory, Prepared
from kv_agent.memory import AgentMemory
from kv_agent.prompting import Conversation
from kv_agent.serving.events import Event
from kv_agent.serving.metrics import ServerMetrics
from kv_agent.serving.schemas import MemoryField
from kv_agent.vllm_plugin.signing import signed, signing_key

# What is kept free for the answer where the client does not say how long it may be.
ANSWER_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """A prompt with memories. ``room`` is how many tokens of an answer fit behind it."""

    scope: Scope
    prepared: Prepared
    room: int

    @property
    def memories(self) -> tuple[Memory, ...]:
        return self.prepared.memories

    def applied(self, prompt: Mapping[str, Any], params: Any) -> tuple[dict[str, Any], Any]:
        """vLLM's prompt and sampling parameters, with these tokens and what the plugin must know."""
        salt = self.prepared.cache_salt
        if own := prompt.get("cache_salt"):
            salt = f"{salt}/{own}"  # who asked not to share the prefix cache still does not
        changed = {**prompt, "prompt_token_ids": list(self.prepared.token_ids), "cache_salt": salt}
        changed.pop("prompt", None)  # its text, which is no longer that of its tokens
        params = params.clone()
        extra = dict(params.extra_args or {})
        transfer = dict(extra.get("kv_transfer_params") or {})
        transfer[PLUGIN_KEY] = signed(self.prepared.options, signing_key())
        params.extra_args = {**extra, "kv_transfer_params": transfer}
        params.max_tokens = self.room if params.max_tokens is None else min(params.max_tokens, self.room)
        return changed, params


class Recall:
    """Searches and places memories for one server's requests. Thread-safe."""

    def __init__(self, manager: CacheManager, metrics: ServerMetrics) -> None:
        self._manager = manager
        self._metrics = metrics

    def __call__(
        self,
        namespace: str,
        wanted: MemoryField,
        query: str | None,
        token_ids: Sequence[int],
        *,
        is_under_way: bool,
        max_tokens: int | None,
    ) -> Recalled:
        """``query`` is looked for, or what the prompt's last turn says; raises errors of ours.

        Of a turn that is under way the earlier steps are in the prompt: memories of just this question are
        left out.
        """
        manager = self._manager
        memory = AgentMemory(
            manager,
            namespace=namespace,
            user_id=wanted.user_id,
            agent_id=wanted.agent_id,
            session_id=wanted.session_id,
            share=wanted.share,
        )
        conversation = manager.prompts.conversation(token_ids, query)
        found: Sequence[Memory] = ()
        if wanted.top_k:
            asked = query if query is not None else self._last_words(conversation)
            started = time.perf_counter()
            search = memory.search(
                asked,
                wanted.top_k,
                wanted.mode,
                only=wanted.filters.turn_filter,
                neighbours=wanted.neighbours,
            )
            self._metrics.searched(wanted.mode, time.perf_counter() - started, search.probe_s)
            found = [one for one in search.memories if not (is_under_way and _asks(one, asked))]
        left = manager.max_model_len - len(token_ids)
        reserved = max(1, min(left, ANSWER_TOKENS if max_tokens is None else max_tokens))
        prepared = memory.prepare(
            conversation,
            self._not_said(found, conversation),
            max_tokens=reserved,
            quality=wanted.quality,
            store=wanted.store,
            metadata=wanted.metadata,
            ttl_s=wanted.ttl_s,
        )
        room = manager.max_model_len - len(prepared.token_ids)
        return Recalled(scope=memory.scope, prepared=prepared, room=room)

    def done(self, recalled: Recalled, answer: Mapping[str, Any], publish: Callable[[Event], None]) -> None:
        """Note what an answer reused and that its turn is being stored. Does not block."""
        self._manager.note_use(holding=answer.get("chunk_ids", ()))
        if turn_id := answer.get("turn_id"):
            self._manager.expect(TurnId(turn_id))
        if recalled.memories:
            counts = {name: answer.get(name) for name in ("exact", "adapted", "local", "computed")}
            ids = tuple(memory.id for memory in recalled.memories)
            publish(Event(kind="injected", scope=recalled.scope, ids=ids, details=counts))

    def _last_words(self, conversation: Conversation) -> str:
        ids = conversation.turns[conversation.last_start :]
        return self._manager.prompts.text_of(ids)

    def _not_said(self, found: Sequence[Memory], conversation: Conversation) -> list[Memory]:
        """Without what the conversation itself holds: clients send earlier turns again."""
        said = array("i", conversation.turns).tobytes()
        keys = [key for memory in found for key in memory.chunk_ids]
        chunks = self._manager.chunk_records(keys)

        def is_said(memory: Memory) -> bool:
            ids = array("i", [i for key in memory.chunk_ids if key in chunks for i in chunks[key].token_ids])
            return bool(ids) and _stands_in(ids.tobytes(), said)

        return [memory for memory in found if not is_said(memory)]


def _asks(memory: Memory, question: str) -> bool:
    """Whether a memory holds this question, as lines of their own."""
    return f"\n{question.strip()}\n" in f"\n{memory.text}\n"


def _stands_in(part: bytes, whole: bytes) -> bool:
    """Whether the tokens are somewhere among the others; both are 32-bit integers."""
    at = whole.find(part)
    while at % 4 and at >= 0:
        at = whole.find(part, at + 1)
    return at >= 0
