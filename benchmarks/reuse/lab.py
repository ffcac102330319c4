"""An engine with a store, on which the same prompt is answered with its memories computed or put back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reuse.cases import Case, Tokens
from kv_agent.chunks import ChunkKey, ChunkRecord, TurnId
from kv_agent.engines.base import Call, Completion
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog

_TIMEOUT_S = 60.0
_USER = "lab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where stored chunks go: ``(chunk, position, tokens left out)``. No chunk: everything is computed.

    ``repaired`` counts memory tokens that were computed in their place for this plan.
    """

    placed: tuple[tuple[ChunkKey, int, int], ...] = ()
    salt: str
    repaired: int = 0

    def options(self, fresh_start: int) -> dict[str, Any]:
        if not self.placed:
            return {"store": False}
        placements = [{"chunk_id": key, "start": at, "skip": skip} for key, at, skip in self.placed]
        return {
            "scope": {"user_id": _USER},
            "store": False,
            "plan": {"placements": placements, "fresh_start": fresh_start},
        }


@dataclass
class Lab:
    """``top`` is the number of tokens whose log-probability comes back: the vocabulary."""

    engine: VllmEngine
    catalog: Catalog
    top: int
    _chunks: dict[tuple[Tokens, Tokens], list[ChunkRecord]] = field(default_factory=dict)

    @classmethod
    def open(cls, model: Path, store: Path, *, max_model_len: int, chunk_tokens: int, vocabulary: int) -> Lab:
        engine = VllmEngine(
            model,
            {"store": str(store), "chunk_tokens": chunk_tokens},
            dtype="float32",
            max_model_len=max_model_len,
            max_logprobs=vocabulary,
            seed=0,
        )
        return cls(engine=engine, catalog=Catalog(store / "catalog.sqlite3"), top=vocabulary)

    def close(self) -> None:
        self.engine.close()
        self.catalog.close()

    def sample(self, prompt: Tokens, num_tokens: int, num: int) -> list[Tokens]:
        """Texts that the model itself goes on with."""
        call = Call(token_ids=prompt, max_tokens=num_tokens, temperature=1.0, ignore_eos=True)
        return [(*prompt, *done.token_ids) for done in self.engine.run([call] * num)]

    def stored(self, context: Tokens, memory: Tokens) -> list[ChunkRecord]:
        """The chunks of ``memory``, computed behind ``context``; once for the same tokens."""
        if (context, memory) not in self._chunks:
            self._chunks[context, memory] = self.capture((*context, *memory), len(context), Plan(salt=""))
        return self._chunks[context, memory]

    def prefix(self, tokens: Tokens) -> list[ChunkRecord]:
        """The chunks of what begins a prompt."""
        return self.stored((), tokens) if tokens else []

    def capture(self, tokens: Tokens, content_start: int, plan: Plan) -> list[ChunkRecord]:
        """Compute ``tokens`` behind what the plan puts back, and keep those from ``content_start`` on."""
        options = plan.options(content_start) | {"scope": {"user_id": _USER}, "store": True}
        call = Call(
            token_ids=tokens,
            max_tokens=1,
            options=options | {"content_start": content_start},
            cache_salt=plan.salt or None,
        )
        (done,) = self.engine.run([call])
        turn_id = done.turn_id
        assert turn_id is not None, "nothing was captured"
        return self._wait(turn_id)

    def answer(self, case: Case, plan: Plan, max_tokens: int, *, with_logprobs: bool = False) -> Completion:
        fresh_start = len(case.prompt) - len(case.fresh)
        call = Call(
            token_ids=case.prompt,
            max_tokens=max_tokens,
            options=plan.options(fresh_start),
            cache_salt=plan.salt,
            logprobs=self.top if with_logprobs else None,
        )
        (done,) = self.engine.run([call])
        return done

    def next_tokens(self, case: Case, plan: Plan) -> list[Mapping[int, float]]:
        """Log-probabilities of all tokens behind each token of the fresh turn."""
        fresh_start = len(case.prompt) - len(case.fresh)
        calls = [
            Call(
                token_ids=case.prompt[:end],
                max_tokens=1,
                options=plan.options(fresh_start),
                cache_salt=plan.salt,
                ignore_eos=True,
                logprobs=self.top,
            )
            for end in range(fresh_start + 1, len(case.prompt) + 1)
        ]
        return [done.logprobs[0] for done in self.engine.run(calls)]

    def _wait(self, turn_id: TurnId) -> list[ChunkRecord]:
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.catalog.known_turns([turn_id]):
            assert time.monotonic() < deadline, "the turn was not stored"
            time.sleep(0.002)
        keys: Sequence[ChunkKey] = self.catalog.turns([turn_id])[turn_id].chunk_keys
        records = self.catalog.chunks(keys)
        return [records[key] for key in keys]
