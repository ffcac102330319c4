"""Any history of a store with limits against a brute-force model: who goes, who stays, and every total.

``KV_AGENT_RETENTION_STEPS=20000`` makes it that many steps of each history.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kv_agent.chunks import Scope, TurnId
from kv_agent.storage.policy import Usage, policy_named
from kv_agent.storage.retention import Holding, Retention
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import chain, turn_of
from tests.unit.storage.retained import PlainStore, PlainTurn
from tests.unit.storage.stores import blob_files

STEPS = int(os.environ.get("KV_AGENT_RETENTION_STEPS", "500"))
SCOPES = [
    Scope(namespace=namespace, user_id=user, agent_id=agent, session_id=session)
    for namespace, user in (("a", "u"), ("a", "v"), ("b", "u"), ("c", "u"))
    for agent, session in ((None, None), (None, "s"), ("x", "s"), ("x", "t"))
]
NEVER_OVER, LONG_OVER = 1e12, 5e6  # times to live; turns here are from the first seconds of 1970


class Largest:
    """A policy as a user may write it: large memories first, then those with few hits."""

    def rank(self, usage: Usage) -> float:
        return -usage.num_bytes + 0.1 * usage.num_hits


RANKS: dict[str, Callable[[Usage], float]] = {
    "lru": lambda usage: usage.last_used,
    "fifo": lambda usage: usage.created,
    "importance": policy_named("importance").rank,  # its formula is for test_policy.py
    "largest": Largest().rank,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The store and its model, and what both have gone through."""

    store: LocalStore
    model: PlainStore
    pick: random.Random

    def put(self, number: int) -> None:
        pick, scope = self.pick, self.pick.choice(SCOPES)
        lengths = [pick.choice((1, 2, 3, 5, 8, 40)) for _ in range(6)]
        seed = pick.choice((pick.randrange(4), number))  # texts that return, and new ones
        chunks = chain(*(lengths if seed == number else (2, 3, 1, 5, 2, 4)), seed=seed, scope=scope)
        first = pick.randrange(3)
        last = pick.randrange(first, 7) if pick.random() < 0.9 else first  # some hold but a prefix
        context, content = chunks[:first], chunks[first:last]
        if not context and not content:
            return
        turn_id = f"turn-{number}"
        created = float(number) if pick.random() < 0.8 else pick.uniform(0, number)
        turn = replace(
            turn_of(content, turn_id, scope, created),
            expires=pick.choice((None, None, None, NEVER_OVER, created + 1)),
            pinned=pick.random() < 0.03,
        )
        self.model.put(
            turn_id,
            PlainTurn(
                scope=scope,
                content=turn.chunk_keys,
                context={chunk.key for chunk in context},
                num_tokens=turn.num_tokens,
                created=created,
                last_used=created,
                expires=turn.expires,
                pinned=turn.pinned,
            ),
            context,
            content,
        )
        self.store.put_turn(turn, context, content)

    def limit(self, _: int) -> None:
        pick = self.pick
        namespace = pick.choice(("a", "b", "c", None))
        retention: Retention | None = Retention(
            policy=pick.choice((None, "lru", "fifo", "importance")),
            max_bytes=pick.choice((None, pick.randint(100, 20_000))),
            max_tokens=pick.choice((None, pick.randint(1, 200))),
            max_memories=pick.choice((None, pick.randint(1, 30))),
            window_tokens=pick.choice((None, pick.randint(1, 60))),
            ttl_s=pick.choice((None, NEVER_OVER, LONG_OVER)),
        )
        if pick.random() < 0.2:
            retention = None
            self.model.limits.pop(namespace, None)
        else:
            self.model.limits[namespace] = retention
        self.store.set_retention(namespace, retention)

    def pin(self, number: int) -> None:
        ids, pinned = self.some(number), self.pick.random() < 0.3
        for turn_id in ids:
            if (turn := self.model.turns.get(self.model.aliases.get(turn_id, turn_id))) is not None:
                turn.pinned = pinned
        self.store.catalog.ledger.pin(map(TurnId, ids), pinned)

    def use(self, number: int) -> None:
        ids, now = self.some(number), float(number)
        for turn_id in set(ids) & self.model.turns.keys():
            self.model.turns[turn_id].hits += 1
            self.model.turns[turn_id].last_used = max(self.model.turns[turn_id].last_used, now)
        self.store.catalog.ledger.touch(map(TurnId, ids), now)

    def forget(self, number: int) -> None:
        ids = self.some(number)
        self.model.forget(ids)
        self.store.forget(map(TurnId, ids))

    def expire(self, number: int) -> None:
        now = float(number)
        self.model.forget(
            [
                turn_id
                for turn_id, turn in self.model.turns.items()
                if turn.expires is not None and turn.expires <= now and not turn.pinned
            ]
        )
        self.store.forget_expired(now)

    def some(self, number: int) -> list[str]:
        known = [*self.model.turns, *self.model.aliases, "unknown", f"turn-{self.pick.randint(0, number)}"]
        return self.pick.sample(known, min(len(known), self.pick.randint(1, 4)))

    def require_equal(self) -> None:
        ledger, model = self.store.catalog.ledger, self.model
        with self.store.catalog._connection() as db:
            rows = db.execute(
                "SELECT turn_id, pinned, hits, coalesce(last_used, created), expires FROM turns"
            )
            sums = db.execute("SELECT namespace, sum(num_bytes), sum(num_tokens) FROM chunks GROUP BY 1")
            assert {row[0]: tuple(row[1:]) for row in rows} == {
                turn_id: (turn.pinned, turn.hits, turn.last_used, turn.expires)
                for turn_id, turn in model.turns.items()
            }
            assert {row[0]: row[1:] for row in sums} == {
                name: model.held(name)[:2] for name in "abc" if model.held(name)[0]
            }
        for namespace in ("a", "b", "c", None):
            num_bytes, num_tokens, num_memories = model.held(namespace)
            held = Holding(num_bytes=num_bytes, num_tokens=num_tokens, num_memories=num_memories)
            assert ledger.held(namespace) == held
        stats = self.store.stats()
        assert (stats["evicted_turns"], stats["refused_turns"]) == (len(model.evicted), len(model.refused))


@pytest.mark.parametrize("seed", range(4))
def test_who_goes_and_every_total_are_those_of_the_model(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    pick = random.Random(seed)
    name = ("lru", "fifo", "importance", "largest")[seed]
    policy = Largest() if name == "largest" else policy_named(name)
    store = LocalStore(tmp_path, host_bytes=1 << 20, fsync="never", policy=policy, disk_bytes=40_000)
    pair = Pair(store=store, model=PlainStore(ranks=RANKS, policy=name, disk_bytes=40_000), pick=pick)
    doings = [pair.put] * 30 + [pair.use] * 6 + [pair.pin] * 2 + [pair.forget, pair.expire, pair.limit]

    for number in range(1, STEPS):
        pick.choice(doings)(number)
        pair.require_equal()

    assert store.check() == []
    # A file that no chunk is in any more is gone, and one with a chunk in it keeps all its bytes.
    names = {re.sub(r"-[0-9a-f]{16}$", "", path.stem) for path in blob_files(store)}
    assert names == pair.model.blobs.keys()
    assert store._tiers.chunk_keys() <= pair.model.chunks.keys()
    assert len(pair.model.evicted) > STEPS / 10
    assert len(pair.model.refused) > 0
    record_property("steps, evicted, refused", (STEPS, len(pair.model.evicted), len(pair.model.refused)))
    store.close()
