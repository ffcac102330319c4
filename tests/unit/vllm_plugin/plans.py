"""Plans checked in a few words."""

from __future__ import annotations

from kv_agent.chunks import (
    ChunkRecord,
    Fingerprint,
    Scope,
)
from kv_agent.config import PlanOptions
from kv_agent.vllm_plugin.plan import CheckedPlan, Limits, check_plan
from tests.unit.vllm_plugin.builders import (
    FINGERPRINT,
    LIMITS,
    SCOPE,
    plan_options,
    tokens_of,
)

FRESH = (90, 91, 92)


def check(
    options: PlanOptions,
    *records: ChunkRecord,
    prompt: tuple[int, ...],
    scope: Scope = SCOPE,
    fingerprint: Fingerprint = FINGERPRINT,
    limits: Limits | None = LIMITS,
) -> CheckedPlan:
    return check_plan(options, {one.key: one for one in records}, prompt, scope, fingerprint, limits)


def check_in_a_row(*records: ChunkRecord) -> CheckedPlan:
    """The records one behind the other from position 0, then a fresh turn."""
    prompt = tokens_of(records) + FRESH
    placements, position = [], 0
    for one in records:
        placements.append((one, position))
        position += one.num_tokens
    return check(plan_options(*placements, fresh_start=position), *records, prompt=prompt)


def reasons(plan: CheckedPlan) -> dict[str, str]:
    return {refused.chunk_id: refused.reason for refused in plan.refused}
