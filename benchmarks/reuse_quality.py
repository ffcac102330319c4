"""How much an answer changes when its memories come back as KV: the same prompts, tokens and engine.

    python -m benchmarks.reuse_quality examples/models/recall --results results.jsonl
    python -m benchmarks.reuse_quality MODEL --task stories    # any language model: it is its own text

Every way of getting the memories' KV is compared with computing all of the prompt. ``right`` is the share of
exact answers, ``agreed`` the share of greedy tokens before the first that differs, ``kl`` the divergence of
the next-token distribution at each position of the fresh turn, for the first ``--kl-cases``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from transformers import AutoConfig

from benchmarks.provenance import provenance
from benchmarks.reuse.cases import Case, Tokens, recall_cases, story_cases
from benchmarks.reuse.lab import Lab
from benchmarks.reuse.measures import agreed, divergence, worst_of_likely
from benchmarks.reuse.ways import Way, ways
from kv_agent.prompting import ChatPrompts

ANSWER_TOKENS = 16
GREEDY_TOKENS = 64
FRESH_TOKENS = 24
NUM_STORIES = 60


def measure(
    lab: Lab, cases: list[Case], chosen: dict[str, Way], num_tokens: int, kl_cases: int
) -> Iterator[dict[str, object]]:
    """One row a way, means over the cases; the first way is what the others are compared with."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, case in enumerate(cases):
        wants_kl = number < kl_cases
        expected, positions = None, None
        for name, way in chosen.items():
            plan = way(lab, case)
            done = lab.answer(case, plan, num_tokens, with_logprobs=wants_kl)
            following = lab.next_tokens(case, plan) if wants_kl else []
            if expected is None or positions is None:
                expected, positions = done, following
            row = found[name]
            if case.answer is not None:
                row["right"].append(done.text.strip() == case.answer)
                row["same_answer"].append(done.text == expected.text)
            row["agreed"].append(agreed(expected.token_ids, done.token_ids))
            if wants_kl:
                row["logprob_difference"].append(worst_of_likely(expected.logprobs[0], done.logprobs[0]))
                row["kl"].append(fmean(divergence(a, b) for a, b in zip(positions, following, strict=True)))
            reuse = done.reuse
            row["exact_tokens"].append(reuse.exact)
            row["adapted_tokens"].append(reuse.adapted)
            row["memory_tokens"].append(len(case.prompt) - len(case.fresh))
            row["repaired_tokens"].append(plan.repaired)
            assert not reuse.refused, (name, reuse.refused)
    for name, values in found.items():
        yield {"way": name, **{key: round(fmean(each), 5) for key, each in values.items()}}


def ways_with(lab: Lab) -> dict[str, Way]:
    prompts = ChatPrompts(lab.engine.tokenizer)
    return ways(prompts.neutral)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", choices=("recall", "stories"), default="recall")
    parser.add_argument("--memories", type=int, nargs="+", default=[1, 2, 5, 20])
    parser.add_argument("--cases", type=int, default=100, help="questions for each number of memories")
    parser.add_argument("--kl-cases", type=int, default=20)
    parser.add_argument("--system", help="system prompt that begins every sequence")
    parser.add_argument("--before", type=int, default=0, help="turns before each memory when it was computed")
    parser.add_argument("--shuffled", action="store_true", help="memories in any order, not that of time")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--memory-tokens", type=int, default=48, help="of a story")
    parser.add_argument("--only", nargs="*", default=[""], help="ways whose name contains one of these")
    parser.add_argument("--results", type=Path, help="file that gets a JSON line a measurement")
    args = parser.parse_args()
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab.open(
            args.model,
            Path(folder),
            max_model_len=2048,
            chunk_tokens=args.chunk_tokens,
            vocabulary=vocabulary,
        )
        try:
            for num_memories in args.memories:
                started = time.perf_counter()
                cases = list(_cases(lab, args, num_memories))
                names = {
                    name: way
                    for name, way in ways_with(lab).items()
                    if name == "computed" or any(part in name for part in args.only)
                }
                num_tokens = ANSWER_TOKENS if args.task == "recall" else GREEDY_TOKENS
                for row in measure(lab, cases, names, num_tokens, args.kl_cases):
                    _show(num_memories, row)
                    if args.results:
                        _write(args, num_memories, row)
                print(f"{time.perf_counter() - started:.0f} s", flush=True)
        finally:
            lab.close()


def _cases(lab: Lab, args: argparse.Namespace, num_memories: int) -> Iterator[Case]:
    if args.task == "recall":
        prompts = ChatPrompts(lab.engine.tokenizer)
        yield from recall_cases(
            prompts,
            num_memories,
            args.cases,
            system_prompt=args.system,
            num_before=args.before,
            shuffled=args.shuffled,
        )
    else:
        begin: Tokens = (lab.engine.tokenizer.bos_token_id,)
        stories = lab.sample(begin, args.memory_tokens + FRESH_TOKENS, NUM_STORIES)
        yield from story_cases(
            stories,
            num_memories,
            args.cases,
            memory_tokens=args.memory_tokens,
            fresh_tokens=FRESH_TOKENS,
        )


def _show(num_memories: int, row: dict[str, object]) -> None:
    shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
    print(f"{num_memories:3} memories  {row['way']}: {shown}", flush=True)


def _write(args: argparse.Namespace, num_memories: int, row: dict[str, object]) -> None:
    record = {
        "benchmark": "reuse_quality",
        "model": args.model.name,
        "task": args.task,
        "memories": num_memories,
        "cases": args.cases,
        "before": args.before,
        "shuffled": args.shuffled,
        "system": args.system,
        "chunk_tokens": args.chunk_tokens,
        **row,
        "provenance": provenance(),
    }
    with args.results.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
