"""What a search costs in SQL statements, however many memories there are. A change is to be meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from kv_agent.chunks import Scope
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.retrieval.pooling import to_bytes
from kv_agent.retrieval.sketches import to_sketch
from kv_agent.searching import Library, Mode, Request, find_turns
from kv_agent.storage.catalog import Catalog
from tests.unit.counted import Statements, trace_statements
from tests.unit.storage.builders import FINGERPRINT, chain, record_of, turn_of

SIZE = 3  # numbers of a key

# What has the query's words, in a transaction; in another which turns these are, their rows and their chunks.
LEXICAL = {"BEGIN": 2, "COMMIT": 2, "SELECT": 3, "WITH": 1}
# Whether the index is behind, the keys of tokens that no search before has kept, and the turns as above.
LATENT = {"BEGIN": 1, "COMMIT": 1, "SELECT": 5}
# Both, and the turns only once.
HYBRID = {"BEGIN": 2, "COMMIT": 2, "SELECT": 5, "WITH": 1}
EXPECTED: dict[Mode, dict[str, int]] = {"lexical": LEXICAL, "latent": LATENT, "hybrid": HYBRID}


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    return trace_statements(monkeypatch)


@pytest.fixture
def library(statements: Statements, tmp_path: Path) -> Iterator[Library]:
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    yield Library(catalog=catalog, index=RetrievalEngine(catalog, FINGERPRINT, None), fingerprint=FINGERPRINT)
    catalog.close()


def fill(library: Library, numbers: range) -> None:
    for number in numbers:
        keys_TV = np.random.default_rng(number).normal(size=(2, SIZE)).astype(np.float32)
        records = [record_of(chunk) for chunk in chain(2, seed=number)]
        turn = replace(turn_of(records, f"turn-{number}"), text=f"Mara said number {number}.")
        keys = {record.key: keys_TV for record in records}
        vectors = {key: to_bytes(keys_TV.mean(axis=0, keepdims=True)) for key in keys}
        sketches = {key: to_sketch(keys_TV) for key in keys}
        library.catalog.add_turn(turn, [], records, vectors, sketches)


def search(library: Library, mode: Mode) -> int:
    request = Request(query="What did Mara say?", scope=Scope(), top_k=5, mode=mode)
    return len(find_turns(library, lambda query: np.ones((2, SIZE), dtype=np.float32), request))


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("num_turns", [10, 100])
def test_statements_of_a_search_that_has_nothing_to_catch_up_with(
    library: Library, statements: Statements, mode: Mode, num_turns: int
) -> None:
    fill(library, range(num_turns))
    search(library, mode)
    with statements.of() as ran:
        assert search(library, mode) == 5

    assert ran == EXPECTED[mode]


def test_what_was_stored_since_costs_two_statements_more(library: Library, statements: Statements) -> None:
    fill(library, range(10))
    search(library, "latent")
    fill(library, range(10, 12))  # far fewer than the index would be fitted anew for
    with statements.of() as ran:
        search(library, "latent")

    assert ran == LATENT | {"SELECT": LATENT["SELECT"] + 1}  # that no change is left
