"""A catalog with turns, and an engine that does with a rung what the plugin does, keys only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

from kv_agent.chunks import ChunkKey, ChunkRecord, Scope, TurnId, TurnRecord
from kv_agent.config import PlanOptions, RequestOptions, parse
from kv_agent.engines.base import Call
from kv_agent.placing import Placer
from kv_agent.planning import MemoryPrompt
from kv_agent.prompting import ChatPrompts
from kv_agent.storage.catalog import Catalog
from kv_agent.vllm_plugin.chains import cut_segments
from kv_agent.vllm_plugin.plan import CheckedPlan, check_plan
from tests.unit.vllm_plugin.builders import FINGERPRINT, LIMITS, ROOT, SCOPE, record

CHUNK_TOKENS = 32
NEUTRAL = (40_000, 40_001, 40_002, 40_003)
OPENING = (40_000, 40_004)


def records_of(
    token_ids: Sequence[int], parent: ChunkKey, start: int, chunk_tokens: int = CHUNK_TOKENS
) -> list[ChunkRecord]:
    """The chunks of these tokens computed at ``start`` behind ``parent``, cut as the plugin cuts them."""
    segments = cut_segments(parent, token_ids, 0, len(token_ids), chunk_tokens, FINGERPRINT)
    return [record(one.token_ids, parent=one.parent, start=start + one.start) for one in segments]


@dataclass
class World:
    """``run`` fails once ``fails_at`` rungs were climbed."""

    catalog: Catalog
    fails_at: int = 1_000_000
    rungs: list[Call] = field(default_factory=list)

    @property
    def placer(self) -> Placer:
        return Placer(
            catalog=self.catalog,
            fingerprint=FINGERPRINT,
            chunk_tokens=CHUNK_TOKENS,
            prompts=cast(ChatPrompts, SimpleNamespace(neutral=NEUTRAL, opening=OPENING)),
            run=self.run,
        )

    def store_opening(self) -> ChunkRecord:
        """What replaces the opening of a memory, as context of turns without content."""
        (neutral,) = records_of(NEUTRAL, ROOT, 0)
        (opening,) = records_of(OPENING, neutral.key, len(NEUTRAL))
        turn = TurnRecord(
            turn_id=TurnId("opening"),
            scope=SCOPE,
            fingerprint=FINGERPRINT,
            chunk_keys=(),
            num_tokens=0,
            text="",
            created=0.0,
        )
        self.catalog.add_turn(turn, [neutral, opening], [], {})
        return opening

    def remember(
        self, token_ids: Sequence[int], *, parent: ChunkKey = ROOT, start: int = 0, scope: Scope = SCOPE
    ) -> TurnRecord:
        """A turn of these tokens, computed at ``start`` behind ``parent``."""
        number = self.catalog.stats()["turns"]
        content = records_of(token_ids, parent, start)
        turn = TurnRecord(
            turn_id=TurnId(f"t{number}"),
            scope=scope,
            fingerprint=FINGERPRINT,
            chunk_keys=tuple(one.key for one in content),
            num_tokens=len(token_ids),
            text=f"turn {number}",
            created=float(number),
        )
        stored = self.catalog.add_turn(turn, [], content, {})
        return self.catalog.turns([stored.turn_id])[stored.turn_id]

    def check(self, prompt: MemoryPrompt) -> CheckedPlan:
        """What the plugin makes of the prompt's plan."""
        options = parse(PlanOptions, prompt.options(), "plan")
        return self._check(options, prompt.token_ids)

    def run(self, call: Call) -> None:
        """Compute what the plan does not hold and keep it with the turn it is a part of."""
        self.rungs.append(call)
        if len(self.rungs) > self.fails_at:
            return
        options = parse(RequestOptions, call.options, "rung")
        assert options.plan is not None
        assert options.scope is not None
        plan = self._check(options.plan, call.token_ids)
        assert plan.refused == ()
        base = plan.base(plan.reach(0))
        assert base is not None
        context, start = base
        assert start < len(call.token_ids)
        parts = records_of(call.token_ids[start:], context, start)
        turn = TurnRecord(
            turn_id=TurnId(f"part {len(self.rungs)}"),
            scope=options.scope.to_scope(),
            fingerprint=FINGERPRINT,
            chunk_keys=tuple(map(ChunkKey, options.part_of)),
            num_tokens=0,
            text="",
            created=0.0,
        )
        self.catalog.add_turn(turn, parts, [], {}, is_part=True)

    def _check(self, options: PlanOptions, token_ids: Sequence[int]) -> CheckedPlan:
        keys = [ChunkKey(one.chunk_id) for one in options.placements]
        return check_plan(options, self.catalog.chunks(keys), token_ids, SCOPE, FINGERPRINT, LIMITS)
