"""What ``AgentMemory.generate`` makes of its ``quality`` settings: answers, requests, time.

    python -m benchmarks.reuse_product examples/models/recall --results results.jsonl

The worlds and questions of ``reuse_quality``. The facts of a world are stored by ``--agents`` agents of a
user of its own, and another agent of that user asks, with all of them as memories. ``computed`` is the same
prompt with nothing put back; its time knows no search. ``right`` and ``same_answer`` are of all questions,
everything else of the first in each world: tokens as shares of its prompt, ``requests`` to the engine and
``ms`` to the first token (median) when these memories first meet, and both when the question is asked again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.provenance import provenance
from benchmarks.reuse.cases import Exam, exams
from benchmarks.reuse.lab import DTYPE
from kv_agent.chunks import Fingerprint
from kv_agent.engines.base import Call, Completion, Engine, Reuse
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.manager import CacheManager
from kv_agent.memory import AgentMemory, Memory

ANSWER_TOKENS = 16
MAX_MODEL_LEN = 2048
COMPUTED = "computed"

Quality = Literal["fast", "balanced", "exact"]


class NotingEngine:
    """An engine that keeps a list of what it ran."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.ran: list[tuple[Call, Completion]] = []

    @property
    def fingerprint(self) -> Fingerprint:
        return self._engine.fingerprint

    @property
    def tokenizer(self) -> Any:
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    def run(self, calls: Sequence[Call]) -> list[Completion]:
        done = self._engine.run(calls)
        self.ran += zip(calls, done, strict=True)
        return done

    def close(self) -> None:
        self._engine.close()


class Trial(NamedTuple):
    """One answer, and the requests it took: ``repaired`` memory tokens were computed by those before it."""

    text: str
    reuse: Reuse
    ms: float
    requests: int
    repaired: int


class Bench:
    """A manager on an engine whose requests are counted."""

    def __init__(self, engine: Engine, store: Path) -> None:
        self._engine = NotingEngine(engine)
        self.manager = CacheManager(self._engine, store=store)

    def ask(self, memory: AgentMemory, question: str, top_k: int, quality: Quality) -> Trial:
        self._engine.ran.clear()
        answer = memory.generate(
            question, top_k, max_tokens=ANSWER_TOKENS, temperature=0.0, store=False, quality=quality
        )
        *before, _ = self._engine.ran
        repaired = sum(done.reuse.computed for call, done in before if "part_of" in call.options)
        return Trial(answer.text, answer.reuse, 1000 * answer.ttft_s, len(self._engine.ran), repaired)

    def compute(self, memories: Sequence[Memory], question: str) -> Trial:
        """The prompt of these memories, oldest first, with nothing put back."""
        keys = [key for memory in memories for key in memory.chunk_ids]
        chunks = self.manager.chunk_records(keys)
        tokens = [token for key in keys for token in chunks[key].token_ids]
        (done,) = self._engine.run(
            [
                Call(
                    token_ids=(*tokens, *self.manager.prompts.fresh(question).token_ids),
                    max_tokens=ANSWER_TOKENS,
                    cache_salt=f"{COMPUTED}/{memories[0].scope.user_id}",
                )
            ]
        )
        return Trial(done.text.strip(), done.reuse, 1000 * done.ttft_s, 1, 0)

    def remember(self, exam: Exam, user: str, num_agents: int) -> None:
        """Store the facts of a world as memories of one user, by several agents in turn."""
        writers = [
            AgentMemory(self.manager, user_id=user, agent_id=f"writer {number}")
            for number in range(num_agents)
        ]
        for number, turn in enumerate(exam.world.turns.values()):
            writers[number % num_agents].store(turn.user, turn.assistant)


def measure(
    bench: Bench, qualities: Sequence[Quality], num_memories: int, num_cases: int, num_agents: int
) -> Iterator[dict[str, object]]:
    """One row for each quality, that of computing first."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for exam in exams(num_memories, num_cases):
        user = f"{num_memories} memories, world {exam.number}"
        bench.remember(exam, user, num_agents)
        reader = AgentMemory(bench.manager, user_id=user, agent_id="reader")
        top_k = len(exam.world.turns)
        for question in exam.questions:
            memories = sorted(reader.retrieve(question.text, top_k), key=lambda one: (one.created, one.id))
            ways: dict[str, Callable[[], Trial]] = {COMPUTED: partial(bench.compute, memories, question.text)}
            for quality in qualities:
                ways[quality] = partial(bench.ask, reader, question.text, top_k, quality)
            expected: Trial | None = None
            for name, way in ways.items():
                trial = way()
                expected = expected or trial
                found[name]["right"].append(trial.text == question.answer)
                found[name]["same_answer"].append(trial.text == expected.text)
                if question is exam.questions[0]:
                    _note_first(found[name], trial, way())
                    found[name]["memories_in_prompt"].append(len(memories))
    for name, values in found.items():
        times = {key: round(median(each), 2) for key, each in values.items() if key.startswith("ms")}
        yield {"quality": name, **{key: round(fmean(each), 5) for key, each in values.items()}, **times}


def _note_first(row: dict[str, list[float]], first: Trial, repeated: Trial) -> None:
    reuse = first.reuse
    prompt_tokens = reuse.exact + reuse.adapted + reuse.local + reuse.computed
    for name in ("exact", "adapted", "local", "computed"):
        row[name].append(getattr(reuse, name) / prompt_tokens)
    row["refused"].append(len(reuse.refused))
    row["prompt_tokens"].append(prompt_tokens)
    row["repaired_tokens"].append(first.repaired)
    row["requests"].append(first.requests)
    row["ms"].append(first.ms)
    row["requests_repeated"].append(repeated.requests)
    row["ms_repeated"].append(repeated.ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--memories", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--cases", type=int, default=100, help="questions for each number of memories")
    parser.add_argument("--quality", nargs="+", default=get_args(Quality), choices=get_args(Quality))
    parser.add_argument("--agents", type=int, default=3, help="that store the memories")
    parser.add_argument("--results", type=Path, help="file that gets a JSON line a measurement")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        engine = VllmEngine(
            args.model, {"store": str(store)}, dtype=DTYPE, max_model_len=MAX_MODEL_LEN, seed=0
        )
        bench = Bench(engine, store)
        with bench.manager:
            for num_memories in args.memories:
                for row in measure(bench, args.quality, num_memories, args.cases, args.agents):
                    print(f"{num_memories} memories  {row}", flush=True)
                    if args.results is not None:
                        _write(args, num_memories, row)


def _write(args: argparse.Namespace, num_memories: int, row: dict[str, object]) -> None:
    record = {
        "benchmark": "reuse_product",
        "model": args.model.name,
        "dtype": DTYPE,
        "memories": num_memories,
        "cases": args.cases,
        "agents": args.agents,
        **row,
        "provenance": provenance(),
    }
    with args.results.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
