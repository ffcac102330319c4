"""Where the tokens of a prompt came from, told to whoever asked. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kv_agent.vllm_plugin.plan import CheckedPlan, PlacedChunk, Refusal, Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Tokens by source, and which chunks were used; the others with the reason."""

    exact: int
    adapted: int
    local: int
    computed: int
    used: tuple[PlacedChunk, ...]
    unreached: tuple[Refused, ...]

    @property
    def tokens(self) -> dict[str, int]:
        return {
            "exact": self.exact,
            "adapted": self.adapted,
            "local": self.local,
            "computed": self.computed,
        }


def sources_of(
    plan: CheckedPlan, num_tokens: int, cached_end: int, *, trusted: bool, reason: Refusal
) -> Sources:
    """Of ``num_tokens`` of a prompt the first ``cached_end`` were not computed.

    Without ``trusted`` it is not known what a local hit holds. Chunks behind it were not used for ``reason``.
    """
    end = min(cached_end, num_tokens)
    exact = adapted = 0
    used: list[PlacedChunk] = []
    unreached: list[Refused] = []
    for chunk in plan.placed:
        # A block-aligned cut after a failed load may end inside a chunk.
        count = max(0, min(chunk.end, end) - chunk.start)
        if not count:
            unreached.append(Refused(chunk_id=chunk.record.key, reason=reason))
            continue
        used.append(chunk)
        exact += count if chunk.exact else 0
        adapted += 0 if chunk.exact else count
    if not trusted:
        exact, adapted = 0, end  # chunks may have been moved into any of it
    return Sources(
        exact=exact,
        adapted=adapted,
        local=end - exact - adapted,
        computed=num_tokens - end,
        used=tuple(used),
        unreached=tuple(unreached),
    )
