"""``AgentMemory``: what one user, agent or session has lived through, to search and to answer with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, get_args

from kv_agent.chunks import EVERY_TURN, ChunkKey, Scope, TurnFilter, TurnId, TurnRecord
from kv_agent.engines.base import Call, Reuse
from kv_agent.errors import ConfigError
from kv_agent.manager import Backend, CacheManager
from kv_agent.placing import Quality
from kv_agent.planning import build_prompt
from kv_agent.retrieval.sketches import from_sketch
from kv_agent.searching import Found, Mode, Request, Voice, VoiceName, find_turns
from kv_agent.storage.catalog import Catalog

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
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    voices: Mapping[VoiceName, Voice] = field(default_factory=dict)
    neighbour_of: TurnId | None = None


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


class AgentMemory:
    """Memory of one scope: everything stored is marked with it, everything found lies within ``share``.

    ``share`` says how far it reads: all agents of the user (default), this agent only, or this session
    only. Without ``cache_manager`` it opens its own, and closes it; further keywords then go there.
    """

    def __init__(
        self,
        cache_manager: CacheManager | None = None,
        *,
        user_id: str = "default",
        agent_id: str | None = None,
        session_id: str | None = None,
        namespace: str = "default",
        share: Share = "user",
        system_prompt: str | None = None,
        backend: Backend = "auto",
        **manager_options: Any,
    ) -> None:
        self.scope = Scope(namespace=namespace, user_id=user_id, agent_id=agent_id, session_id=session_id)
        self._reading = _reading_scope(self.scope, share)
        self._system_prompt = system_prompt
        if cache_manager is not None and (manager_options or backend != "auto"):
            raise ConfigError("backend and engine options belong to the CacheManager; give them there")
        self._own = cache_manager is None
        self._manager = cache_manager or CacheManager(backend=backend, **manager_options)
        self._manager.attach(self.scope)

    def store(
        self,
        prompt: str,
        response: str = "",
        *,
        metadata: Mapping[str, str | int | float | bool] | None = None,
        ttl_s: float | None = None,
    ) -> TurnId | None:
        """Compute this turn once and keep its KV; ``None`` if it could not be captured.

        It is forgotten after ``ttl_s`` seconds, if that is given. Storing it again may prolong its time.
        """
        return self._manager.store_kv(
            prompt,
            response,
            scope=self.scope,
            system_prompt=self._system_prompt,
            metadata=metadata,
            ttl_s=ttl_s,
        )

    def retrieve(
        self,
        query: str,
        top_k: int = 5,
        mode: Mode = "hybrid",
        *,
        only: TurnFilter = EVERY_TURN,
        neighbours: int = 0,
        explain: bool = False,
    ) -> list[Memory]:
        """The stored turns that fit ``query`` best, best first.

        ``mode`` says what is compared, and what ``Memory.score`` is: ``"latent"`` the model's own keys (the
        part of the query's tokens that a memory wins), ``"lexical"`` the words (BM25; the model is not
        asked), ``"hybrid"`` both, and the manager's ``embedder`` (their reciprocal ranks added up). ``only``
        narrows by time and metadata. Behind the ``top_k`` come, oldest first, up to ``neighbours`` turns
        before and after each of them in its session. ``explain`` fills ``Memory.voices``. An empty query
        finds nothing.
        """
        request = Request(query=query, scope=self._reading, top_k=top_k, mode=mode, only=only)
        if neighbours < 0:
            raise ConfigError(f"neighbours must be >= 0, got {neighbours}")
        self._manager.catch_up()
        catalog = self._manager.store.catalog
        found = find_turns(self._manager.library, self._probe, request)
        memories = [_memory(one.turn, one.score, voices=one.voices if explain else {}) for one in found]
        return memories + _beside(found, catalog, self._reading, neighbours)

    def generate(
        self,
        query: str,
        top_k: int = 5,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        store: bool = True,
        mode: Mode = "hybrid",
        only: TurnFilter = EVERY_TURN,
        neighbours: int = 0,
        quality: Quality = "fast",
    ) -> Answer:
        """Answer ``query`` with the ``top_k`` best memories put back as KV in front of it.

        The memories' tokens are part of the prompt; what cannot be re-injected is computed. Longer texts
        within ``query`` that are part of a memory, a document say, are put back, too. With ``store`` the
        question and its answer become a memory. With ``top_k`` 0 nothing is searched; ``mode``, ``only`` and
        ``neighbours``: see :meth:`retrieve`. ``quality`` says what is put back: everything as it was computed
        elsewhere (``"fast"``), with the first tenth of each moved text computed in its place
        (``"balanced"``; the first time with the same texts that takes a short request for each), or only what
        is bit-identical to computing it (``"exact"``).
        """
        if quality not in get_args(Quality):
            raise ConfigError(f'quality must be "fast", "balanced" or "exact", got {quality!r}')
        started = time.perf_counter()
        memories = self.retrieve(query, top_k, mode, only=only, neighbours=neighbours) if top_k else []
        self._manager.catch_up()
        self._manager.ensure_prefix(self.scope, self._system_prompt)
        if quality != "exact":
            self._manager.ensure_opening(self.scope)
        manager = self._manager
        by_id = {memory.id: memory for memory in memories}
        turns = manager.store.catalog.turns(by_id)
        keys = [key for turn in turns.values() for key in turn.chunk_keys]
        prompt = build_prompt(
            manager.prefix_records(self.scope, self._system_prompt),
            [turns[memory.id] for memory in memories if memory.id in turns],
            manager.chunk_records(keys),
            manager.prompts.fresh(query),
            max_prompt_tokens=manager.max_model_len - max_tokens,
            bare_prefix=manager.prompts.prefix(self._system_prompt),
        )
        manager.check_length(len(prompt.token_ids) + max_tokens, "the query with its answer")
        prompt = manager.placed(prompt, self.scope, self._reading, quality)
        searched_s = time.perf_counter() - started
        completion = manager.run(
            Call(
                token_ids=prompt.token_ids,
                max_tokens=max_tokens,
                temperature=temperature,
                cache_salt=prompt.salt(self.scope),
                options={
                    "scope": self.scope.to_dict(),
                    "store": store,
                    "content_start": prompt.fresh_start,
                    "plan": prompt.options(),
                },
            )
        )
        return Answer(
            text=completion.text.strip(),
            reuse=completion.reuse,
            memories=tuple(by_id[turn.turn_id] for turn in prompt.turns),
            turn_id=completion.turn_id,
            ttft_s=searched_s + completion.ttft_s,
        )

    def get(self, memory_id: TurnId) -> Memory | None:
        """One memory by its id, ``None`` if this scope has none such."""
        self._manager.catch_up()
        turn = self._manager.store.catalog.turns([memory_id]).get(memory_id)
        return _memory(turn, None) if turn is not None and self._reading.admits(turn.scope) else None

    def list(self, limit: int = 100, before: float | None = None) -> list[Memory]:
        """The newest memories of this scope; page on with ``before=memories[-1].created``."""
        self._manager.catch_up()
        turns = self._manager.store.catalog.list_turns(self._reading, limit, before)
        return [_memory(turn, None) for turn in turns]

    def forget(self, memory_ids: Sequence[TurnId]) -> int:
        """Remove memories and their KV for good; returns how many of these ids were in scope."""
        self._manager.catch_up()
        turns = self._manager.store.catalog.turns(memory_ids)
        mine = [turn_id for turn_id, turn in turns.items() if self._reading.admits(turn.scope)]
        self._manager.store.forget(mine)
        return len(mine)

    def close(self) -> None:
        """Close the cache manager if this memory opened it."""
        if self._own:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _probe(self, query: str) -> Any:
        """Keys of the query's tokens, from its own prefill."""
        prefix = self._manager.prompts.prefix(self._system_prompt)
        fresh = self._manager.prompts.fresh(query)
        token_ids = prefix + fresh.token_ids
        self._manager.check_length(len(token_ids) + 2, "the query")
        probe = {"start": len(prefix) + fresh.start, "end": len(prefix) + fresh.end}
        # What a prefill computed reaches its own answer only if the request lives one step longer.
        completion = self._manager.run(
            Call(token_ids=token_ids, max_tokens=2, ignore_eos=True, options={"probe": probe})
        )
        if completion.probe is None:
            raise ConfigError("the engine returned no probe; is it running with the kv_agent plugin?")
        return from_sketch(completion.probe)


