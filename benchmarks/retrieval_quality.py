"""How often each way of searching finds the turn that holds the answer.

    python -m benchmarks.retrieval_quality examples/models/recall --corpus world-2000
    python -m benchmarks.retrieval_quality examples/models/recall --corpus ../shared/data/locomo10.json

Prints a table, best recall@5 first, and adds one JSON line to ``--results``. Methods by keys are computed
with transformers on texts encoded alone; which head looks things up is chosen on another world. "kv_agent"
is the product's own search: its catalog, its index, its fusion.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.provenance import provenance
from benchmarks.retrieval.corpora import Corpus, Document, locomo_corpora, world_corpus
from benchmarks.retrieval.keys import encode
from benchmarks.retrieval.latent import (
    Texts,
    attention,
    competing,
    key_boxes,
    late_interaction,
    pooled,
    reciprocal_rank_fusion,
)
from benchmarks.retrieval.lexical import bm25
from benchmarks.retrieval.metrics import summarize
from benchmarks.retrieval.product import search
from benchmarks.retrieval.projection import Pairs, projected
from benchmarks.world import Split
from kv_agent.prompting import ChatPrompts
from kv_agent.searching import Mode
from kv_agent.storage.words import words

DEPTH = 100  # places of a ranking that count
CALIBRATION_FACTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A corpus as the methods see it."""

    corpus: Corpus
    documents: Texts
    queries: Texts

    def lexical(self) -> Tensor:
        documents = [words(document.text) for document in self.corpus.documents]
        return bm25(documents, [words(query.text) for query in self.corpus.queries])

    def product(self, mode: Mode) -> Tensor:
        return search(self.corpus, self.documents, self.queries, mode)

    def lexical_by_tokens(self) -> Tensor:
        return bm25(self.documents.token_ids(), self.queries.token_ids())


Head = tuple[int, int, bool, bool]  # layer, head, last token only, documents compete
Method = Callable[[Case], Tensor]


def make_case(model: PreTrainedModel, prompts: ChatPrompts, corpus: Corpus) -> Case:
    turns = [list(_turn(prompts, document)) for document in corpus.documents]
    asked = [prompts.fresh(query.text) for query in corpus.queries]
    return Case(
        corpus=corpus,
        documents=Texts(
            encoded=encode(model, turns, with_queries=False), spans=[(0, len(ids)) for ids in turns]
        ),
        queries=Texts(
            encoded=encode(model, [list(one.token_ids) for one in asked]),
            spans=[(one.start, one.end) for one in asked],
        ),
    )


def _turn(prompts: ChatPrompts, document: Document) -> tuple[int, ...]:
    user, *rest = (message["content"] for message in document.messages)
    return prompts.turn(user, *rest)


def by_keys(num_layers: int) -> Iterator[tuple[str, Method]]:
    """Every latent method with every choice that is compared."""
    for layers in [(layer,) for layer in range(num_layers)] + [(0, 1)]:
        name = "+".join(map(str, layers))
        for space in ("plain", "centred", "all_but_the_top", "whitened"):
            for own_mean in (False, True):
                for rare in (False, True):
                    suffix = f"{space}{', own query mean' * own_mean}{', by rarity' * rare}, layer {name}"
                    options = {"space": space, "own_query_mean": own_mean, "by_rarity": rare}
                    yield f"pooled {suffix}", _with_keys(pooled, layers, options)
                    if space in ("centred", "whitened"):
                        yield f"late interaction {suffix}", _with_keys(late_interaction, layers, options)
    for layer in range(num_layers):
        yield f"late interaction whitened, competing, layer {layer}", _with_keys(competing, (layer,), {})
        yield f"key boxes, layer {layer}", _with_boxes(layer)
    for pairs in get_args(Pairs):
        yield f"learned projection by {pairs}, competing, layer 0", partial(_with_projection, pairs)


def _with_projection(pairs: Pairs, case: Case) -> Tensor:
    sessions = [document.session for document in case.corpus.documents]
    return projected(case.documents, case.queries, (0,), sessions, pairs=pairs)


def _with_keys(score: Callable[..., Tensor], layers: Sequence[int], options: dict[str, object]) -> Method:
    return lambda case: score(case.documents, case.queries, layers, **options)


