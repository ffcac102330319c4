"""Chat with memory: the ``memory`` field of vLLM's own chat, completion and response routes.

A request passes through unchanged. That it asks for memory is noted beside it, and where vLLM hands the
rendered prompt to its engine, :class:`RememberingClient` puts the memories in: so templates, tools, streaming
and every other option are vLLM's own, and a request without the field is one that we never touched.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from kv_agent.chunks import Scope
from kv_agent.engines.vllm_calls import PLUGIN_KEY
from kv_agent.errors import KVAgentError
from kv_agent.serving.access import NAMESPACE_HEADER, Caller
from kv_agent.serving.errors import RequestError, answer_to
from kv_agent.serving.metrics import Outcome
from kv_agent.serving.recalling import Recall, Recalled
from kv_agent.serving.recent import AnsweredRequest
from kv_agent.serving.schemas import MemoryField
from kv_agent.serving.server import MemoryServer

logger = logging.getLogger(__name__)

FIELD = "memory"
PARAMS = "kv_transfer_params"

_CHAT = "/v1/chat/completions"
_ROUTES = (_CHAT, "/v1/completions", "/v1/responses")
_STREAM_END = b"data: [DONE]"
_OFF = "memory is off: this vLLM runs without KVAgentConnector; leave out the field `memory`"


@dataclass(slots=True, kw_only=True)
class Ask:
    """A request that asks for memory; ``report`` is what became of it, once that is known.

    A turn is under way when a tool has answered since the user's ``query``.
    """

    caller: Caller
    wanted: MemoryField
    query: str | None
    is_under_way: bool
    max_tokens: int | None
    report: dict[str, Any] = field(default_factory=dict)


# Set while vLLM handles a request that asks for memory, and inherited by the tasks that it starts for it.
_ASKED: ContextVar[Ask | None] = ContextVar("kv_agent_ask", default=None)


class ChatMemory:
    """ASGI middleware that notes which requests ask for memory; ``server_of`` gives ours once it is open."""

    def __init__(self, app: ASGIApp, server_of: Callable[[Any], MemoryServer | None]) -> None:
        self._app = app
        self._server_of = server_of

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in _ROUTES:
            await self._app(scope, receive, send)
            return
        body, receive = await _read(receive)
        fields = _fields(body)
        if fields is None or fields.get(FIELD) is None:
            await self._app(scope, receive, send)
            return
        try:
            ask = self._ask(scope, path, fields)
        except KVAgentError as err:
            answer = answer_to(err)
            if (server := self._server_of(scope["app"])) is not None:
                server.metrics.refused("chat", answer.status_code)
            await answer(scope, receive, send)
            return
        noted = _ASKED.set(ask)
        try:
            await self._app(scope, receive, _reporting(send, ask) if path == _CHAT else send)
        finally:
            _ASKED.reset(noted)

    def _ask(self, scope: AsgiScope, path: str, fields: Mapping[str, Any]) -> Ask:
        server = self._server_of(scope["app"])
        if server is None:
            raise RequestError(503, _OFF)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        caller = server.admit(headers.get("authorization"), headers.get(NAMESPACE_HEADER.lower()))
        if fields.get("use_beam_search"):
            raise RequestError(400, "beam search computes every beam anew: ask without `memory`", param=FIELD)
        try:
            wanted = MemoryField.model_validate(fields[FIELD])
        except ValidationError as err:
            first = err.errors()[0]
            place = ".".join([FIELD, *map(str, first["loc"])])[:200]
            raise RequestError(400, f"{place}: {first['msg']}", param=place) from err
        limit = next((fields[name] for name in _LIMITS if isinstance(fields.get(name), int)), None)
        return Ask(
            caller=caller,
            wanted=wanted,
            query=last_question(path, fields),
            is_under_way=is_under_way(path, fields),
            max_tokens=limit,
        )


_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class RememberingClient:
    """vLLM's engine client; where a request asks for memory, memories come into its prompt.

    Everything else is the client's own.
    """

    def __init__(self, client: Any, server: MemoryServer) -> None:
        self._client = client
        self._server = server
        self._recall = Recall(server.service.manager, server.metrics)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        """As the client's own."""
        ask = _ASKED.get()
        if ask is None or not _is_text(prompt):
            return self._client.generate(prompt, sampling_params, request_id, **options)
        return self._remembering(ask, prompt, sampling_params, request_id, options)

    async def _remembering(
        self, ask: Ask, prompt: Any, params: Any, request_id: str, options: Mapping[str, Any]
    ) -> AsyncIterator[Any]:
        recalled: Recalled | None = None
        started = time.perf_counter()
        try:
            recall = partial(
                self._recall, ask.caller.namespace, ask.wanted, ask.query, prompt["prompt_token_ids"]
            )
            recall = partial(recall, is_under_way=ask.is_under_way, max_tokens=ask.max_tokens)
            recalled = await self._server.run(recall)
        except KVAgentError as err:  # a request never fails for its memory
            about = {"event": "chat_failed", "request": request_id}
            logger.warning("request %s is answered without memory: %s", request_id, err, extra=about)
            ask.report["error"] = "memory could not be used, the server's log says why"
        except Exception:
            about = {"event": "error", "request": request_id}
            logger.exception("request %s is answered without memory", request_id, extra=about)
            ask.report["error"] = "memory could not be used, the server's log says why"
        recall_s = time.perf_counter() - started
        self._server.metrics.recalled(_outcome(recalled), recall_s)
        if recalled is not None:
            prompt, params = recalled.applied(prompt, params)
        async with aclosing(self._client.generate(prompt, params, request_id, **options)) as outputs:
            async for output in outputs:
                if output.finished:
                    self._note(ask, recalled, output, recall_s)
                yield output

    def _note(self, ask: Ask, recalled: Recalled | None, output: Any, recall_s: float) -> None:
        answer = dict((output.kv_transfer_params or {}).get(PLUGIN_KEY, {}))
        if recalled is not None:
            answer["memories"] = [{"id": one.id, "score": one.score} for one in recalled.memories]
            self._recall.done(recalled, answer, self._server.hub.publish)
        self._server.recent.note(_answered(ask, recalled, output, answer, recall_s))
        ask.report |= answer
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), PLUGIN_KEY: ask.report}


