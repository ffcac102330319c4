"""Look-ups in the background: what the catalog says, and what happens when it says nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

import pytest

from kv_agent.chunks import Scope, adapted_key, root_key
from kv_agent.vllm_plugin.plan import Refusal
from kv_agent.vllm_plugin.resolver import Resolved, Resolver
from tests.unit.vllm_plugin.builders import (
    FINGERPRINT,
    LIMITS,
    ROOT,
    SCOPE,
    FakeCatalog,
    chain,
    plan_options,
    record,
    tokens_of,
)

FRESH = (90, 91, 92)


@pytest.fixture
def resolver(catalog: FakeCatalog) -> Iterator[Resolver]:
    resolver = Resolver(catalog, FINGERPRINT)
    resolver.limits = LIMITS
    yield resolver
    catalog.gate.set()
    resolver.close()


def result(future: Future[Resolved]) -> Resolved:
    return future.result(timeout=30)


def test_a_plan_is_checked_against_the_catalog_s_records(catalog: FakeCatalog, resolver: Resolver) -> None:
    first, second = chain([1, 2, 3], [4, 5])
    catalog.add(first)
    options = plan_options((first, 0), (second, 3), fresh_start=5)
    done = result(resolver.submit((1, 2, 3, 4, 5, *FRESH), SCOPE, options, find_stored=False))
    assert [(chunk.record, chunk.start, chunk.exact) for chunk in done.plan.placed] == [(first, 0, True)]
    assert [(refused.chunk_id, refused.reason) for refused in done.plan.refused] == [
        (second.key, Refusal.UNKNOWN)
    ]


def test_stored_text_is_found_from_the_user_s_root_on(catalog: FakeCatalog, resolver: Resolver) -> None:
    stored = chain([1, 2, 3], [4, 5])
    behind_other_text = record([6], parent=chain([1, 2, 0], [4, 5])[1].key, start=5)
    catalog.add(*stored, behind_other_text)
    done = result(resolver.submit((1, 2, 3, 4, 5, 6), SCOPE, None, find_stored=True))
    assert [one.key in done.known for one in (*stored, behind_other_text)] == [True, True, False]
    assert list(done.known.lengths(ROOT)) == [3]
    assert list(done.known.lengths(stored[0].key)) == [2]
    assert (done.plan.root, done.plan.placed, done.plan.refused) == (ROOT, (), ())


def test_text_of_another_user_is_not_found(catalog: FakeCatalog, resolver: Resolver) -> None:
    catalog.add(*chain([1, 2, 3]))
    eve = Scope(namespace=SCOPE.namespace, user_id="eve")
    done = result(resolver.submit((1, 2, 3, 4), eve, None, find_stored=True))
    assert len(done.known) == 0
    assert done.plan.root == root_key(FINGERPRINT, eve.namespace, eve.user_id)


def test_quarantined_text_counts_as_not_stored(catalog: FakeCatalog, resolver: Resolver) -> None:
    first, second = chain([1, 2, 3], [4, 5])
    catalog.add(first, second)
    catalog.quarantine(first.key)
    done = result(resolver.submit((1, 2, 3, 4, 5), SCOPE, None, find_stored=True))
    assert len(done.known) == 0


def test_stored_text_behind_an_adapted_chunk_is_found(catalog: FakeCatalog, resolver: Resolver) -> None:
    moved = record([1, 2], parent=record([8]).key, start=1)
    behind = record([5, 6], parent=adapted_key(ROOT, moved.key), start=2)
    as_plain_text = chain([1, 2], [5, 6])
    catalog.add(moved, behind, *as_plain_text)
    options = plan_options((moved, 0), fresh_start=2)
    done = result(resolver.submit((1, 2, 5, 6, *FRESH), SCOPE, options, find_stored=True))
    assert [chunk.exact for chunk in done.plan.placed] == [False]
    assert behind.key in done.known
    assert list(done.known.lengths(adapted_key(ROOT, moved.key))) == [2]


def test_stored_text_is_not_looked_for_unless_asked(catalog: FakeCatalog, resolver: Resolver) -> None:
    catalog.add(*chain([1, 2, 3]))
    assert len(result(resolver.submit((1, 2, 3, 4), SCOPE, None, find_stored=False)).known) == 0


def test_a_broken_catalog_refuses_the_whole_plan(catalog: FakeCatalog, resolver: Resolver) -> None:
    first, second = chain([1, 2, 3], [4, 5])
    catalog.add(first, second)
    catalog.break_down()
    options = plan_options((first, 0), (second, 3), fresh_start=5)
    done = result(resolver.submit((1, 2, 3, 4, 5, *FRESH), SCOPE, options, find_stored=True))
    assert done.plan.placed == ()
    assert [(refused.chunk_id, refused.reason) for refused in done.plan.refused] == [
        (first.key, Refusal.LOOKUP),
        (second.key, Refusal.LOOKUP),
    ]


def test_a_broken_catalog_knows_no_text(catalog: FakeCatalog, resolver: Resolver) -> None:
    catalog.add(*chain([1, 2, 3]))
    catalog.break_down()
    done = result(resolver.submit((1, 2, 3, 4), SCOPE, None, find_stored=True))
    assert (len(done.known), done.plan.refused) == (0, ())


def test_asking_does_not_wait_for_the_catalog(catalog: FakeCatalog, resolver: Resolver) -> None:
    (first,) = chain([1, 2, 3])
    catalog.add(first)
    catalog.gate.clear()
    future = resolver.submit((1, 2, 3, 4), SCOPE, plan_options((first, 0), fresh_start=3), find_stored=True)
    assert not future.done()
    catalog.gate.set()
    assert [chunk.record for chunk in result(future).plan.placed] == [first]


def test_tokens_changed_after_asking_do_not_change_the_answer(
    catalog: FakeCatalog, resolver: Resolver
) -> None:
    (first,) = records = chain([1, 2, 3])
    catalog.add(first)
    catalog.gate.clear()
    tokens = [*tokens_of(records), 4]
    future = resolver.submit(tokens, SCOPE, plan_options((first, 0), fresh_start=3), find_stored=False)
    tokens[0] = 77
    catalog.gate.set()
    assert [chunk.record for chunk in result(future).plan.placed] == [first]


def test_closing_drops_look_ups_that_have_not_begun(catalog: FakeCatalog) -> None:
    resolver = Resolver(catalog, FINGERPRINT)
    catalog.gate.clear()
    options = plan_options((record([1]), 0), fresh_start=1)
    begun, waiting = (resolver.submit((1, 2), SCOPE, options, find_stored=False) for _ in range(2))
    while not begun.running():
        time.sleep(0.001)
    closing = threading.Thread(target=resolver.close)
    closing.start()
    with pytest.raises(CancelledError):
        result(waiting)
    catalog.gate.set()
    closing.join(timeout=30)
    assert not closing.is_alive()
    assert [refused.reason for refused in result(begun).plan.refused] == [Refusal.UNKNOWN]


def test_nothing_is_moved_before_it_is_known_that_it_can_be(catalog: FakeCatalog) -> None:
    resolver = Resolver(catalog, FINGERPRINT)
    first, moved = record([1, 2, 3]), record([4, 5], start=40)
    catalog.add(first, moved)
    options = plan_options((first, 0), (moved, 3), fresh_start=5)
    refused = []
    for limits in (None, LIMITS):
        resolver.limits = limits
        done = result(resolver.submit((1, 2, 3, 4, 5, *FRESH), SCOPE, options, find_stored=False))
        assert done.plan.placed[0].record == first
        refused.append([(one.chunk_id, one.reason) for one in done.plan.refused])
    assert refused == [[(moved.key, Refusal.ROTARY)], []]
    resolver.close()
