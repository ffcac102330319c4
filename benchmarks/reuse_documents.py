"""Documents within a question: how much of them comes back as KV, and what that does to the answer.

    python -m benchmarks.reuse_documents examples/models/recall --results results.jsonl

One agent stores two documents, each a list of facts in one text. Another agent of the same user asks about a
fact with both in its question: in the other order, behind a beginning and with new text between. Nothing is
searched; the documents are found by their content. ``computed`` is the same prompt with nothing put back.
Shares are of the prompt; ``again`` is the same prompt once more, when what was computed between is known.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median

from benchmarks.provenance import provenance
from benchmarks.reuse.cases import exams
from benchmarks.reuse.lab import DTYPE
from benchmarks.reuse_product import MAX_MODEL_LEN, Bench, Quality, Trial
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.memory import AgentMemory

BEGINNING = "Hello again, here is what I know so far."
BETWEEN = "That was the first list. Now comes the second."
_QUESTIONS_PER_WORLD = 4  # that `exams` draws; here the first of each world is asked
QUALITIES: dict[str, Quality] = {"computed": "exact", "fast": "fast", "balanced": "balanced"}


def measure(bench: Bench, facts_per_document: int, num_cases: int) -> Iterator[dict[str, object]]:
    """One row a quality, that of computing first."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for exam in exams(2 * facts_per_document, _QUESTIONS_PER_WORLD * num_cases):
        told = [turn.user for turn in exam.world.turns.values()]
        half = len(told) // 2
        one, other = " ".join(told[:half]), " ".join(told[half:])
        question = exam.questions[0]
        asked = f"{BEGINNING} {other} {BETWEEN} {one} {question.text}"
        expected: str | None = None
        for name, quality in QUALITIES.items():
            user = f"{facts_per_document} facts, world {exam.number}, {name}"  # they share no prefix cache
            librarian = AgentMemory(bench.manager, user_id=user, agent_id="librarian")
            librarian.store(one)
            librarian.store(other)
            asker = AgentMemory(bench.manager, user_id=user, agent_id="asker")
            first, again = (bench.ask(asker, asked, 0, quality) for _ in range(2))
            expected = expected or first.text
            found[name]["right"].append(first.text == question.answer)
            found[name]["same_answer"].append(first.text == expected)
            _note(found[name], first, "")
            _note(found[name], again, "_again")
    for name, values in found.items():
        times = {key: round(median(each), 2) for key, each in values.items() if key.startswith("ms")}
        yield {"quality": name, **{key: round(fmean(each), 4) for key, each in values.items()}, **times}


def _note(row: dict[str, list[float]], trial: Trial, when: str) -> None:
    reuse = trial.reuse
    prompt_tokens = reuse.exact + reuse.adapted + reuse.local + reuse.computed
    row[f"reused{when}"].append((reuse.exact + reuse.adapted + reuse.local) / prompt_tokens)
    row[f"adapted{when}"].append(reuse.adapted / prompt_tokens)
    row[f"requests{when}"].append(trial.requests)
    row[f"ms{when}"].append(trial.ms)
    if not when:
        row["prompt_tokens"].append(prompt_tokens)


def measure_all(model: Path, facts: Sequence[int], num_cases: int, results: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        engine = VllmEngine(model, {"store": str(store)}, dtype=DTYPE, max_model_len=MAX_MODEL_LEN, seed=0)
        bench = Bench(engine, store)
        with bench.manager:
            for facts_per_document in facts:
                for row in measure(bench, facts_per_document, num_cases):
                    record = {
                        "benchmark": "reuse_documents",
                        "model": model.name,
                        "dtype": DTYPE,
                        "facts_per_document": facts_per_document,
                        "cases": num_cases,
                        **row,
                        "provenance": provenance(),
                    }
                    print(f"{facts_per_document} facts a document  {row}", flush=True)
                    if results is not None:
                        with results.open("a", encoding="utf-8") as lines:
                            lines.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--facts", type=int, nargs="+", default=[10, 20, 40], help="in each of two documents")
    parser.add_argument("--cases", type=int, default=60, help="questions for each size")
    parser.add_argument("--results", type=Path, help="file that gets a JSON line a measurement")
    args = parser.parse_args()
    measure_all(args.model, args.facts, args.cases, args.results)


if __name__ == "__main__":
    main()
