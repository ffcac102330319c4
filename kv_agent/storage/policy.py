"""Who goes first where there is no room for all: decisions about plain values, without I/O.

One policy serves the tiers in memory, whose items are chunks, and the disk, whose items are turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from kv_agent.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How an item was used; times are in seconds of one clock, ``num_tokens`` is what a hit saves."""

    num_bytes: int
    num_tokens: int
    created: float
    last_used: float
    num_hits: int = 0


class Policy(Protocol):
    """What a user's own policy needs; :func:`policy_named` gives ours."""

    def rank(self, usage: Usage) -> float:
        """The item with the lowest rank goes first. It may depend on ``usage`` alone, not on the clock."""


@dataclass(frozen=True, slots=True)
class Lru:
    """Least recently used first."""

    def rank(self, usage: Usage) -> float:
        return usage.last_used


@dataclass(frozen=True, slots=True)
class Fifo:
    """Oldest first, however often it was used."""

    def rank(self, usage: Usage) -> float:
        return usage.created


@dataclass(frozen=True, slots=True)
class Importance:
    """Lowest value first: hits times tokens saved per byte, worth half ``half_life_s`` after the last use.

    The rank is the binary logarithm of that worth at time 0, so that its order holds at any time.
    """

    half_life_s: float = 86_400.0

    def rank(self, usage: Usage) -> float:
        worth = (1 + usage.num_hits) * max(1, usage.num_tokens) / max(1, usage.num_bytes)
        return math.log2(worth) + usage.last_used / self.half_life_s


POLICIES: dict[str, Policy] = {"lru": Lru(), "fifo": Fifo(), "importance": Importance()}


def policy_named(name: str) -> Policy:
    """The policy of that name, or a :class:`ConfigError` that names all of them."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(f"no policy is called {name!r}; choose one of {', '.join(POLICIES)}") from None
