"""What the plugin takes of memory: the engine's peak against one without it, and bytes per cached token."""

from __future__ import annotations

import os
import secrets
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.engine_speed.engines import SCOPE, BenchEngine, plan_of, random_tokens, stored
from kv_agent.chunks import ChunkKey, ChunkRecord
from kv_agent.kv.rope import RotaryScheme
from kv_agent.storage import blob_content
from kv_agent.storage.codecs import CODECS, Codec
from kv_agent.storage.store import LocalStore
from kv_agent.storage.tiers import Compressed
from kv_agent.vllm_plugin.salts import MAX_SALTS, SaltLedger

TURN_TOKENS = 1024
CACHE_BLOCKS = 32  # few, so that all of the engine's own cache is used in every arm
MOST_BEYOND_MB = 300
MOVED_CHUNKS = 10  # of a plan of five memories
SAMPLED_SALTS = 20_000
MB = 1e6
_HEAD_DIM, _ROPE_THETA = 64, 1e6  # of the model

Budgets = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One engine's: its peak, its tiers at the end, both in bytes, and KV it stored with the tokens."""

    peak_bytes: int
    tier_bytes: Mapping[str, int] = field(default_factory=dict)
    chunks: Sequence[tuple[ChunkRecord, Tensor]] = ()


def measure(
    model: Path, folder: Path, *, host_bytes: int, warm_bytes: int, num_turns: int
) -> Iterator[dict[str, Any]]:
    """``num_turns`` turns of 1,024 tokens have to be more than fits into both budgets."""
    none = {"host_bytes": 0, "warm_bytes": 0, "queue_bytes": 64 << 20}
    filled = none | {"host_bytes": host_bytes, "warm_bytes": warm_bytes}
    plain = _lived(model, None, None, num_turns)
    bare = _lived(model, folder / "no budgets", none, num_turns)
    full = _lived(model, folder / "budgets", filled, num_turns)
    in_tiers = sum(full.tier_bytes.values())
    yield {
        "part": "memory",
        "case": f"peak of the engine's process, {num_turns} turns of {TURN_TOKENS} tokens",
        "mb": {
            "no connector": round(plain.peak_bytes / MB),
            "no copies in memory": round(bare.peak_bytes / MB),
            "budgets filled": round(full.peak_bytes / MB),
        },
        "budgets_mb": {name: round(value / MB) for name, value in filled.items()},
        "tiers_mb": {name: round(value / MB) for name, value in full.tier_bytes.items()},
        # What waits to be written counts as beyond, although queue_bytes bounds it, too.
        "beyond_budgets_mb": {
            "no copies in memory": round((bare.peak_bytes - plain.peak_bytes) / MB),
            "budgets filled": round((full.peak_bytes - plain.peak_bytes - in_tiers) / MB),
        },
        "most_mb": MOST_BEYOND_MB,
    }
    yield {
        "part": "memory",
        "case": f"{MAX_SALTS:,} different plans remembered, of {MOVED_CHUNKS} moved chunks each",
        "mb": round(_salts_bytes() / MB),
    }
    yield from _bytes_per_token(full.chunks)


def _lived(model: Path, root: Path | None, budgets: Budgets | None, num_turns: int) -> Life:
    """Turns are computed and, with a store, captured; then each is put back as KV."""
    others = _descendants(os.getpid())
    settings = None if root is None else {"store": str(root), **(budgets or {})}
    options = {"num_gpu_blocks_override": CACHE_BLOCKS, "max_model_len": 2 * TURN_TOKENS}
    with closing(BenchEngine(model, settings, disable_log_stats=False, **options)) as engine:
        engine.ask([1])
        started = _forget_peaks(_descendants(os.getpid()) - others)
        turns = [random_tokens(TURN_TOKENS, seed=seed) for seed in range(num_turns)]
        if root is None:
            for turn in turns:
                engine.ask([*turn, 1])
                engine.forget_local()
            return Life(peak_bytes=_peak_bytes(started))
        with closing(LocalStore(root, host_bytes=0)) as store:
            found = [stored(store.catalog, engine.ask(turn, scope=SCOPE)) for turn in turns]
            for number, (turn, records) in enumerate(zip(turns, found, strict=True)):
                asked = {"scope": SCOPE, "store": False, "plan": plan_of(records)}
                engine.forget_local()
                answer = engine.ask([*turn, 1], salt=str(number), **asked)
                if not answer.fields["exact"]:
                    raise RuntimeError(f"turn {number} was not put back: {answer.fields['refused']}")
            time.sleep(1.1)  # gauges are looked at once a second
            engine.ask([1, 2])
            chunks = [(record, store.load(record).kv_L2THD) for record in found[0]]
        return Life(peak_bytes=_peak_bytes(started), tier_bytes=_tier_bytes(), chunks=chunks)


def _bytes_per_token(chunks: Sequence[tuple[ChunkRecord, Tensor]]) -> Iterator[dict[str, Any]]:
    """Of one turn, in each tier and, with the file's header, by each codec on disk."""
    half = _HEAD_DIM // 2
    scheme = RotaryScheme(
        inv_freq=tuple(_ROPE_THETA ** (-i / half) for i in range(half)), rotary_dim=_HEAD_DIM, neox=True
    )
    num_bytes = {
        "host": sum(kv_L2THD.nbytes for _, kv_L2THD in chunks),
        "warm": sum(Compressed().hold(kv_L2THD).nbytes for _, kv_L2THD in chunks),
    }
    for name in CODECS:
        codec = Codec(name=name, scheme=scheme)
        payloads = {record.key: codec.encode(kv_L2THD, record.start) for record, kv_L2THD in chunks}
        num_bytes[f"disk, {name}"] = len(blob_content.encode(payloads, chunks[0][0].fingerprint))
    num_tokens = sum(record.num_tokens for record, _ in chunks)
    for case, count in num_bytes.items():
        yield {
            "part": "memory",
            "case": f"a token: {case}",
            "bytes": round(count / num_tokens, 1),
            "of_host": round(count / num_bytes["host"], 3),
        }


def _salts_bytes() -> int:
    """What the scheduler's half remembers of as many plans as it does, reckoned from some of them."""
    tracemalloc.start()
    ledger = SaltLedger()
    for _ in range(SAMPLED_SALTS):
        ends = range(256, 256 + 128 * MOVED_CHUNKS, 128)
        moves = tuple((start, start + 128, ChunkKey(secrets.token_hex(16)), 0) for start in ends)
        ledger.record(secrets.token_hex(16), moves)
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return num_bytes * MAX_SALTS // SAMPLED_SALTS


def _tier_bytes() -> dict[str, int]:
    """What the engine that runs has in its tiers, as it told last."""
    from prometheus_client import REGISTRY

    found = [
        one for metric in REGISTRY.collect() if metric.name == "kv_agent_tier_bytes" for one in metric.samples
    ]
    return {sample.labels["tier"]: int(sample.value) for sample in found}


def _forget_peaks(pids: set[int]) -> set[int]:
    """Starting takes more than serving does: what counts is the most from now on."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return pids


def _peak_bytes(pids: set[int]) -> int:
    """The most that these processes had at one time, each for itself."""
    return sum(map(_high_water, pids))


def _high_water(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
        (found,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return found * 1024


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has ended
            for child in (task / "children").read_text().split():
                found |= {int(child)} | _descendants(int(child))
    return found
