"""What a memory does, as requests to a server and values made of the answers. No I/O."""

from __future__ import annotations

import base64
import builtins
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kv_agent.chunks import Scope, TurnFilter, TurnId
from kv_agent.memories import Answer, Memory, Search, Share, Stats, reading_scope
from kv_agent.placing import Quality
from kv_agent.remote import answers
from kv_agent.remote.exchange import Steps, answered, ask, found
from kv_agent.searching import Mode

MAX_PAGE = 1000  # what a server gives at once

# What can be asked for by id: nothing that leads to another path.
_ID = re.compile(r"(?!(?:health|stats|stream|ui)$)[0-9A-Za-z_-]{1,256}")
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Those of one scope; each method says what :class:`~kv_agent.memory.AgentMemory`'s of that name does.

    Which namespace it is about the server knows, by the key.
    """

    base_url: str
    scope: Scope
    share: Share
    system_prompt: str | None

    @property
    def _reading(self) -> Scope:
        return reading_scope(self.scope, self.share)

    @property
    def _owner(self) -> dict[str, str]:
        return _known(
            user_id=self.scope.user_id, agent_id=self.scope.agent_id, session_id=self.scope.session_id
        )

    def store(
        self, prompt: str, response: str, metadata: Mapping[str, Any] | None, ttl_s: float | None
    ) -> Steps[TurnId | None]:
        body = self._owner | _known(
            prompt=prompt,
            response=response,
            system_prompt=self.system_prompt,
            metadata=dict(metadata or {}),
            ttl_s=ttl_s,
        )
        stored = yield from answered(ask("POST", "/memory/store", body), answers.StoredAnswer)
        return TurnId(stored.id)

    def search(
        self,
        query: str,
        top_k: int,
        mode: Mode,
        only: TurnFilter,
        neighbours: int,
        explain: bool,
        peek: bool = False,
    ) -> Steps[Search]:
        body = self._owner | {
            "query": query,
            "share": self.share,
            "top_k": top_k,
            "mode": mode,
            "filters": _filters(only),
            "neighbours": neighbours,
            "explain": explain,
            "peek": peek,
        }
        said = yield from answered(ask("POST", "/memory/query", body), answers.FoundAnswer)
        memories = tuple(one.memory for one in said.memories)
        return Search(memories=memories, probe_s=said.probe_ms / 1000)

    def generate(
        self,
        query: str,
        top_k: int,
        max_tokens: int,
        temperature: float,
        store: bool,
        mode: Mode,
        only: TurnFilter,
        neighbours: int,
        quality: Quality,
    ) -> Steps[Answer]:
        """``ttft_s`` is left at 0: only who waits can tell."""
        memory = self._owner | {
            "share": self.share,
            "top_k": top_k,
            "store": store,
            "mode": mode,
            "filters": _filters(only),
            "neighbours": neighbours,
            "quality": quality,
        }
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        body = {
            "messages": [*system, {"role": "user", "content": query}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "memory": memory,
        }
        chat = yield from answered(ask("POST", _CHAT, body), answers.ChatAnswer)
        reused = answers.reuse_of(chat, self.base_url)
        memories = yield from self._all(reused.memories)
        return Answer(
            text=chat.text.strip(),
            reuse=reused.reuse,
            memories=tuple(memories),
            turn_id=None if reused.turn_id is None else TurnId(reused.turn_id),
            ttft_s=0.0,
        )

    def get(self, memory_id: TurnId) -> Steps[Memory | None]:
        if not _ID.fullmatch(memory_id):
            return None
        owner = {"user_id": self.scope.user_id}
        said = yield from found(ask("GET", f"/memory/{memory_id}", params=owner), answers.MemoryAnswer)
        return said.memory if said is not None and self._admits(said.memory) else None

    def list(self, limit: int, before: float | None, before_id: TurnId | None) -> Steps[list[Memory]]:
        reading = self._reading
        cursor = None if before is None else cursor_before(before, before_id)
        listed: list[Memory] = []
        while True:
            params = {
                "user_id": reading.user_id,
                "agent_id": reading.agent_id,
                "session_id": reading.session_id,
                "limit": min(limit - len(listed), MAX_PAGE),
                "cursor": cursor,
            }
            page = yield from answered(ask("GET", "/memory", params=params), answers.PageAnswer)
            listed += [one.memory for one in page.memories]
            cursor = page.next
            if cursor is None or len(listed) >= limit:
                return listed

    def forget(self, memory_ids: Sequence[TurnId]) -> Steps[int]:
        num_forgotten = 0
        for memory_id in dict.fromkeys(memory_ids):
            if (yield from self._in_reach(memory_id)):
                num_forgotten += yield from self._about(memory_id, "DELETE", "")
        return num_forgotten

    def pin(self, memory_id: TurnId, pinned: bool) -> Steps[bool]:
        if not (yield from self._in_reach(memory_id)):
            return False
        return (yield from self._about(memory_id, "PUT" if pinned else "DELETE", "/pin"))

    def stats(self) -> Steps[Stats]:
        return (yield from answered(ask("GET", "/memory/stats"), answers.StatsAnswer)).stats

    def _about(self, memory_id: TurnId, method: str, path: str) -> Steps[bool]:
        """``False`` if there is no such memory."""
        asked = ask(method, f"/memory/{memory_id}{path}", params={"user_id": self.scope.user_id})
        return (yield from found(asked, answers.Done)) is not None

    def _in_reach(self, memory_id: TurnId) -> Steps[bool]:
        """Whether it may be this scope's; that it is the user's the server looks after."""
        if self.share == "user":
            return _ID.fullmatch(memory_id) is not None
        return (yield from self.get(memory_id)) is not None

    def _admits(self, memory: Memory) -> bool:
        return replace(self._reading, namespace=memory.scope.namespace).admits(memory.scope)

    def _all(self, used: Sequence[answers.UsedMemory]) -> Steps[builtins.list[Memory]]:
        """Those that are still there."""
        memories = []
        for one in used:
            memory = yield from self.get(TurnId(one.id))
            if memory is not None:
                memories.append(replace(memory, score=one.score))
        return memories


def cursor_before(created: float, memory_id: TurnId | None) -> str:
    """What a page begins behind, as the server's own cursors say it; without an id behind that instant."""
    return base64.urlsafe_b64encode(json.dumps([created, memory_id or ""]).encode()).decode()


def _filters(only: TurnFilter) -> dict[str, Any]:
    return _known(since=only.since, until=only.until) | {"metadata": dict(only.metadata)}


def _known(**fields: Any) -> dict[str, Any]:
    """What is given."""
    return {name: value for name, value in fields.items() if value is not None}
