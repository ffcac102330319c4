"""Turns as documents of a full-text index, and BM25 over them; the catalog begins and commits.

A document has two columns: ``scope``, three words that say whose it is, and ``words``, its text. So the
index itself passes over what a scope does not admit. What a user types never is query syntax: a term is
quoted, and consists of letters, digits and spaces only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from kv_agent.chunks import ChunkKey, Fingerprint, Scope, TurnFilter, TurnId
from kv_agent.storage import rows
from kv_agent.storage import statements as sql
from kv_agent.storage.schema import Database
from kv_agent.storage.words import query_terms, words

# A search walks the postings of each of its terms.
MAX_TERMS = 64
_MAX_COUNTED_TERMS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TextHit:
    """A turn that a text search found; ``score`` is BM25, larger is better."""

    turn_id: TurnId
    score: float


def search(
    db: Database, query: str, scope: Scope, fingerprint: Fingerprint, limit: int, only: TurnFilter
) -> list[TextHit]:
    """See :meth:`kv_agent.storage.catalog.Catalog.search_text`."""
    admitted = _admitted(scope, fingerprint)
    terms = _rarest(db, query_terms(query), admitted)
    if not terms:
        return []
    parameters = {"match": _match(admitted, terms), "limit": limit}
    if only.admits_all:
        found = db.execute(sql.SEARCH_TEXT, parameters)
    else:
        found = db.execute(sql.SEARCH_FILTERED_TEXT, parameters | rows.filter_to_row(only))
    return [TextHit(turn_id=turn_id, score=score) for turn_id, score in found]


def add_missing(db: Database, keys: Iterable[ChunkKey]) -> None:
    """Make documents of turns that have live content among ``keys`` and no document; older turns first."""
    lacking = db.execute(sql.TURNS_WITHOUT_DOCUMENT, (rows.json_list(keys),)).fetchall()
    for turn_id, fingerprint, *names, text, content_keys in lacking:
        scope = Scope(**dict(zip(("namespace", "user_id", "agent_id", "session_id"), names, strict=True)))
        doc_id = db.execute(sql.INSERT_DOCUMENT, (turn_id, copy_key(content_keys))).lastrowid
        labels = " ".join(scope_words(scope, fingerprint))
        db.execute(sql.INSERT_WORDS, (doc_id, labels, " ".join(words(text))))


def remove_of_turns(db: Database, turn_ids: str) -> None:
    """Remove the documents of turns, given as a JSON list."""
    _remove(db, db.execute(sql.DOCUMENTS_OF_TURNS, (turn_ids,)).fetchall())


def remove_dead(db: Database, key: ChunkKey) -> None:
    """Remove the documents of turns with content ``key`` that have no live content left."""
    _remove(db, db.execute(sql.DEAD_DOCUMENTS, (key,)).fetchall())


def _remove(db: Database, doc_ids: list[tuple[int]]) -> None:
    db.executemany(sql.DELETE_WORDS, doc_ids)
    db.executemany(sql.DELETE_DOCUMENT, doc_ids)


def copy_key(content_keys: str) -> str:
    """Equal for turns with the same content, given as the JSON list of its content keys."""
    return hashlib.blake2b(content_keys.encode(), digest_size=16).hexdigest()


def scope_words(scope: Scope, fingerprint: Fingerprint) -> tuple[str, str, str]:
    """Whose a document is, as words that contain no other's: owner and model, agent, session."""
    owner = (fingerprint, scope.namespace, scope.user_id)
    names = (("o",), ("a", scope.agent_id), ("s", scope.session_id))
    one, two, three = (
        kind + hashlib.blake2b(json.dumps([*owner, *name]).encode(), digest_size=16).hexdigest()
        for kind, *name in names
    )
    return one, two, three


def _admitted(scope: Scope, fingerprint: Fingerprint) -> str:
    """Query for the documents that ``scope`` admits."""
    owner, agent, session = scope_words(scope, fingerprint)
    narrowed = [owner]
    if scope.agent_id is not None:
        narrowed.append(agent)
    if scope.session_id is not None:
        narrowed.append(session)
    return f"scope : ({' AND '.join(narrowed)})"


def _match(admitted: str, terms: Iterable[str]) -> str:
    any_term = " OR ".join(f'"{term}"' for term in terms)
    return f"{admitted} AND words : ({any_term})"


def _rarest(db: Database, terms: list[str], admitted: str) -> list[str]:
    """At most ``MAX_TERMS`` terms: those that the fewest documents in scope have, earlier ones first."""
    if len(terms) <= MAX_TERMS:
        return terms
    counts = {
        term: db.execute(sql.COUNT_DOCUMENTS, (_match(admitted, [term]),)).fetchone()[0]
        for term in terms[:_MAX_COUNTED_TERMS]
    }
    return sorted((term for term, count in counts.items() if count), key=counts.__getitem__)[:MAX_TERMS]