def _reading_scope(scope: Scope, share: Share) -> Scope:
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


def _beside(found: Sequence[Found], catalog: Catalog, reading: Scope, num_turns: int) -> list[Memory]:
    """Neighbours of what was found that ``reading`` admits, each once, oldest first."""
    if num_turns == 0:
        return []
    seen = {one.turn.turn_id for one in found}
    beside: list[Memory] = []
    for one in found:
        for turn in catalog.neighbours(one.turn, num_turns):
            if turn.turn_id not in seen and reading.admits(turn.scope):
                seen.add(turn.turn_id)
                beside.append(_memory(turn, None, neighbour_of=one.turn.turn_id))
    return sorted(beside, key=lambda memory: memory.created)


def _memory(
    turn: TurnRecord,
    score: float | None,
    *,
    voices: Mapping[VoiceName, Voice] = MappingProxyType({}),
    neighbour_of: TurnId | None = None,
) -> Memory:
    return Memory(
        id=turn.turn_id,
        text=turn.text,
        score=score,
        tokens=turn.num_tokens,
        chunk_ids=turn.chunk_keys,
        scope=turn.scope,
        created=turn.created,
        expires=turn.expires,
        metadata=turn.metadata,
        voices=voices,
        neighbour_of=neighbour_of,
    )
