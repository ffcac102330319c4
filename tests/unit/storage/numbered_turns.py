"""Turns by number, the lower the older, and which of them a store has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kv_agent.chunks import Scope, TurnId
from kv_agent.storage.store import LocalStore
from tests.unit.storage.builders import chain, turn_of

TOKEN_BYTES = 64  # of the builders' chunks
SCOPE = Scope(namespace="default", user_id="default", session_id="s")


def put(store: LocalStore, number: int, length: int = 10, **fields: Any) -> TurnId:
    chunks = chain(length, seed=number, scope=SCOPE)
    turn = replace(turn_of(chunks, f"turn-{number}", SCOPE, created=float(number)), **fields)
    return store.put_turn(turn, [], chunks).turn_id


def stored(store: LocalStore) -> list[int]:
    return sorted(int(turn_id[5:]) for turn_id in store.catalog.turns_by_age(None, None, None))
