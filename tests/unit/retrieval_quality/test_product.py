"""The product's search inside the harness."""

from __future__ import annotations

import torch

from benchmarks.retrieval.corpora import Corpus, Document, Query
from benchmarks.retrieval.keys import Encoded
from benchmarks.retrieval.latent import Texts
from benchmarks.retrieval.product import search
from benchmarks.world import Message


def encoded(*rows: list[float]) -> Encoded:
    """Tokens with these keys: one layer, one head."""
    keys = torch.tensor(rows)[None, :, None]
    return Encoded(token_ids=list(range(len(rows))), keys=keys, queries=keys[:, :, :0])


def texts(*items: Encoded) -> Texts:
    return Texts(encoded=items, spans=[(0, len(item.token_ids)) for item in items])


def test_each_mode_ranks_by_what_it_compares() -> None:
    said = ["Mara lives in Oslo.", "A cat sleeps.", "Nothing at all."]
    documents = [
        Document(id=f"d{n}", session="s", messages=(Message(role="user", content=text),))
        for n, text in enumerate(said)
    ]
    query = Query(text="Where does Mara live?", evidence=frozenset({"d0"}), group="direct")
    corpus = Corpus(name="small", documents=documents, queries=[query])
    of_documents = texts(encoded([1.0, 0.0], [0.0, 0.2]), encoded([0.0, 1.0]), encoded([-1.0, -1.0]))
    of_queries = texts(encoded([0.1, 1.0]))

    def order(mode: str) -> list[int]:
        (scores,) = search(corpus, of_documents, of_queries, mode)  # type: ignore[arg-type]
        return [n for n in scores.argsort(descending=True).tolist() if scores[n] > 0]

    assert order("lexical") == [0]
    assert order("latent")[0] == 1
    assert set(order("hybrid")) == {0, 1, 2}
    assert order("hybrid")[0] == 0
