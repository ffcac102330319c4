"""The engine of the API server that this process is, shared with the server's own requests."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from kv_agent.chunks import Fingerprint
from kv_agent.engines.base import Call, Completion
from kv_agent.engines.vllm_calls import completion_of, prompt_of, sampling_of
from kv_agent.errors import EngineError
from kv_agent.vllm_plugin.fingerprint import fingerprint_details, fingerprint_of

_STOPPED = "the server is shutting down; send the request again later"
_WATCH_EVERY_S = 0.2


class ServedEngine:
    """Calls from any number of threads, run side by side on the server's event loop ``loop``.

    Never call it on that loop: it would wait for itself. Making one reads the model's files.
    ``chat_template`` is the server's, where it has another than the model.
    """

    def __init__(
        self, client: Any, loop: asyncio.AbstractEventLoop, chat_template: str | None = None
    ) -> None:
        self._client = client
        self._loop = loop
        config = client.vllm_config
        self._fingerprint = fingerprint_of(fingerprint_details(config))
        self._max_model_len = int(config.model_config.max_model_len)
        # A copy of our own: the server's requests set truncation on theirs, which other threads must not do
        # while one encodes.
        self._tokenizer = copy.deepcopy(client.renderer.get_tokenizer())
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._lock = threading.Lock()
        self._running: set[Future[list[Completion]]] = set()
        self._is_closed = False
        self._watching = asyncio.run_coroutine_threadsafe(self._end_with_the_engine(), loop)

    @property
    def fingerprint(self) -> Fingerprint:
        return self._fingerprint

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def is_alive(self) -> bool:
        """Whether vLLM's engine answers, as far as its process knows."""
        return not self._is_closed and not self._client.errored

    def run(self, calls: Sequence[Call]) -> list[Completion]:
        """Run calls together; results in the order of the calls. When one fails, the others are cancelled."""
        with self._lock:
            if self._is_closed:
                raise EngineError(_STOPPED)
            running = asyncio.run_coroutine_threadsafe(self._together(calls), self._loop)
            self._running.add(running)
        try:
            return running.result()
        except CancelledError as err:
            raise EngineError(_STOPPED) from err
        finally:
            with self._lock:
                self._running.discard(running)

    def close(self) -> None:
        """Cancel what runs and take no more; the engine itself is the server's."""
        with self._lock:
            self._is_closed = True
            running = list(self._running)
        self._watching.cancel()
        for one in running:
            one.cancel()

    async def _end_with_the_engine(self) -> None:
        """Once vLLM no longer reads what its engine answers, end the requests that still wait.

        vLLM lets them wait for ever, its own too, so a server that is told to stop would wait with them.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            if not self._client.is_running:  # more than once: some are only on their way the first time
                self._client.output_processor.propagate_error(EngineDeadError())

    async def _together(self, calls: Sequence[Call]) -> list[Completion]:
        tasks = [asyncio.create_task(self._one(call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, call: Call) -> Completion:
        from vllm.exceptions import VLLMError
        from vllm.v1.engine.exceptions import EngineDeadError

        started = time.perf_counter()
        ttft_s = None
        last = None
        try:
            request_id = f"kv-agent-{uuid.uuid4().hex}"
            outputs = self._client.generate(prompt_of(call), sampling_of(call), request_id=request_id)
            async for output in outputs:
                last = output
                if ttft_s is None:
                    ttft_s = time.perf_counter() - started
        except EngineDeadError as err:
            raise EngineError("the vLLM engine died; its log says why") from err
        except VLLMError as err:  # too many requests wait, say
            raise EngineError(f"vLLM did not answer: {err or type(err).__name__}") from err
        if last is None or ttft_s is None or last.outputs[0].finish_reason == "abort":
            raise EngineError("vLLM broke the request off; is it shutting down?")
        return completion_of(last, ttft_s)
