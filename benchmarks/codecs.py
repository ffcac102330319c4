"""What each codec makes of KV: bytes per token, and how fast it writes and reads, against a plain copy.

    python -m benchmarks.codecs examples/models/recall --results results.jsonl
    python -m benchmarks.codecs MODEL --task stories --results results.jsonl
    python -m benchmarks.codecs --report results.jsonl    # the table of docs/storage.md

The KV is what the model computes of its own turns, in bfloat16: facts of the test split, one turn each, or
beginnings of stories that it wrote. Sizes are of those turns. Speed is that of all of them joined
into chunks of 128 tokens, in bytes of KV per second; a copy of the same bytes with torch is the yardstick.
What codecs do to answers is measured by ``reuse_quality --codec``, whose lines the report wants in the same
file: memories in their own place, so that nothing but the codec differs from computing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.provenance import provenance
from benchmarks.reuse.cases import Tokens, exams
from kv_agent.chunks import RAW
from kv_agent.kv.rope import RotaryScheme
from kv_agent.prompting import ChatPrompts
from kv_agent.storage.codecs import CODECS, Codec, Payload

CHUNK_TOKENS = 128
NUM_TURNS = 60
STORY_TOKENS = 48
ROUNDS = 15


def turns_of(model: PreTrainedModel, folder: Path, task: str) -> list[Tokens]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task == "recall":
        prompts = ChatPrompts(tokenizer)
        facts = (turn for exam in exams(20, NUM_TURNS) for turn in exam.world.turns.values())
        return [prompts.turn(turn.user, turn.assistant) for turn in facts][:NUM_TURNS]
    torch.manual_seed(0)
    begin = torch.full((NUM_TURNS, 1), tokenizer.bos_token_id)
    stories = model.generate(begin, max_length=STORY_TOKENS, do_sample=True, top_k=0, pad_token_id=0)
    return [tuple(story) for story in stories.tolist()]


@torch.inference_mode()
def kv_of(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """KV of a turn at the start of a sequence -> bfloat16 [L, 2, T, H, D]."""
    cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
    return torch.stack(layers).transpose(2, 3).contiguous().bfloat16()


def scheme_of(model: PreTrainedModel) -> RotaryScheme:
    inv_freq = model.model.rotary_emb.inv_freq.double().tolist()
    return RotaryScheme(inv_freq=tuple(inv_freq), rotary_dim=2 * len(inv_freq), neox=True)


def seconds(work: Callable[[], object]) -> float:
    """Median of some rounds, after one that does not count."""
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def measure(kvs: Sequence[Tensor], scheme: RotaryScheme) -> Iterator[dict[str, object]]:
    """One row a codec."""
    joined = torch.cat(list(kvs), dim=2)
    chunks = [chunk.contiguous() for chunk in joined.split(CHUNK_TOKENS, dim=2)]
    raw_bytes, num_tokens = joined.nbytes, joined.shape[2]
    copy_s = seconds(lambda: [chunk.clone() for chunk in chunks])
    for name in CODECS:
        codec = Codec(name=name, scheme=scheme)
        stored_bytes = sum(codec.encode(kv, 0).nbytes for kv in kvs)
        payloads = [codec.encode(chunk, 0) for chunk in chunks]
        row: dict[str, object] = {
            "codec": name,
            "tokens_per_turn": round(num_tokens / len(kvs), 1),
            "bytes_per_token": round(stored_bytes / num_tokens, 1),
            "share_of_raw": round(stored_bytes / raw_bytes, 4),
            "share_of_raw_128": round(sum(one.nbytes for one in payloads) / raw_bytes, 4),
        }
        if name != RAW:  # with which nothing is done
            encode_s = seconds(partial(_encode_all, codec, chunks))
            decode_s = seconds(partial(_decode_all, codec, payloads))
            row["encode_gb_s"] = round(raw_bytes / encode_s / 1e9, 3)
            row["decode_gb_s"] = round(raw_bytes / decode_s / 1e9, 3)
            row["encode_of_copy"] = round(copy_s / encode_s, 4)
            row["decode_of_copy"] = round(copy_s / decode_s, 4)
        yield row


def _encode_all(codec: Codec, chunks: Sequence[Tensor]) -> None:
    for chunk in chunks:
        codec.encode(chunk, 0)


def _decode_all(codec: Codec, payloads: Sequence[Payload]) -> None:
    for one in payloads:
        codec.decode(one, 0)


def report(results: Path) -> None:
    """The table, from the latest line of each measurement."""
    sizes: dict[tuple[str, str], dict[str, Any]] = {}
    answers: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["benchmark"] == "codecs":
            sizes[row["model"], row["codec"]] = row
        elif row["way"] == "exact":
            answers[row["task"], row["codec"], row["memories"]] = row
    models = list(dict.fromkeys(model for model, _ in sizes))
    recall = sorted({number for task, _, number in answers if task == "recall"})
    stories = sorted({number for task, _, number in answers if task == "stories"})
    print(
        "| codec |" + "".join(f" bytes per token, {model} (of raw) |" for model in models)
        + " chunks of 128 tokens (of raw) | writes, GB/s (of a copy) | reads, GB/s (of a copy) |"
        + "".join(f" {number} memories: right; same answer; log-probability off by |" for number in recall)
        + "".join(" stories: 64 greedy tokens the same; off by |" for _ in stories)
    )  # fmt: skip
    print("|" + " --- |" * (1 + len(models) + 3 + len(recall) + len(stories)))
    for codec in CODECS:
        first = sizes[models[0], codec]
        cells = [f"`{codec}`"]
        for model in models:
            row = sizes[model, codec]
            cells.append(f"{row['bytes_per_token']:.0f} ({row['share_of_raw']:.3f})")
        cells.append(f"{first['share_of_raw_128']:.3f}")
        for what in ("encode", "decode"):
            speed = first.get(f"{what}_gb_s")
            cells.append("" if speed is None else f"{speed:.2f} ({first[f'{what}_of_copy']:.3f})")
        same = codec.partition("+")[0]  # compressing changes no bit
        for number in recall:
            row = answers["recall", same, number]
            cells.append(f"{row['right']:.3f}; {row['same_answer']:.3f}; {row['logprob_difference']:.4f}")
        for number in stories:
            row = answers["stories", same, number]
            cells.append(f"{row['agreed']:.3f}; {row['logprob_difference']:.3f}")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--report", type=Path, help="file of results to print as a table")
    parser.add_argument("--task", choices=("recall", "stories"), default="recall")
    parser.add_argument("--results", type=Path, help="file that gets a JSON line a codec")
    args = parser.parse_args()
    if args.report is not None:
        report(args.report)
        return
    if args.model is None:
        parser.error("name a model, or --report FILE")
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    kvs = [kv_of(model, turn) for turn in turns_of(model, args.model, args.task)]
    for row in measure(kvs, scheme_of(model)):
        print(row, flush=True)
        if args.results is not None:
            record = {"benchmark": "codecs", "model": args.model.name, **row, "provenance": provenance()}
            with args.results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
