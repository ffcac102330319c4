"""What a namespace may keep, and who goes when it holds more: decisions about plain values, without I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from kv_agent.chunks import TurnId
from kv_agent.errors import ConfigError
from kv_agent.storage.policy import Policy, Usage, policy_named

# Whoever is over a limit goes down to this part of it, so that not every turn has to look for room.
_ROOM = 0.95
_LARGEST = 2**63 - 1  # what SQLite can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a namespace holds: bytes and tokens of its chunks, each counted once, and its memories."""

    num_bytes: int = 0
    num_tokens: int = 0
    num_memories: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What a namespace may keep; ``None`` is no limit.

    ``policy`` names who goes first when a limit is exceeded; ``None`` leaves that to the process, see
    :class:`~kv_agent.storage.store.LocalStore`. ``window_tokens`` keeps of each agent's session the newest
    memories that have at most so many tokens together. What is stored without a time to live of its own goes
    ``ttl_s`` seconds after it was created.
    """

    policy: str | None = None
    max_bytes: int | None = None
    max_tokens: int | None = None
    max_memories: int | None = None
    window_tokens: int | None = None
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        if self.policy is not None:
            policy_named(self.policy)
        for name in ("max_bytes", "max_tokens", "max_memories", "window_tokens"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= _LARGEST):
                raise ConfigError(f"{name} must be a whole number from 1 on, or None, got {value!r}")
        if self.ttl_s is not None and not 0 < self.ttl_s < math.inf:
            raise ConfigError(f"ttl_s must be a positive number of seconds, or None, got {self.ttl_s!r}")

    def exceeded_by(self, held: Holding) -> bool:
        """Whether that is more than may be kept."""
        return bool(self._exceeded(held))

    def with_room(self, held: Holding) -> Retention:
        """The limits that ``held`` exceeds, lowered so that some room is left; the others are none."""
        lowered = {name: math.ceil(limit * _ROOM) for name, limit in self._exceeded(held).items()}
        return Retention(
            max_bytes=lowered.get("max_bytes"),
            max_tokens=lowered.get("max_tokens"),
            max_memories=lowered.get("max_memories"),
        )

    def __str__(self) -> str:
        set_to = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name} {value}" for name, value in set_to if value is not None) or "no limits"

    def _exceeded(self, held: Holding) -> dict[str, int]:
        pairs = (
            ("max_bytes", self.max_bytes, held.num_bytes),
            ("max_tokens", self.max_tokens, held.num_tokens),
            ("max_memories", self.max_memories, held.num_memories),
        )
        return {name: limit for name, limit, amount in pairs if limit is not None and amount > limit}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTurn:
    """A turn as its session's window sees it."""

    turn_id: TurnId
    num_tokens: int
    pinned: bool


def outside_window(newest_first: Iterable[SessionTurn], window_tokens: int) -> list[TurnId]:
    """Turns of one session that its window has passed.

    Pinned ones stay where they are and take their tokens' room. The newest stays even if it has more tokens
    than the window.
    """
    going: list[TurnId] = []
    num_tokens = 0
    for place, turn in enumerate(newest_first):
        num_tokens += turn.num_tokens
        if place > 0 and num_tokens > window_tokens and not turn.pinned:
            going.append(turn.turn_id)
    return going


def in_order(usages: Mapping[TurnId, Usage], policy: Policy) -> list[TurnId]:
    """Who goes first, by rank; among equals the older. A rank that is no number is a :class:`ValueError`."""
    ranks = {turn_id: float(policy.rank(usage)) for turn_id, usage in usages.items()}
    if any(map(math.isnan, ranks.values())):
        raise ValueError(f"{policy!r} gave a turn no rank")
    return sorted(usages, key=lambda turn_id: (ranks[turn_id], usages[turn_id].created, turn_id))


def default_disk_bytes(free_bytes: int, used_bytes: int) -> int:
    """How much a store may use of a disk with so much room left: nine tenths of it and what it has already.

    Never less than it has, so that nothing goes because others filled the disk.
    """
    return max(used_bytes, (free_bytes + used_bytes) * 9 // 10, 1)
