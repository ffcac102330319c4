"""What the tests of the Python interface share: one engine for several managers, and a reply."""

from __future__ import annotations

from collections.abc import Sequence

from kv_agent.chunks import Fingerprint
from kv_agent.engines.base import Call, Completion
from kv_agent.engines.vllm_local import VllmEngine

REPLY = "I will remember that."


class SharedEngine:
    """The one engine of these tests, given to several managers: closing a manager must not end it."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.closed = 0

    @property
    def fingerprint(self) -> Fingerprint:
        return self._engine.fingerprint

    @property
    def tokenizer(self) -> object:
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    def run(self, calls: Sequence[Call]) -> list[Completion]:
        return self._engine.run(calls)

    def close(self) -> None:
        self.closed += 1
