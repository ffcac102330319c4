"""``AgentMemory(base_url=...)``: the memories of a server, by HTTP."""

from __future__ import annotations

import builtins
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import httpx

from kv_agent.chunks import EVERY_TURN, Scope, TurnFilter, TurnId
from kv_agent.errors import ConfigError
from kv_agent.memories import Answer, Memory, Prepared, Search, Share, Stats, reading_scope
from kv_agent.memory import AgentMemory
from kv_agent.placing import Quality
from kv_agent.remote.exchange import Address, Ask, Pause, Reply, Steps
from kv_agent.remote.operations import Operations
from kv_agent.remote.transport import TIMEOUT_S, no_answer, reply_of, request_of, timeouts
from kv_agent.searching import Mode

T = TypeVar("T")


class RemoteMemory(AgentMemory):
    """An :class:`AgentMemory` whose engine and store are a server's; threads may share it.

    ``base_url`` is the server's, with or without ``/v1``; ``api_key`` one that ``kv-agent keys add`` made. It
    says which namespace this is; only an admin's may name another. Each part of an answer may take
    ``timeout_s`` seconds. A request that comes too often is sent again when the server says, a few times. A
    ``http_client`` of the caller's, with timeouts, proxies and certificates of its own, stays open.

    Methods raise :class:`~kv_agent.errors.ServerError` where the server cannot be reached or cannot do it,
    :class:`~kv_agent.errors.ConfigError` where it refuses. ``store`` returns when the memory is on disk.
    ``Answer.ttft_s`` is the time until the whole answer was there: it comes in one piece.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str | None = None,
        user_id: str = "default",
        agent_id: str | None = None,
        session_id: str | None = None,
        namespace: str | None = None,
        share: Share = "user",
        system_prompt: str | None = None,
        timeout_s: float = TIMEOUT_S,
        http_client: httpx.Client | None = None,
    ) -> None:
        self.scope = Scope(
            namespace=namespace or "default", user_id=user_id, agent_id=agent_id, session_id=session_id
        )
        self._address = Address.of(base_url, api_key, namespace)
        self._do = Operations(
            base_url=self._address.base_url, scope=self.scope, share=share, system_prompt=system_prompt
        )
        reading_scope(self.scope, share)  # now, not at the first request
        self._own = http_client is None
        self._client = http_client or httpx.Client(timeout=timeouts(timeout_s))

    def store(
        self,
        prompt: str,
        response: str = "",
        *,
        metadata: Mapping[str, str | int | float | bool] | None = None,
        ttl_s: float | None = None,
    ) -> TurnId | None:
        return self._run(self._do.store(prompt, response, metadata, ttl_s))

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
        return self._run(self._do.search(query, top_k, mode, only, neighbours, explain, peek))

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
        started = time.perf_counter()
        asked = self._do.generate(
            query, top_k, max_tokens, temperature, store, mode, only, neighbours, quality
        )
        answer = self._run(asked)
        return replace(answer, ttft_s=time.perf_counter() - started)

    def prepare(self, *_: Any, **__: Any) -> Prepared:
        """Not here: a server prepares prompts itself, see :meth:`generate`."""
        raise ConfigError("a server prepares prompts itself; ask it to generate")

    def get(self, memory_id: TurnId) -> Memory | None:
        return self._run(self._do.get(memory_id))

    def list(
        self, limit: int = 100, before: float | None = None, before_id: TurnId | None = None
    ) -> builtins.list[Memory]:
        return self._run(self._do.list(limit, before, before_id))

    def forget(self, memory_ids: Sequence[TurnId]) -> int:
        return self._run(self._do.forget(memory_ids))

    def pin(self, memory_id: TurnId) -> bool:
        return self._run(self._do.pin(memory_id, True))

    def unpin(self, memory_id: TurnId) -> bool:
        return self._run(self._do.pin(memory_id, False))

    def stats(self) -> Stats:
        return self._run(self._do.stats())

    def close(self) -> None:
        """Close the connections, unless they are those of the caller's ``http_client``."""
        if self._own:
            self._client.close()

    def _run(self, steps: Steps[T]) -> T:
        reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                reply = None
            else:
                reply = self._send(step)

    def _send(self, ask: Ask) -> Reply:
        try:
            return reply_of(self._client.send(request_of(self._client, self._address, ask)))
        except (httpx.HTTPError, httpx.InvalidURL) as err:
            raise no_answer(self._address, err) from err
