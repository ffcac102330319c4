"""Keeping a store within its limits: who goes once a turn has been stored."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from kv_agent.chunks import Scope, TurnId, TurnRecord
from kv_agent.errors import ConfigError, StorageError
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.ledger import Gone
from kv_agent.storage.policy import Lru, Policy, Usage, policy_named
from kv_agent.storage.retention import Retention, in_order, outside_window

logger = logging.getLogger(__name__)

# Turns that go under one hold of the catalog's write lock: others wait meanwhile.
_BATCH = 100


class Evictor:
    """Decides who goes and takes their rows away; files and copies in memory are for whoever asks.

    ``policy`` is that of namespaces that name none. ``disk_bytes`` bounds the files of all together; there
    the policy is that of namespaces without limits of their own.
    """

    def __init__(self, catalog: Catalog, policy: Policy, disk_bytes: int) -> None:
        self._catalog = catalog
        self._ledger = catalog.ledger
        self._policy = policy
        self._disk = Retention(max_bytes=disk_bytes)
        self._warned: set[object] = set()

    def with_expiry(self, turn: TurnRecord) -> TurnRecord:
        """The turn, with its namespace's time to live unless it has one of its own."""
        ttl_s = None if turn.expires is not None else self._retention(turn.scope.namespace).ttl_s
        return turn if ttl_s is None else replace(turn, expires=turn.created + ttl_s)

    def make_room(self, scope: Scope, stored: TurnId, *, is_new: bool) -> Iterator[Gone]:
        """Let turns go, batch by batch, until everything is within its limits.

        The turn ``stored`` just now in ``scope`` stays; but if it is new and there is no room for it beside
        what is pinned, it goes and nobody for it.
        """
        try:
            yield from self._make_room(scope, stored, is_new)
        except StorageError as err:
            text = f"limits could not be kept this time; the next turn tries again: {err}"
            self._warn("store_trouble", None, text)

    def _make_room(self, scope: Scope, stored: TurnId, is_new: bool) -> Iterator[Gone]:
        retention = self._retention(scope.namespace)
        if retention.window_tokens is not None and scope.session_id is not None:
            passed = outside_window(self._ledger.session(scope), retention.window_tokens)
            yield from self._evict(iter(passed), scope.namespace, None)
        yield from self._within(retention, retention.policy, scope.namespace, stored, is_new)
        yield from self._within(self._disk, self._retention("").policy, None, stored, is_new)

    def _within(
        self, limits: Retention, policy: str | None, namespace: str | None, stored: TurnId, is_new: bool
    ) -> Iterator[Gone]:
        if not limits.exceeded_by(self._ledger.held(namespace)):
            return
        place = "the store's files" if namespace is None else f"namespace {namespace!r}"
        if is_new and (refused := self._ledger.refuse(stored, namespace, limits)) is not None:
            self._warn(
                "turn_refused",
                namespace,
                f"turn {stored} is not kept: with nothing but it and what is pinned, {place} would exceed the"
                f" limits ({limits}); raise them, unpin memories or store shorter turns",
            )
            yield refused
        held = self._ledger.held(namespace)
        if not limits.exceeded_by(held):
            return
        until = limits.with_room(held)
        usages = self._ledger.usages(namespace)
        usages.pop(stored, None)
        if until.max_bytes is None and until.max_tokens is None:  # a prompt's prefix is no memory
            usages = {turn_id: usage for turn_id, usage in usages.items() if usage.num_tokens}
        order = self._order(usages, self._policy if policy is None else policy_named(policy))
        yield from self._evict(iter(order), namespace, until)
        if limits.exceeded_by(self._ledger.held_by_pinned(namespace)):
            self._warn(
                "limits_exceeded",
                namespace,
                f"pinned memories alone exceed the limits of {place} ({limits}): nothing else is kept there",
            )

    def _evict(
        self, going: Iterator[TurnId], namespace: str | None, until: Retention | None
    ) -> Iterator[Gone]:
        while (gone := self._ledger.evict(going, namespace, until, _BATCH)).turn_ids:
            yield gone

    def _order(self, usages: Mapping[TurnId, Usage], policy: Policy) -> Sequence[TurnId]:
        """Who goes first: those whose time is over, then by the policy."""
        expired = self._catalog.expired(time.time())
        try:
            order = in_order(usages, policy)
        except Exception:  # somebody's own policy; the limits hold all the same
            if self._is_first("policy"):
                about = {"event": "error"}
                logger.exception(
                    "policy %r failed; least recently used go first instead", policy, extra=about
                )
            order = in_order(usages, Lru())
        return sorted(order, key=lambda turn_id: turn_id not in expired)

    def _retention(self, namespace: str) -> Retention:
        try:
            return self._ledger.retention(namespace)
        except ConfigError as err:  # written by another release
            text = f"the limits of namespace {namespace!r} are not kept: {err}"
            self._warn("limits_unknown", namespace, text)
            return Retention()

    def _warn(self, event: str, namespace: str | None, text: str) -> None:
        if self._is_first((event, namespace)):
            logger.warning("%s", text, extra={"event": event, "namespace": namespace})

    def _is_first(self, cause: object) -> bool:
        is_first = cause not in self._warned
        self._warned.add(cause)
        return is_first
