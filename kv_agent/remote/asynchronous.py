"""``AsyncAgentMemory``: the memories of a server for programs that run on an event loop."""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar

import httpx

from kv_agent.chunks import EVERY_TURN, Scope, TurnFilter, TurnId
from kv_agent.memories import Answer, Memory, Search, Share, Stats, reading_scope
from kv_agent.placing import Quality
from kv_agent.remote.exchange import Address, Ask, Pause, Reply, Steps
from kv_agent.remote.operations import Operations
from kv_agent.remote.transport import TIMEOUT_S, no_answer, reply_of, request_of, timeouts
from kv_agent.searching import Mode

T = TypeVar("T")


class AsyncAgentMemory:
    """The methods of :class:`~kv_agent.memory.AgentMemory` as coroutines, on a server.

    Its keywords are those of :class:`~kv_agent.remote.memory.RemoteMemory`, with an ``httpx.AsyncClient``.
    Use it in an ``async with``, or close it; any number of tasks may share it.
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
        http_client: httpx.AsyncClient | None = None,
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
        self._client = http_client or httpx.AsyncClient(timeout=timeouts(timeout_s))

    async def store(
        self,
        prompt: str,
        response: str = "",
        *,
        metadata: Mapping[str, str | int | float | bool] | None = None,
        ttl_s: float | None = None,
    ) -> TurnId | None:
        """See :meth:`AgentMemory.store`."""
        return await self._run(self._do.store(prompt, response, metadata, ttl_s))

    async def retrieve(
        self,
        query: str,
        top_k: int = 5,
        mode: Mode = "hybrid",
        *,
        only: TurnFilter = EVERY_TURN,
        neighbours: int = 0,
        explain: bool = False,
    ) -> builtins.list[Memory]:
        """See :meth:`AgentMemory.retrieve`."""
        found = await self._run(self._do.search(query, top_k, mode, only, neighbours, explain))
        return list(found.memories)

    async def search(
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
        """See :meth:`AgentMemory.search`."""
        return await self._run(self._do.search(query, top_k, mode, only, neighbours, explain, peek))

    async def generate(
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
        """See :meth:`AgentMemory.generate`."""
        started = time.perf_counter()
        asked = self._do.generate(
            query, top_k, max_tokens, temperature, store, mode, only, neighbours, quality
        )
        answer = await self._run(asked)
        return replace(answer, ttft_s=time.perf_counter() - started)

    async def get(self, memory_id: TurnId) -> Memory | None:
        """See :meth:`AgentMemory.get`."""
        return await self._run(self._do.get(memory_id))

    async def list(
        self, limit: int = 100, before: float | None = None, before_id: TurnId | None = None
    ) -> builtins.list[Memory]:
        """See :meth:`AgentMemory.list`."""
        return await self._run(self._do.list(limit, before, before_id))

    async def forget(self, memory_ids: Sequence[TurnId]) -> int:
        """See :meth:`AgentMemory.forget`."""
        return await self._run(self._do.forget(memory_ids))

    async def pin(self, memory_id: TurnId) -> bool:
        """See :meth:`AgentMemory.pin`."""
        return await self._run(self._do.pin(memory_id, True))

    async def unpin(self, memory_id: TurnId) -> bool:
        """See :meth:`AgentMemory.unpin`."""
        return await self._run(self._do.pin(memory_id, False))

    async def stats(self) -> Stats:
        """See :meth:`AgentMemory.stats`."""
        return await self._run(self._do.stats())

    async def close(self) -> None:
        """Close the connections, unless they are those of the caller's ``http_client``."""
        if self._own:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                reply = None
            else:
                reply = await self._send(step)

    async def _send(self, ask: Ask) -> Reply:
        try:
            return reply_of(await self._client.send(request_of(self._client, self._address, ask)))
        except (httpx.HTTPError, httpx.InvalidURL) as err:
            raise no_answer(self._address, err) from err
