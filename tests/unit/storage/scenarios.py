"""Small stories of a store, told with and without an interruption: a beginning, and what is then done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kv_agent.chunks import TurnId
from kv_agent.storage.store import LocalStore, NewChunk
from tests.unit.storage.builders import chain, turn_of
from tests.unit.storage.stores import holds, store_root

UNSAID = "belongs to no chunk"


def content_of(turn_id: str) -> list[NewChunk]:
    """Two chunks of the turn's own behind one that every turn shares."""
    (shared,) = chain(2)
    return [shared, *chain(2, 3, seed=1 + int(turn_id), parent=shared.key)]


def put(store: LocalStore, turn_id: str) -> None:
    content = content_of(turn_id)
    store.put_turn(turn_of(content, turn_id), [], content)


def _put_with_context(store: LocalStore) -> None:
    context, content = chain(4, seed=50), chain(3, 2, seed=51)
    store.put_turn(turn_of(content, "9"), [*context, content_of("0")[0].key], content)


def _leave_orphans(store: LocalStore) -> None:
    put(store, "0")
    for name in ("ab-1.safetensors", "ab-2.0123456789abcdef.tmp"):
        path = store_root(store) / "blobs" / "ab" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left by a crash")


def _damage(store: LocalStore) -> None:
    put(store, "0")
    put(store, "1")
    record = store.catalog.chunks([content_of("1")[2].key])[content_of("1")[2].key]
    path = store_root(store) / record.blob
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    data[-60] ^= 1
    path.write_bytes(data)


def _quarantine_and_revive(store: LocalStore) -> None:
    for bad in store.repair(store.inspect(0)):
        assert bad.is_gone
    put(store, "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``act`` leads from turns ``before`` to turns ``after``; done again, it changes nothing more."""

    begin: Callable[[LocalStore], None]
    act: Callable[[LocalStore], None]
    before: frozenset[str]
    after: frozenset[str]
    is_damaged: bool = False


def _scenario(
    before: str,
    after: str,
    act: Callable[[LocalStore], None],
    begin: Callable[[LocalStore], None] | None = None,
    is_damaged: bool = False,
) -> Scenario:
    def put_all(store: LocalStore) -> None:
        for turn_id in before:
            put(store, turn_id)

    return Scenario(
        begin=begin or put_all,
        act=act,
        before=frozenset(before),
        after=frozenset(after),
        is_damaged=is_damaged,
    )


SCENARIOS = {
    "the first turn": _scenario("", "1", lambda store: put(store, "1")),
    "another turn": _scenario("0", "01", lambda store: put(store, "1")),
    "the same turn": _scenario("01", "01", lambda store: put(store, "1")),
    "a turn with context": _scenario("0", "09", _put_with_context),
    "forgetting": _scenario("012", "0", lambda store: store.forget([TurnId("1"), TurnId("2")])),
    "garbage": _scenario("0", "0", lambda store: store.collect_garbage(0) and None, _leave_orphans),
    "quarantine and revival": _scenario("01", "01", _quarantine_and_revive, _damage, is_damaged=True),
}


def known(store: LocalStore) -> frozenset[str]:
    return frozenset(store.catalog.known_turns(map(TurnId, "0129")))


def require_sound(store: LocalStore, scenario: Scenario) -> None:
    """After an interruption: turns as before or as after, all bytes there, at worst a file without a row."""
    assert known(store) in (scenario.before, scenario.after)
    problems = store.check()
    assert all(UNSAID in problem or (scenario.is_damaged and "damaged" in problem) for problem in problems)
    if not scenario.is_damaged:
        require_held(store, known(store))


def require_done(store: LocalStore, scenario: Scenario) -> None:
    """Done again without an interruption, nothing tells that there was one."""
    scenario.act(store)
    store.collect_garbage(0)
    assert known(store) == scenario.after
    require_held(store, scenario.after)
    assert store.check() == []


def require_held(store: LocalStore, turn_ids: frozenset[str]) -> None:
    for turn_id in turn_ids - {"9"}:
        assert holds(store, content_of(turn_id))
    if "9" in turn_ids:
        assert holds(store, [*chain(4, seed=50), *chain(3, 2, seed=51)])


def begun(root: Path, scenario: Scenario) -> Path:
    """A store in which the scenario can be acted."""
    store = LocalStore(root, host_bytes=0, fsync="never")
    scenario.begin(store)
    store.close()
    return root
