"""Many clients of one server at once: chats with memory, queries, and listeners to its events."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIMEOUT_S = 120.0  # for each answer; a crowd on few cores waits
_CONNECTING_AT_ONCE = 20
_IDLE_S = 2.0  # less than the server waits: a request must not meet a connection that is being closed


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Somebody with a key of this namespace, and memories of their own."""

    namespace: str
    key: str
    user_id: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a member was answered, after how many seconds."""

    member: Member
    status: int
    body: Mapping[str, Any]
    retry_after_s: int | None
    took_s: float

    @property
    def report(self) -> Mapping[str, Any]:
        """What a chat reused, and the ``turn_id`` of what it stores."""
        found: Mapping[str, Any] = self.body["kv_transfer_params"]["kv_agent"]
        return found


@dataclass(slots=True)
class Heard:
    """What one listener of a namespace got: by the kind of event, how often each memory was told.

    ``others`` are namespaces of events that were none of its business, ``lost`` events that it is said to
    have missed.
    """

    namespace: str
    memories: dict[str, Counter[str]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    lost: int = 0

    def take(self, text: str) -> None:
        event = json.loads(text)
        if event["event"] == "lost":
            self.lost += event["count"]
            return
        if event["namespace"] != self.namespace:
            self.others.add(event["namespace"])
        self.memories.setdefault(event["event"], Counter()).update(event["ids"])


class Crowd:
    """Talks to one server, over as many connections as are needed at once. Made by :meth:`at`."""

    def __init__(self, http: aiohttp.ClientSession, model: str) -> None:
        self._http = http
        self._model = model

    @classmethod
    @asynccontextmanager
    async def at(cls, base_url: str) -> AsyncIterator[Crowd]:
        async with aiohttp.ClientSession(
            base_url,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            raise_for_status=False,
        ) as http:
            async with http.get("/v1/models") as answer:
                models = await answer.json()
            yield cls(http, models["data"][0]["id"])

    async def chat(self, member: Member, text: str, *, max_tokens: int = 8, top_k: int = 5) -> Answer:
        """A chat with memory; what is said becomes a memory."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "memory": {"user_id": member.user_id, "top_k": top_k},
        }
        return await self._post("/v1/chat/completions", member, body)

    async def query(self, member: Member, text: str, *, mode: str = "hybrid", top_k: int = 5) -> Answer:
        body = {"query": text, "user_id": member.user_id, "top_k": top_k, "mode": mode}
        return await self._post("/memory/query", member, body)

    async def memories(self, member: Member) -> list[str]:
        """Ids of all memories of a member, page by page."""
        ids: list[str] = []
        params = {"user_id": member.user_id, "limit": "2"}
        while True:
            async with self._http.get("/memory", params=params, headers=member.headers) as answer:
                answer.raise_for_status()
                page = await answer.json()
            ids += [memory["id"] for memory in page["memories"]]
            if page["next"] is None:
                return ids
            params["cursor"] = page["next"]

    @asynccontextmanager
    async def listening(self, members: Sequence[Member]) -> AsyncIterator[list[Heard]]:
        """A listener for each of these, until the end; all listen when this begins."""
        gate = asyncio.Semaphore(_CONNECTING_AT_ONCE)

        async def connected(member: Member) -> aiohttp.ClientWebSocketResponse:
            async with gate:
                return await self._http.ws_connect("/memory/stream", headers=member.headers)

        streams = await asyncio.gather(*map(connected, members))
        heard = [Heard(member.namespace) for member in members]
        async with asyncio.TaskGroup() as tasks:
            for stream, one in zip(streams, heard, strict=True):
                tasks.create_task(_hear(stream, one))
            yield heard
            for closing in asyncio.as_completed([stream.close() for stream in streams]):
                await closing

    async def _post(self, path: str, member: Member, body: Mapping[str, Any]) -> Answer:
        started = time.perf_counter()
        async with self._http.post(path, json=body, headers=member.headers) as answer:
            content = await answer.json()
        return Answer(
            member=member,
            status=answer.status,
            body=content,
            retry_after_s=int(answer.headers["Retry-After"]) if "Retry-After" in answer.headers else None,
            took_s=time.perf_counter() - started,
        )


async def _hear(stream: aiohttp.ClientWebSocketResponse, heard: Heard) -> None:
    async for message in stream:
        heard.take(message.data)


def allow_open_files(count: int, pid: int = 0) -> None:
    """Let a process (this one, unless named) open so many files; raises :class:`OSError` if it may not.

    What it starts afterwards may, too.
    """
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise OSError(f"{count} open files are needed, {hard} are allowed; raise the hard limit (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, hard))
