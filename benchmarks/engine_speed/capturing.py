"""What capturing costs a server that is busy with chat turns: throughput and time to first token."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engine_speed.engines import SCOPE, Answer, Ask, BenchEngine, random_tokens
from benchmarks.storage_speed.timing import ratios, spread

AT_ONCE = 16
ANSWER_TOKENS = 16
_QUEUE_BYTES = 2 << 30


def measure(model: Path, folder: Path, num_requests: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Prompts of 200 to 4,000 tokens, the same in every arm of a round and new in every round."""
    with ExitStack() as stack:
        settings = {
            "store": str(folder),
            "host_bytes": 256 << 20,
            "warm_bytes": 0,
            "queue_bytes": _QUEUE_BYTES,
        }
        plain = stack.enter_context(closing(BenchEngine(model, max_num_seqs=AT_ONCE)))
        ours = stack.enter_context(closing(BenchEngine(model, settings, max_num_seqs=AT_ONCE)))
        arms: dict[str, tuple[BenchEngine, dict[str, Any]]] = {
            "no connector": (plain, {}),
            "capture off": (ours, {}),
            "capture on": (ours, {"scope": SCOPE}),
        }
        per_s: dict[str, list[float]] = {name: [] for name in arms}
        ttft: dict[str, list[float]] = {name: [] for name in arms}
        captured = 0
        for number in range(rounds + 1):
            prompts = _prompts(num_requests if number else 2, seed=number)
            names = list(arms)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                engine, options = arms[name]
                # Each arm has texts of its own: nothing of another arm's may be found.
                texts = [[1 + names.index(name), *prompt] for prompt in prompts]
                engine.forget_local()
                began = time.perf_counter()
                answers = engine.run([_ask(text, options) for text in texts], AT_ONCE)
                seconds = time.perf_counter() - began
                if number == 0:  # does not count
                    continue
                per_s[name].append(sum(map(len, texts)) / seconds)
                ttft[name].append(_median_ttft(answers))
                captured += sum("turn_id" in answer.fields for answer in answers)
        if captured != rounds * num_requests:
            raise RuntimeError(f"only {captured} of {rounds * num_requests} turns were captured")
    for name in arms:
        yield {
            "part": "capture",
            "case": name,
            "requests": num_requests,
            "at_once": AT_ONCE,
            "prompt_tokens_per_s": spread(per_s[name], 1),
            "throughput_of_no_connector": ratios(per_s[name], per_s["no connector"]),
            "ttft_ms": spread([1e3 * one for one in ttft[name]], 1),
            "ttft_of_no_connector": ratios(ttft[name], ttft["no connector"]),
        }


def _prompts(count: int, seed: int) -> list[list[int]]:
    """The same lengths in every round, in any order: from 200 to 4,000, most of them short as in chats."""
    rng = random.Random(seed)
    lengths = [round(200 * 20 ** ((i / max(1, count - 1)) ** 6)) for i in range(count)]
    rng.shuffle(lengths)
    return [random_tokens(length, seed=rng.randrange(1 << 30)) for length in lengths]


def _ask(token_ids: Sequence[int], options: dict[str, Any]) -> Ask:
    return Ask(token_ids=token_ids, max_tokens=ANSWER_TOKENS, options=options)


def _median_ttft(answers: Sequence[Answer]) -> float:
    return median(answer.ttft_s for answer in answers)
