"""Calls of threads on the event loop of a server: side by side, and all of a batch or none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from kv_agent.engines import vllm_served
from kv_agent.engines.base import Call
from kv_agent.engines.vllm_served import ServedEngine
from kv_agent.errors import EngineError

pytestmark = pytest.mark.engine

# First tokens of prompts that end in these ways.
DIES, REFUSED, ABORTED, HANGS = 1, 2, 3, 4
FINE = 10


class Client:
    """As vLLM's, but for the model: a prompt answers when all that are awaited are there."""

    errored = False
    is_running = True

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
        self.renderer = SimpleNamespace(get_tokenizer=lambda: "tokenizer")
        self.awaited = 1
        self.running = 0
        self.cancelled: list[int] = []
        self.request_ids: list[str] = []
        self.together: asyncio.Event | None = None

    async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        first = prompt["prompt_token_ids"][0]
        self.request_ids.append(request_id)
        self.running += 1
        self.together = self.together or asyncio.Event()
        try:
            if self.running >= self.awaited:
                self.together.set()
            await self.together.wait()
            if first == DIES:
                raise EngineDeadError()
            if first == REFUSED:
                raise VLLMValidationError("too long")
            if first == HANGS:
                await asyncio.sleep(3600)
            yield _output(first, "abort" if first == ABORTED else "length")
        except asyncio.CancelledError:
            self.cancelled.append(first)
            raise
        finally:
            self.running -= 1


def _output(first: int, reason: str) -> Any:
    answer = SimpleNamespace(text=str(first), token_ids=[first], logprobs=None, finish_reason=reason)
    return SimpleNamespace(
        outputs=[answer], kv_transfer_params=None, prompt_token_ids=[first], num_cached_tokens=0
    )


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    asyncio.run_coroutine_threadsafe(_tasks_ended(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _tasks_ended() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def engine(
    client: Client, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServedEngine]:
    monkeypatch.setattr(vllm_served, "fingerprint_details", lambda config: {})
    engine = ServedEngine(client, loop)
    yield engine
    engine.close()


def calls(*first: int) -> list[Call]:
    return [Call(token_ids=(one, 0), max_tokens=1) for one in first]


def test_a_batch_runs_together_and_answers_in_order(engine: ServedEngine, client: Client) -> None:
    client.awaited = 3

    done = engine.run(calls(FINE + 2, FINE, FINE + 1))

    assert [one.token_ids for one in done] == [(FINE + 2,), (FINE,), (FINE + 1,)]
    assert len(set(client.request_ids)) == 3


def test_threads_run_side_by_side(engine: ServedEngine, client: Client) -> None:
    client.awaited = 16  # none would end if they took turns

    with ThreadPoolExecutor(16) as threads:
        done = list(threads.map(lambda number: engine.run(calls(number)), range(FINE, FINE + 16)))

    assert [one.token_ids for (one,) in done] == [(number,) for number in range(FINE, FINE + 16)]


@pytest.mark.parametrize("bad", [DIES, REFUSED, ABORTED])
def test_when_one_call_fails_the_others_are_cancelled(engine: ServedEngine, client: Client, bad: int) -> None:
    client.awaited = 3

    with pytest.raises(EngineError):
        engine.run(calls(HANGS, bad, HANGS))

    assert client.cancelled == [HANGS, HANGS]
    assert client.running == 0
    assert engine.run(calls(FINE))[0].token_ids == (FINE,)


def test_closing_breaks_off_what_runs_and_takes_no_more(engine: ServedEngine, client: Client) -> None:
    client.awaited = 4
    with ThreadPoolExecutor(5) as threads:
        hanging = [threads.submit(engine.run, calls(HANGS)) for _ in range(4)]
        while client.together is None or not client.together.is_set():
            time.sleep(0.001)
        engine.close()
        for one in hanging:
            assert isinstance(one.exception(), EngineError)

    with pytest.raises(EngineError, match="shutting down"):
        engine.run(calls(FINE))
    assert not engine.is_alive


def test_an_engine_is_alive_as_long_as_vllm_says_so(engine: ServedEngine, client: Client) -> None:
    assert engine.is_alive
    client.errored = True
    assert not engine.is_alive
