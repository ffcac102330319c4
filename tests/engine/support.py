"""Requests in a few words for tests on a real engine, and where the test models are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

from kv_agent.chunks import ChunkKey, ChunkRecord, TurnId
from kv_agent.engines.base import Call, Completion
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = REPOSITORY / "examples" / "models"
RECALL_MODEL = MODELS / "recall"
_STORIES = REPOSITORY.parent / "shared" / "models" / "stories260K-hd32"

# Real English weights where they are at hand; their licence keeps them out of the repository.
EXACTNESS_MODEL = _STORIES if _STORIES.is_dir() else RECALL_MODEL

BLOCK = 32
CHUNK = 256  # turns of up to 64 tokens are one chunk
HOST_BYTES = 8 << 20  # small enough that tests can push a chunk out of host memory

ENGINE_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": BLOCK,
    "max_model_len": 1024,
    "max_num_batched_tokens": 128,  # prompts longer than this are prefilled in several steps
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 80,
    "disable_log_stats": False,
    "seed": 0,
}

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the big park. "
    "One day, she saw a red ball under a tree. She wanted to play with it, but a big dog was sleeping "
    "next to it. Lily was scared. Her mom said, do not be afraid, the dog is nice. Lily took the ball "
    "and the dog woke up. They played together all day and became best friends. Then the sun went down "
    "and they went home to eat. "
)
OTHER_STORY = (
    "Tom had a blue boat. He put the boat on the water and it went far away. Tom was sad and he cried. "
    "A kind bird saw him and said, I can help you. The bird flew over the lake and pushed the boat back. "
)
QUESTION = "The next day, Lily and Tom went to the park and"


def open_engine(store: Path, **options: Any) -> VllmEngine:
    settings = {"store": str(store), "chunk_tokens": CHUNK, "host_bytes": HOST_BYTES, "warm_bytes": 0}
    return VllmEngine(EXACTNESS_MODEL, settings, **(ENGINE_OPTIONS | options))


def scope(user: str = "u", namespace: str = "default", **rest: str) -> dict[str, str]:
    return {"namespace": namespace, "user_id": user, **rest}


def encode(engine: VllmEngine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.encode(text, add_special_tokens=False))


def run(
    engine: VllmEngine,
    token_ids: Sequence[int],
    *,
    max_tokens: int = 24,
    salt: str | None = None,
    **options: Any,
) -> Completion:
    (completion,) = engine.run(
        [
            Call(
                token_ids=tuple(token_ids),
                max_tokens=max_tokens,
                options=options,
                cache_salt=salt,
                ignore_eos=True,
                logprobs=5,
            )
        ]
    )
    return completion


def plan(
    records: Iterable[ChunkRecord], *, fresh_start: int, at: Sequence[int] | None = None
) -> dict[str, Any]:
    """A plan that puts the chunks one behind the other, or ``at`` given positions."""
    placements, position = [], 0
    for index, record in enumerate(records):
        start = at[index] if at is not None else position
        placements.append({"chunk_id": record.key, "start": start})
        position = start + record.num_tokens
    return {"placements": placements, "fresh_start": fresh_start}


def wait_stored(catalog: Catalog, turn_id: TurnId | None, timeout_s: float = 20.0) -> list[ChunkRecord]:
    """The content chunks of a turn, once it is durable."""
    assert turn_id is not None, "the request captured nothing"
    deadline = time.monotonic() + timeout_s
    while not catalog.known_turns([turn_id]):
        assert time.monotonic() < deadline, "the turn was not stored"
        time.sleep(0.01)
    keys = catalog.turns([turn_id])[turn_id].chunk_keys
    records = catalog.chunks(keys)
    return [records[key] for key in keys]


def capture(
    engine: VllmEngine, catalog: Catalog, token_ids: Sequence[int], **options: Any
) -> list[ChunkRecord]:
    """Compute ``token_ids`` once, store them, and return their chunks."""
    options = {"scope": scope(), **options}
    done = run(engine, token_ids, max_tokens=1, **options)
    return wait_stored(catalog, done.turn_id)


def tokens_of(records: Iterable[ChunkRecord]) -> tuple[int, ...]:
    return tuple(token for record in records for token in record.token_ids)


def max_logprob_difference(one: Completion, other: Completion) -> float:
    """Largest difference over the tokens that both list among their top ones, at equal positions."""
    worst = 0.0
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        for token in mine.keys() & theirs.keys():
            worst = max(worst, abs(mine[token] - theirs[token]))
    return worst


def refusals(completion: Completion) -> dict[ChunkKey, str]:
    return {ChunkKey(refused.chunk_id): refused.reason for refused in completion.reuse.refused}


def assembled_logprobs(
    model: torch.nn.Module, chunks: Sequence[ChunkRecord], fresh: Sequence[int], generated: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities behind chunks that were each computed alone and then moved into place."""
    cache = DynamicCache(config=model.config)
    position = 0
    for chunk in chunks:
        alone = DynamicCache(config=model.config)
        ids = torch.tensor([chunk.token_ids])
        with torch.no_grad():
            model(ids, past_key_values=alone, use_cache=True)
        old = torch.arange(ids.shape[1])[None]
        new = old + position
        for index, layer in enumerate(alone.layers):
            cos, sin = model.model.rotary_emb(layer.keys, old)
            bare = layer.keys * cos[:, None] - rotate_half(layer.keys) * sin[:, None]
            bare = bare / (cos**2 + sin**2)[:, None]
            cos, sin = model.model.rotary_emb(layer.keys, new)
            moved, _ = apply_rotary_pos_emb(bare, bare, cos, sin)
            cache.update(moved, layer.values, index)
        position += ids.shape[1]
    ids = torch.tensor([[*fresh, *generated]])
    with torch.no_grad():
        positions = torch.arange(position, position + ids.shape[1])[None]
        logits = model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits[0]
    return logits[len(fresh) - 1 : -1].log_softmax(-1)
