"""``AgentMemory``: what one user, agent or session has lived through, to search and to answer with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Self, get_args

from kv_agent.chunks import EVERY_TURN, Scope, TurnFilter, TurnId, TurnRecord
from kv_agent.engines.base import Call
from kv_agent.errors import ConfigError
from kv_agent.manager import Backend, CacheManager
from kv_agent.memories import Answer, Memory, Prepared, Search, Share, Stats, reading_scope
from kv_agent.placing import Quality
from kv_agent.planning import build_prompt
from kv_agent.prompting import Conversation
from kv_agent.retrieval.sketches import from_sketch
from kv_agent.searching import Found, Mode, Request, Voice, VoiceName, find_turns
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.ledger import NO_ACCOUNT


class AgentMemory:
    """Memory of one scope: everything stored is marked with it, everything found lies within ``share``.

    ``share`` says how far it reads: all agents of the user (default), this agent only, or this session
    only. Without ``cache_manager`` it opens its own, and closes it; further keywords then go there. With
    ``base_url="http://…"`` the memories are those of a server: see
    :class:`~kv_agent.remote.memory.RemoteMemory` for its keywords.
    """

    def __new__(cls, *_: Any, base_url: str | None = None, **__: Any) -> AgentMemory:
        if cls is AgentMemory and base_url is not None:
            from kv_agent.remote.memory import RemoteMemory

            return object.__new__(RemoteMemory)
        return object.__new__(cls)

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
        self._reading = reading_scope(self.scope, share)
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

        It is forgotten after ``ttl_s`` seconds, if that is given or its namespace sets it. Storing it again
        may prolong its time.
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
        finds nothing. What is found counts as used.
        """
        found = self.search(query, top_k, mode, only=only, neighbours=neighbours, explain=explain)
        return list(found.memories)

    def search(
        self,
        query: str,
        top_k: int = 5,
        mode: Mode = "hybrid",
        *,
        only: TurnFilter = EVERY_TURN,
        neighbours: int = 0,
        explain: bool = False,
        peek: bool = False,
    ) -> Search:
        """As :meth:`retrieve`, with what it took; with ``peek`` what is found does not count as used."""
        found = self._found(query, top_k, mode, only, neighbours, explain)
        if not peek:
            self._manager.note_use(memory.id for memory in found.memories)
        return found

    def _found(
        self, query: str, top_k: int, mode: Mode, only: TurnFilter, neighbours: int, explain: bool = False
    ) -> Search:
        request = Request(query=query, scope=self._reading, top_k=top_k, mode=mode, only=only)
        if neighbours < 0:
            raise ConfigError(f"neighbours must be >= 0, got {neighbours}")
        self._manager.catch_up()
        catalog = self._manager.store.catalog
        probe_s = 0.0

        def probe(query: str) -> Any:
            nonlocal probe_s
            started = time.perf_counter()
            keys_tV = self._probe(query)
            probe_s = time.perf_counter() - started
            return keys_tV

        found = find_turns(self._manager.library, probe, request)
        memories = [_memory(one.turn, one.score, voices=one.voices if explain else {}) for one in found]
        memories += _beside(found, catalog, self._reading, neighbours)
        return Search(memories=tuple(memories), probe_s=probe_s)

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
        manager = self._manager
        memories = self._found(query, top_k, mode, only, neighbours).memories if top_k else ()
        conversation = Conversation(
            prefix=manager.prompts.prefix(self._system_prompt),
            turns=manager.prompts.fresh(query).token_ids,
            last_start=0,
        )
        prepared = self.prepare(conversation, memories, max_tokens=max_tokens, quality=quality, store=store)
        searched_s = time.perf_counter() - started
        completion = manager.run(
            Call(
                token_ids=prepared.token_ids,
                max_tokens=max_tokens,
                temperature=temperature,
                cache_salt=prepared.cache_salt,
                options=prepared.options,
            )
        )
        manager.note_use(holding=completion.reuse.chunk_ids)
        return Answer(
            text=completion.text.strip(),
            reuse=completion.reuse,
            memories=prepared.memories,
            turn_id=completion.turn_id,
            ttft_s=searched_s + completion.ttft_s,
        )

    def prepare(
        self,
        conversation: Conversation,
        memories: Sequence[Memory],
        *,
        max_tokens: int,
        quality: Quality = "fast",
        store: bool = True,
        metadata: Mapping[str, str | int | float | bool] | None = None,
        ttl_s: float | None = None,
    ) -> Prepared:
        """A prompt with the best of ``memories`` (given best first) between its prefix and its turns.

        As many as fit beside an answer of ``max_tokens``. See :meth:`generate` for the rest.
        """
        manager = self._manager
        manager.catch_up()
        manager.ensure_prefix(self.scope, conversation.prefix)
        if quality != "exact":
            manager.ensure_opening(self.scope)
        by_id = {memory.id: memory for memory in memories}
        turns = manager.store.catalog.turns(by_id)
        keys = [key for turn in turns.values() for key in turn.chunk_keys]
        prompt = build_prompt(
            manager.prefix_records(self.scope, conversation.prefix),
            [turns[memory.id] for memory in memories if memory.id in turns],
            manager.chunk_records(keys),
            conversation.turns,
            max_prompt_tokens=manager.max_model_len - max_tokens,
            bare_prefix=conversation.prefix,
        )
        manager.check_length(len(prompt.token_ids) + max_tokens, "the query with its answer")
        prompt = manager.placed(prompt, self.scope, self._reading, quality)
        return Prepared(
            token_ids=prompt.token_ids,
            cache_salt=prompt.salt(self.scope),
            options={
                "scope": self.scope.to_dict(),
                "store": store,
                "content_start": prompt.fresh_start + conversation.last_start,
                "plan": prompt.options(),
                "metadata": dict(metadata or {}),
                "ttl_s": ttl_s,
            },
            memories=tuple(by_id[turn.turn_id] for turn in prompt.turns),
        )

    def get(self, memory_id: TurnId) -> Memory | None:
        """One memory by its id, ``None`` if this scope has none such."""
        self._manager.catch_up()
        turn = self._manager.store.catalog.turns([memory_id]).get(memory_id)
        return _memory(turn, None) if turn is not None and self._reading.admits(turn.scope) else None

    def list(
        self, limit: int = 100, before: float | None = None, before_id: TurnId | None = None
    ) -> list[Memory]:
        """The newest memories of this scope.

        Page on with ``before=memories[-1].created, before_id=memories[-1].id``.
        """
        self._manager.catch_up()
        turns = self._manager.store.catalog.list_turns(self._reading, limit, before, before_id)
        return [_memory(turn, None) for turn in turns]

    def forget(self, memory_ids: Sequence[TurnId]) -> int:
        """Remove memories and their KV for good; returns how many of these ids were in scope."""
        self._manager.catch_up()
        turns = self._manager.store.catalog.turns(memory_ids)
        mine = [turn_id for turn_id, turn in turns.items() if self._reading.admits(turn.scope)]
        self._manager.store.forget(mine)
        return len(mine)

    def pin(self, memory_id: TurnId) -> bool:
        """Keep a memory whatever its time to live and the limits are; ``False`` if this scope has none such.

        Only :meth:`forget` removes it then.
        """
        return self._set_pinned(memory_id, True)

    def unpin(self, memory_id: TurnId) -> bool:
        """Let a memory go again as any other; ``False`` if this scope has none such."""
        return self._set_pinned(memory_id, False)

    def _set_pinned(self, memory_id: TurnId, pinned: bool) -> bool:
        if self.get(memory_id) is None:
            return False
        self._manager.store.catalog.ledger.pin([memory_id], pinned)
        return True

    def stats(self) -> Stats:
        """What this memory's namespace holds and may hold, all of its users together."""
        ledger = self._manager.store.catalog.ledger
        account = ledger.accounts().get(self.scope.namespace, NO_ACCOUNT)
        return Stats(
            namespace=self.scope.namespace,
            memories=account.held.num_memories,
            tokens=account.held.num_tokens,
            num_bytes=account.held.num_bytes,
            evicted=account.evicted_turns,
            refused=account.refused_turns,
            limits=ledger.retention(self.scope.namespace),
        )

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
        pinned=turn.pinned,
        metadata=turn.metadata,
        voices=voices,
        neighbour_of=neighbour_of,
    )