def _outcome(recalled: Recalled | None) -> Outcome:
    if recalled is None:
        return "failed"
    return "remembered" if recalled.memories else "nothing"


def _answered(
    ask: Ask, recalled: Recalled | None, output: Any, answer: Mapping[str, Any], recall_s: float
) -> AnsweredRequest:
    """What is told of a request to those who ask what was reused lately."""
    local = answer.get("local", output.num_cached_tokens or 0)
    wanted = ask.wanted
    return AnsweredRequest(
        at=time.time(),
        scope=Scope(
            namespace=ask.caller.namespace,
            user_id=wanted.user_id,
            agent_id=wanted.agent_id,
            session_id=wanted.session_id,
        ),
        ids=() if recalled is None else tuple(memory.id for memory in recalled.memories),
        exact=answer.get("exact", 0),
        adapted=answer.get("adapted", 0),
        local=local,
        computed=answer.get("computed", len(output.prompt_token_ids or ()) - local),
        recall_ms=round(recall_s * 1000, 3),
        failed=recalled is None,
    )


def last_question(path: str, fields: Mapping[str, Any]) -> str | None:
    """What the user said last, where the request has messages; ``None`` if only its prompt can tell."""
    messages = _messages_of(path, fields)
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, Sequence):
        return None
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return _text_of(message.get("content"))
    return None


def is_under_way(path: str, fields: Mapping[str, Any]) -> bool:
    """Whether the last that was said is what a tool answered."""
    messages = _messages_of(path, fields)
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        return False
    last = messages[-1]
    if not isinstance(last, Mapping):
        return False
    return last.get("role") == "tool" or last.get("type") == "function_call_output"


def _messages_of(path: str, fields: Mapping[str, Any]) -> Any:
    return fields.get("messages") if path == _CHAT else fields.get("input")


def _text_of(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return None
    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "\n".join(part for part in parts if isinstance(part, str)) or None


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, Mapping) and bool(prompt.get("prompt_token_ids")) and "mm_kwargs" not in prompt


def _fields(body: bytes) -> Mapping[str, Any] | None:
    """The body as an object, if it may ask for memory; what is wrong with it is for vLLM to say."""
    if f'"{FIELD}"'.encode() not in body:
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a way to receive it once more."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body"):
            break
    body = b"".join(message.get("body", b"") for message in messages)
    waiting = iter(messages)

    async def again() -> Message:
        for message in waiting:
            return message
        return await receive()

    return body, again


def _reporting(send: Send, ask: Ask) -> Send:
    """Where a chat answer is streamed, one more event before its end says what was reused."""
    streams = False
    first: dict[str, Any] = {}

    async def reporting(message: Message) -> None:
        nonlocal streams, first
        body = message.get("body", b"")
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif streams and body and not first:
            first = _first_event(body)
        if streams and ask.report and _STREAM_END in body:
            chunk = {**first, "choices": [], PARAMS: {PLUGIN_KEY: ask.report}}
            event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
            message = {**message, "body": body.replace(_STREAM_END, event + _STREAM_END, 1)}
        await send(message)

    return reporting


def _first_event(body: bytes) -> dict[str, Any]:
    """What all events of a stream have alike, from its first."""
    try:
        event = json.loads(body.removeprefix(b"data: ").split(b"\n", 1)[0])
        return {name: event[name] for name in ("id", "object", "created", "model")}
    except (ValueError, KeyError, TypeError):
        return {"object": "chat.completion.chunk"}
