"""Turns with a text in a catalog, and which of them a text search finds."""

from __future__ import annotations

import dataclasses
import itertools

from kv_agent.chunks import ChunkRecord, Scope
from kv_agent.storage.catalog import Catalog
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, turn_of

seeds = itertools.count()


def add(
    catalog: Catalog,
    turn_id: str,
    text: str,
    scope: Scope | None = None,
    content: list[ChunkRecord] | None = None,
    created: float | None = None,
) -> list[ChunkRecord]:
    """Store a turn, with content of its own unless given -> its chunks."""
    number = next(seeds)
    if content is None:
        content = [record_of(chunk, scope) for chunk in chain(1, seed=number, scope=scope)]
    turn = turn_of(content, turn_id, scope, number if created is None else created)
    catalog.add_turn(dataclasses.replace(turn, text=text), [], content, {})
    return content


def find(catalog: Catalog, query: str, scope: Scope | None = None, limit: int = 1000) -> list[str]:
    return [hit.turn_id for hit in catalog.search_text(query, scope or Scope(), FINGERPRINT, limit)]
