"""How much an answer changes when its memories come back as KV: the same prompts, tokens and engine.

    python -m benchmarks.reuse_quality examples/models/recall --results results.jsonl
    python -m benchmarks.reuse_quality examples/models/recall --standard    # the set of reuse/settings.py
    python -m benchmarks.reuse_quality MODEL --task stories    # any language model: it is its own text

Every way of getting the memories' KV is compared with computing all of the prompt. ``right`` is the share of
exact answers, ``agreed`` the share of greedy tokens before the first that differs, ``kl`` the divergence of
the next-token distribution at each position of the fresh turn, for the first ``--kl-cases``. ``distance`` is
how many positions a memory was moved (neutral turns not counted), ``longest`` the longest prompt in tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from transformers import AutoConfig

from benchmarks.provenance import provenance
from benchmarks.reuse.cases import Case, Tokens, recall_cases, story_cases
from benchmarks.reuse.lab import DTYPE, Lab, Plan
from benchmarks.reuse.measures import Logprobs, agreed, divergence, worst_of_likely
from benchmarks.reuse.settings import LONGEST_CONTEXT, STANDARD, Planned, Setting
from benchmarks.reuse.ways import Way, ways
from kv_agent.chunks import RAW
from kv_agent.engines.base import Completion
from kv_agent.prompting import ChatPrompts
from kv_agent.storage.codecs import CODECS

ANSWER_TOKENS = 16
GREEDY_TOKENS = 64
FRESH_TOKENS = 24
NUM_STORIES = 60
BATCH_CASES = 40


class Answered(NamedTuple):
    """An answer to a case, and the log-probabilities behind each token of its fresh turn, if wanted."""

    case: Case
    plan: Plan
    done: Completion
    following: list[Logprobs]


def measure(
    lab: Lab, cases: Sequence[Case], chosen: Mapping[str, Way], num_tokens: int, kl_cases: int
) -> Iterator[dict[str, object]]:
    """One row a way, means over the cases; the first way is what the others are compared with."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for batch, wants_kl in _batches(cases, kl_cases):
        expected: list[Answered] = []
        for name, way in chosen.items():
            plans = lab.plans(way(case) for case in batch)
            prompts = list(zip(batch, plans, strict=True))
            done = lab.answers(prompts, num_tokens, with_logprobs=wants_kl)
            following = [lab.next_tokens(*prompt) if wants_kl else [] for prompt in prompts]
            answered = [Answered(*each) for each in zip(batch, plans, done, following, strict=True)]
            expected = expected or answered
            for one, other in zip(expected, answered, strict=True):
                assert not other.done.reuse.refused, (name, other.done.reuse.refused)
                for key, value in _compared(one, other):
                    found[name][key].append(value)
    for name, values in found.items():
        means = {key: round(fmean(each), 5) for key, each in values.items()}
        yield {"way": name, **means, "longest": max(len(case.prompt) for case in cases)}


def _batches(cases: Sequence[Case], kl_cases: int) -> Iterator[tuple[Sequence[Case], bool]]:
    """Cases that are answered together, and whether divergence is measured: it is of the first."""
    for part, wants_kl in ((cases[:kl_cases], True), (cases[kl_cases:], False)):
        for start in range(0, len(part), BATCH_CASES):
            yield part[start : start + BATCH_CASES], wants_kl


def _compared(expected: Answered, other: Answered) -> Iterator[tuple[str, float]]:
    case, done = other.case, other.done
    if case.answer is not None:
        yield "right", done.text.strip() == case.answer
        yield "same_answer", done.text == expected.done.text
    yield "agreed", agreed(expected.done.token_ids, done.token_ids)
    if other.following:
        positions = zip(expected.following, other.following, strict=True)
        yield "logprob_difference", worst_of_likely(expected.done.logprobs[0], done.logprobs[0])
        yield "kl", fmean(divergence(one, two) for one, two in positions)
    yield "exact_tokens", done.reuse.exact
    yield "adapted_tokens", done.reuse.adapted
    yield "memory_tokens", case.memory_tokens
    yield "repaired_tokens", other.plan.repaired
    yield "distance", case.distance


