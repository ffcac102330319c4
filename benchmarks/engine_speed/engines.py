"""Engines side by side in one run, each in its own process, all with the same threads."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine_speed.models import VOCABULARY
from kv_agent.chunks import ChunkRecord, TurnId
from kv_agent.engines.vllm_calls import PLUGIN_KEY
from kv_agent.engines.vllm_local import transfer_config
from kv_agent.storage.catalog import Catalog

BLOCK = 128
SCOPE = {"namespace": "default", "user_id": "bench"}
_STORED_TIMEOUT_S = 120.0
# So long after a step a worker of vLLM looks for the next one without a break, on a core that others want.
SPINS_S = 1.1


def pin_threads() -> None:
    """vLLM keeps a core free, and with a connector one more: that alone would look like speed.

    To be called before the first engine starts.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request; ``options`` are the plugin's."""

    token_ids: Sequence[int]
    max_tokens: int = 1
    salt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Answer:
    """When the request was given, when tokens came since, in seconds, and what the plugin says of it."""

    began_s: float = 0.0  # of a clock that all answers share
    arrivals_s: list[float] = field(default_factory=list)
    num_cached: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def ends_s(self) -> float:
        return self.began_s + self.arrivals_s[-1]


class BenchEngine:
    """vLLM started by this process; ``settings`` switch the plugin on."""

    def __init__(self, model: Path, settings: Mapping[str, Any] | None = None, **options: Any) -> None:
        from vllm import LLM

        connector = {} if settings is None else {"kv_transfer_config": transfer_config(settings)}
        defaults = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": 9216,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": True,
            "seed": 0,
        }
        self._llm = LLM(model=str(model), **(defaults | connector | options))
        self._ids = itertools.count()

    def ask(self, token_ids: Sequence[int], *, salt: str | None = None, **options: Any) -> Answer:
        """One token, on an idle engine."""
        (answer,) = self.run([Ask(token_ids=token_ids, salt=salt, options=options)], 1)
        return answer

    def run(self, asks: Sequence[Ask], at_once: int) -> list[Answer]:
        """All requests, so many at a time; answers in their order."""
        engine = self._llm.llm_engine
        waiting = list(enumerate(asks))[::-1]
        answers = [Answer() for _ in asks]
        running: dict[str, int] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                number, ask = waiting.pop()
                request_id = str(next(self._ids))
                running[request_id] = number
                answers[number].began_s = time.perf_counter()
                engine.add_request(request_id, *_given(ask))
            for output in engine.step():
                answer = answers[running[output.request_id]]
                answer.arrivals_s.append(time.perf_counter() - answer.began_s)
                if output.finished:
                    del running[output.request_id]
                    answer.num_cached = output.num_cached_tokens or 0
                    answer.fields = (output.kv_transfer_params or {}).get(PLUGIN_KEY, {})
        return answers

    def forget_local(self) -> bool:
        """Empty vLLM's own prefix cache; False: some of it is in use, and nothing was forgotten."""
        return bool(self._llm.reset_prefix_cache())

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _given(ask: Ask) -> tuple[Any, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompt: dict[str, Any] = {"prompt_token_ids": list(ask.token_ids)}
    if ask.salt is not None:
        prompt["cache_salt"] = ask.salt
    extra = {"kv_transfer_params": {PLUGIN_KEY: dict(ask.options)}} if ask.options else None
    params = SamplingParams(
        max_tokens=ask.max_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        output_kind=RequestOutputKind.DELTA,
    )
    return prompt, params


def random_tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1, VOCABULARY), k=count)


def stored(catalog: Catalog, answer: Answer) -> list[ChunkRecord]:
    """The chunks of the turn that was captured, once it is durable."""
    turn = TurnId(answer.fields["turn_id"])
    deadline = time.monotonic() + _STORED_TIMEOUT_S
    while not catalog.known_turns([turn]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"turn {turn} was not stored")
        time.sleep(0.005)
    keys = catalog.turns([turn])[turn].chunk_keys
    records = catalog.chunks(keys)
    return [records[key] for key in keys]


def plan_of(records: Sequence[ChunkRecord]) -> dict[str, Any]:
    """The chunks where they stood."""
    end = max(record.start + record.num_tokens for record in records)
    placements = [{"chunk_id": record.key, "start": record.start} for record in records]
    return {"placements": placements, "fresh_start": end}