def _with_boxes(layer: int) -> Method:
    return lambda case: key_boxes(case.documents, case.queries, layer)


def _with_head(head: Head) -> Method:
    layer, number, last_only, shared = head
    return lambda case: attention(
        case.documents, case.queries, layer, number, last_only=last_only, shared=shared
    )


def looking_up_heads(case: Case, num_layers: int, num_heads: int) -> list[tuple[float, Head]]:
    """Heads by how well they find evidence, best first."""
    heads = [
        (layer, head, last_only, shared)
        for layer in range(num_layers)
        for head in range(num_heads)
        for last_only in (False, True)
        for shared in (False, True)
        if not (last_only and shared)  # one token: competing changes no order
    ]
    found = [(measure(case, _with_head(head)(case))["all"]["recall@5"], head) for head in heads]
    return sorted(found, reverse=True)


def measure(case: Case, scores: Tensor) -> dict[str, dict[str, float]]:
    return summarize(_outcomes(case, scores))


def _outcomes(case: Case, scores: Tensor) -> Iterator[tuple[str, list[str], frozenset[str]]]:
    ids = [document.id for document in case.corpus.documents]
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :DEPTH].tolist()
    for query, ranking in zip(case.corpus.queries, order, strict=True):
        yield query.group, [ids[number] for number in ranking], query.evidence


def compare(cases: Sequence[Case], methods: dict[str, Method]) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by method over all cases; the best latent one is also fused with BM25."""
    found = {}
    for name, method in methods.items():
        outcomes = [outcome for case in cases for outcome in _outcomes(case, method(case))]
        found[name] = summarize(outcomes)
    latent = [name for name in found if not name.startswith(("BM25", "kv_agent"))]
    if not latent:
        return found
    best = max(latent, key=lambda name: found[name]["all"]["recall@5"])
    for weight in (0.25, 0.5, 1.0):
        fused = [
            outcome
            for case in cases
            for outcome in _outcomes(
                case, reciprocal_rank_fusion([case.lexical(), methods[best](case)], [1.0, weight])
            )
        ]
        found[f"RRF of BM25 and {weight} x ({best})"] = summarize(fused)
    return found


def corpora(name: str, num_queries: int) -> list[Corpus]:
    if name.startswith("world-"):
        return [world_corpus(int(name.removeprefix("world-")), num_queries=num_queries)]
    return locomo_corpora(Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", default="world-2000", help="world-N, or LoCoMo's file")
    parser.add_argument("--queries", type=int, default=400, help="questions asked of a world")
    parser.add_argument("--only", nargs="*", default=[""], help="methods whose name contains one of these")
    parser.add_argument("--results", type=Path, help="file that gets one JSON line")
    args = parser.parse_args()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompts = ChatPrompts(AutoTokenizer.from_pretrained(args.model))
    num_layers, num_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    known = world_corpus(CALIBRATION_FACTS, num_queries=args.queries, split=Split.VALIDATION)
    heads = looking_up_heads(make_case(model, prompts, known), num_layers, num_heads)
    cases = [make_case(model, prompts, corpus) for corpus in corpora(args.corpus, args.queries)]
    methods: dict[str, Method] = {"BM25 of words": Case.lexical, "BM25 of tokens": Case.lexical_by_tokens}
    for _, head in heads[:3]:
        layer, number, last_only, shared = head
        how = f"{'last token' if last_only else 'all tokens'}{', shared' * shared}"
        methods[f"attention of layer {layer} head {number}, {how}"] = _with_head(head)
    methods |= dict(by_keys(num_layers))
    for mode in get_args(Mode):
        methods[f"kv_agent, {mode}"] = partial(Case.product, mode=mode)
    methods = {
        name: method
        for name, method in methods.items()
        if name.startswith("BM25") or any(part in name for part in args.only)
    }
    found = compare(cases, methods)
    for name, groups in sorted(found.items(), key=lambda item: -item[1]["all"]["recall@5"]):
        row = groups["all"]
        print("  ".join(f"{metric} {row[metric]:.3f}" for metric in row if metric != "queries"), "", name)
    if args.results:
        record = {
            "benchmark": "retrieval_quality",
            "corpus": Path(args.corpus).stem,
            "model": args.model.name,
            "seconds": round(time.perf_counter() - started),
            "methods": found,
            "provenance": provenance(),
        }
        with args.results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