def measure_all(model: Path, planned: Iterable[Planned], results: Path | None) -> None:
    """One engine for all settings with the same chunks, one after the other."""
    config = AutoConfig.from_pretrained(model)
    for (chunk_tokens, codec), group in groupby(
        planned, key=lambda one: (one.setting.chunk_tokens, one.setting.codec)
    ):
        with tempfile.TemporaryDirectory() as folder:
            lab = Lab.open(
                model,
                Path(folder),
                max_model_len=min(LONGEST_CONTEXT, config.max_position_embeddings),
                chunk_tokens=chunk_tokens,
                vocabulary=config.vocab_size,
                codec=codec,
            )
            try:
                for one in group:
                    _measure_one(lab, one, model.name, results)
            finally:
                lab.close()


def _measure_one(lab: Lab, planned: Planned, model: str, results: Path | None) -> None:
    started, setting = time.perf_counter(), planned.setting
    print(setting, flush=True)
    every_way = ways(ChatPrompts(lab.engine.tokenizer).neutral)
    chosen = {name: every_way[name] for name in planned.ways} if planned.ways else every_way
    num_tokens = ANSWER_TOKENS if setting.task == "recall" else GREEDY_TOKENS
    for row in measure(lab, list(_cases(lab, setting)), chosen, num_tokens, planned.kl_cases):
        _show(row)
        if results is not None:
            record = {"benchmark": "reuse_quality", "model": model, "dtype": DTYPE, **asdict(setting)}
            with results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record | row | {"provenance": provenance()}) + "\n")
    print(f"  {time.perf_counter() - started:.0f} s", flush=True)


def _cases(lab: Lab, setting: Setting) -> Iterator[Case]:
    if setting.task == "recall":
        yield from recall_cases(
            ChatPrompts(lab.engine.tokenizer),
            setting.memories,
            setting.cases,
            system_prompt=setting.system,
            before_tokens=setting.before_tokens,
            filler_tokens=setting.filler_tokens,
            shuffled=setting.shuffled,
            facts_per_memory=setting.facts_per_memory,
        )
    else:
        begin: Tokens = (lab.engine.tokenizer.bos_token_id,)
        stories = lab.sample(begin, setting.story_tokens + FRESH_TOKENS, NUM_STORIES)
        yield from story_cases(
            stories,
            setting.memories,
            setting.cases,
            memory_tokens=setting.story_tokens,
            fresh_tokens=FRESH_TOKENS,
        )


def _show(row: dict[str, object]) -> None:
    shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
    print(f"  {row['way']}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--standard", action="store_true", help="the standard set; other settings are ignored"
    )
    parser.add_argument("--task", choices=("recall", "stories"), default="recall")
    parser.add_argument("--memories", type=int, nargs="+", default=[1, 2, 5, 20])
    parser.add_argument("--cases", type=int, default=100, help="questions in each setting")
    parser.add_argument("--kl-cases", type=int, default=20)
    parser.add_argument("--system", help="system prompt that begins every sequence")
    parser.add_argument(
        "--before-tokens",
        type=int,
        nargs="+",
        default=[0],
        help="other talk before each memory when it was computed",
    )
    parser.add_argument(
        "--filler-tokens", type=int, nargs="+", default=[0], help="other talk in front of the memories now"
    )
    parser.add_argument("--shuffled", action="store_true", help="memories in any order, not that of time")
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--codec", nargs="+", default=[RAW], choices=CODECS)
    parser.add_argument("--facts-per-memory", type=int, default=1)
    parser.add_argument("--story-tokens", type=int, default=48, help="of a story that is a memory")
    parser.add_argument(
        "--ways", nargs="+", default=[], help="names of ways, the yardstick first; default all"
    )
    parser.add_argument("--results", type=Path, help="file that gets a JSON line a measurement")
    args = parser.parse_args()
    measure_all(args.model, STANDARD if args.standard else _planned(args), args.results)


def _planned(args: argparse.Namespace) -> list[Planned]:
    """Every combination of the values given, those with the same chunks together."""
    lists = (args.codec, args.chunk_tokens, args.before_tokens, args.filler_tokens, args.memories)
    return [
        Planned(
            Setting(
                task=args.task,
                memories=memories,
                cases=args.cases,
                system=args.system,
                before_tokens=before_tokens,
                filler_tokens=filler_tokens,
                shuffled=args.shuffled,
                chunk_tokens=chunk_tokens,
                facts_per_memory=args.facts_per_memory,
                story_tokens=args.story_tokens,
                codec=codec,
            ),
            tuple(args.ways),
            args.kl_cases,
        )
        for codec, chunk_tokens, before_tokens, filler_tokens, memories in product(*lists)
    ]


if __name__ == "__main__":
    main()
