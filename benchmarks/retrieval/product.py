"""The search that users get: catalog, index and fusion of kv_agent, over keys computed by the harness.

N documents, Q queries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.retrieval.corpora import Corpus
from benchmarks.retrieval.latent import Texts
from kv_agent.chunks import (
    ChunkRecord,
    Fingerprint,
    Scope,
    TurnId,
    TurnRecord,
    chain_key,
    content_key,
    root_key,
)
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.retrieval.pooling import pool_keys, to_bytes
from kv_agent.retrieval.sketches import to_sketch
from kv_agent.searching import Library, Mode, Request, find_turns
from kv_agent.storage.catalog import Catalog

LAYERS = (0,)  # the default of ``pooled_layers``
DEPTH = 100
_FINGERPRINT = Fingerprint("0" * 32)


def search(corpus: Corpus, documents: Texts, queries: Texts, mode: Mode) -> Tensor:
    """Reciprocal ranks of the first hundred -> [Q, N]; zero elsewhere."""
    numbers = {document.id: number for number, document in enumerate(corpus.documents)}
    found = torch.zeros(len(corpus.queries), len(corpus.documents))
    keys = dict(zip((query.text for query in corpus.queries), queries.keys(LAYERS), strict=True))
    with tempfile.TemporaryDirectory() as folder, _library(Path(folder), corpus, documents) as library:
        for row, query in enumerate(corpus.queries):
            request = Request(query=query.text, scope=Scope(), top_k=DEPTH, mode=mode)
            for rank, one in enumerate(find_turns(library, keys.__getitem__, request), start=1):
                found[row, numbers[one.turn.turn_id]] = 1 / rank
    return found


@contextmanager
def _library(folder: Path, corpus: Corpus, documents: Texts) -> Iterator[Library]:
    """One turn of one chunk a document, in their order."""
    catalog = Catalog(folder / "catalog.sqlite3")
    root = root_key(_FINGERPRINT, Scope().namespace, Scope().user_id)
    rows = zip(corpus.documents, documents.token_ids(), documents.keys(LAYERS), strict=True)
    for number, (document, token_ids, keys_TV) in enumerate(rows):
        chunk = ChunkRecord(
            key=chain_key(root, [number, *token_ids]),  # equal texts stay different turns
            content_key=content_key(_FINGERPRINT, [number, *token_ids]),
            parent=root,
            fingerprint=_FINGERPRINT,
            namespace=Scope().namespace,
            user_id=Scope().user_id,
            start=0,
            token_ids=tuple(token_ids),
            blob="",
            tensor="",
            checksum="",
            num_bytes=0,
        )
        turn = TurnRecord(
            turn_id=TurnId(document.id),
            scope=Scope(session_id=document.session),
            fingerprint=_FINGERPRINT,
            chunk_keys=(chunk.key,),
            num_tokens=len(token_ids),
            text=document.text,
            created=float(number),
        )
        vectors, sketches = {chunk.key: to_bytes(pool_keys(keys_TV))}, {chunk.key: to_sketch(keys_TV)}
        catalog.add_turn(turn, [], [chunk], vectors, sketches)
    try:
        yield Library(
            catalog=catalog, index=RetrievalEngine(catalog, _FINGERPRINT, None), fingerprint=_FINGERPRINT
        )
    finally:
        catalog.close()
