"""An engine with a store, on which the same prompt is answered with its memories computed or put back."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
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
DTYPE = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where stored chunks go: ``(chunk, position, tokens left out)``. No chunk: everything is computed.

    ``repaired`` counts memory tokens that were computed in their place for this plan. Without ``memories``
    the question is asked as if there were none.
    """

    placed: tuple[tuple[ChunkKey, int, int], ...] = ()
    salt: str
    repaired: int = 0
    memories: bool = True

    def prompt(self, case: Case) -> Tokens:
        return case.prompt if self.memories else (*case.prefix, *case.fresh)

    def options(self, fresh_start: int) -> dict[str, Any]:
        if not self.placed:
            return {"store": False}
        placements = [{"chunk_id": key, "start": at, "skip": skip} for key, at, skip in self.placed]
        return {
            "scope": {"user_id": _USER},
            "store": False,
            "plan": {"placements": placements, "fresh_start": fresh_start},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """Compute ``tokens`` behind what the plan puts back, and keep those from ``content_start`` on."""

    tokens: Tokens
    content_start: int
    plan: Plan

    def call(self) -> Call:
        options = self.plan.options(self.content_start) | {"scope": {"user_id": _USER}, "store": True}
        return Call(
            token_ids=self.tokens,
            max_tokens=1,
            options=options | {"content_start": self.content_start},
            cache_salt=self.plan.salt or None,
        )


Steps = Generator[Capture, list[ChunkRecord], Plan]


@dataclass
class Lab:
    """``top`` is the number of tokens whose log-probability comes back: the vocabulary."""

    engine: VllmEngine
    catalog: Catalog
    top: int
    _captured: dict[Capture, list[ChunkRecord]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, model: Path, store: Path, *, max_model_len: int, chunk_tokens: int, vocabulary: int, codec: str
    ) -> Lab:
        """Nothing is kept in memory, so that what is put back was written and read by ``codec``."""
        engine = VllmEngine(
            model,
            {"store": str(store), "chunk_tokens": chunk_tokens, "codec": codec, "host_bytes": 0},
            dtype=DTYPE,
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

    def plans(self, ways: Iterable[Steps]) -> list[Plan]:
        """What the ways come to, side by side: the captures they ask for next are computed as one batch."""
        running = dict(enumerate(ways))
        plans: dict[int, Plan] = {}
        asked: dict[int, Capture] = {}
        while running:
            for number, steps in list(running.items()):
                try:
                    if number in asked:
                        asked[number] = steps.send(self._captured[asked[number]])
                    else:
                        asked[number] = next(steps)
                except StopIteration as done:
                    plans[number] = done.value
                    del running[number]
            self._capture([asked[number] for number in running])
        return [plans[number] for number in sorted(plans)]

    def answers(
        self, prompts: Sequence[tuple[Case, Plan]], max_tokens: int, *, with_logprobs: bool = False
    ) -> list[Completion]:
        return self.engine.run(
            [
                Call(
                    token_ids=plan.prompt(case),
                    max_tokens=max_tokens,
                    options=plan.options(len(case.prompt) - len(case.fresh)),
                    cache_salt=plan.salt,
                    logprobs=self.top if with_logprobs else None,
                )
                for case, plan in prompts
            ]
        )

    def next_tokens(self, case: Case, plan: Plan) -> list[Mapping[int, float]]:
        """Log-probabilities of all tokens behind each token of the fresh turn."""
        prompt = plan.prompt(case)
        fresh_start = len(prompt) - len(case.fresh)
        calls = [
            Call(
                token_ids=prompt[:end],
                max_tokens=1,
                options=plan.options(fresh_start),
                cache_salt=plan.salt,
                ignore_eos=True,
                logprobs=self.top,
            )
            for end in range(fresh_start + 1, len(prompt) + 1)
        ]
        return [done.logprobs[0] for done in self.engine.run(calls)]

    def _capture(self, wanted: Sequence[Capture]) -> None:
        missing = [one for one in dict.fromkeys(wanted) if one not in self._captured]
        turn_ids: list[TurnId] = []
        for done in self.engine.run([one.call() for one in missing]):
            assert done.turn_id is not None, "nothing was captured"
            turn_ids.append(done.turn_id)
        deadline = time.monotonic() + _TIMEOUT_S
        while len(self.catalog.known_turns(turn_ids)) < len(turn_ids):
            assert time.monotonic() < deadline, "a turn was not stored"
            time.sleep(0.002)
        turns = self.catalog.turns(turn_ids)
        records = self.catalog.chunks([key for turn in turns.values() for key in turn.chunk_keys])
        for one, turn_id in zip(missing, turn_ids, strict=True):
            self._captured[one] = [records[key] for key in turns[turn_id].chunk_keys]
