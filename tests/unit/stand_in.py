"""An engine without a model: it captures what it is given as the plugin does, and answers always the same.

For tests of what is built on an engine, not of KV: that is noise here, and nothing can be found by keys.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kv_agent.chunks import ChunkKey, Fingerprint, Scope, TurnId, TurnRecord, root_key
from kv_agent.engines.base import Call, Completion, Reuse
from kv_agent.storage.store import LocalStore, NewChunk
from kv_agent.vllm_plugin.chains import cut_segments, walk
from kv_agent.vllm_plugin.jobs import Segment

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "recall"
TOKEN_BYTES = 4 * 2


class StandIn:
    """Stores through ``store``; the time of each turn is one second after the one before."""

    fingerprint = Fingerprint("stand-in")
    max_model_len = 1024

    def __init__(self, store: LocalStore, now: float = 1.0) -> None:
        self.store = store
        self.now = now
        self.tokenizer = AutoTokenizer.from_pretrained(str(MODEL))

    def run(self, calls: Sequence[Call]) -> list[Completion]:
        return [self._run(call) for call in calls]

    def close(self) -> None:
        self.store.close()

    def _run(self, call: Call) -> Completion:
        options = call.options
        placements = options.get("plan", {"placements": []})["placements"]
        used = tuple(ChunkKey(one["chunk_id"]) for one in placements)
        turn_id = self._capture(call.token_ids, options) if options.get("store", True) else None
        return Completion(
            text="Noted.",
            token_ids=(),
            reuse=Reuse(chunk_ids=used),
            turn_id=turn_id,
            probe=None,
            ttft_s=0.0,
        )

    def _capture(self, token_ids: Sequence[int], options: Any) -> TurnId:
        scope, first = Scope(**options["scope"]), options["content_start"]
        catalog = self.store.catalog
        context = root_key(self.fingerprint, scope.namespace, scope.user_id)

        def usable(keys: Sequence[ChunkKey]) -> set[ChunkKey]:
            return set(catalog.chunks(keys))

        known = walk(context, token_ids[:first], 0, catalog.child_lengths, usable)
        start = known[-1].end if known else 0
        context = known[-1].key if known else context
        before = cut_segments(context, token_ids, start, first, 64, self.fingerprint)
        context = before[-1].key if before else context
        content = cut_segments(context, token_ids, first, len(token_ids), 64, self.fingerprint)
        self.now += 1.0
        turn = TurnRecord(
            turn_id=TurnId(uuid.uuid4().hex),
            scope=scope,
            fingerprint=self.fingerprint,
            chunk_keys=tuple(part.key for part in content),
            num_tokens=len(token_ids) - first,
            text=str(self.tokenizer.decode(token_ids[first:], skip_special_tokens=True)),
            created=self.now,
            metadata=options.get("metadata", {}),
            expires=self.now + options["ttl_s"] if options.get("ttl_s") else None,
        )
        new = [_new_chunk(part) for part in before], [_new_chunk(part) for part in content]
        self.store.put_turn(turn, *new)
        return turn.turn_id


def _new_chunk(part: Segment) -> NewChunk:
    return NewChunk(
        key=part.key,
        content_key=part.content_key,
        parent=part.parent,
        start=part.start,
        token_ids=part.token_ids,
        kv=torch.zeros(1, 2, len(part.token_ids), 1, 2, dtype=torch.float16),
        vector=None,
    )
