"""Which turns a query finds: by their words, by the model's own keys, or by both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kv_agent.chunks import EVERY_TURN, Fingerprint, Scope, TurnFilter, TurnId, TurnRecord
from kv_agent.errors import ConfigError
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.storage.catalog import Catalog
from kv_agent.storage.words import words

Mode = Literal["hybrid", "latent", "lexical"]
VoiceName = Literal["latent", "lexical", "embedding"]
Ranking = Sequence[tuple[TurnId, float]]
Probe = Callable[[str], Any]  # the keys of a query's tokens, [t, V]

_DEPTH = 100  # places of each voice that count in a fusion
_FUSION = 60  # the constant of reciprocal rank fusion
_NEAR_DUPLICATE = 0.9  # share of words in common
_SPARE = 4  # times top_k are looked at, so that duplicates can give way


@dataclass(frozen=True, slots=True, kw_only=True)
class TextVoice:
    """An index over embeddings of texts, and what embeds a query -> [V]."""

    index: RetrievalEngine
    embed: Callable[[str], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Where is searched: the memories of one model. Hybrid asks ``texts``, too, where there is one."""

    catalog: Catalog
    index: RetrievalEngine
    fingerprint: Fingerprint
    texts: TextVoice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is searched for. ``only`` narrows ``scope`` further."""

    query: str
    scope: Scope
    top_k: int
    mode: Mode = "hybrid"
    only: TurnFilter = EVERY_TURN

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k must be >= 1, got {self.top_k}")
        if self.mode not in get_args(Mode):
            raise ConfigError(f'mode must be "hybrid", "latent" or "lexical", got {self.mode!r}')


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """Where one way of searching had a turn: ``rank`` from 1, and its own ``score``."""

    rank: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A turn with the score of the request's mode, and what each way of searching said of it."""

    turn: TurnRecord
    score: float
    voices: Mapping[VoiceName, Voice]


def find_turns(library: Library, probe: Probe, request: Request) -> list[Found]:
    """The ``top_k`` best turns, best first.

    ``probe`` gives the keys of the query's tokens; it is called only when they are needed. Hybrid adds up
    reciprocal ranks (Cormack et al., 2009); what words find is also compared by keys. Among equals the newer
    comes first, and of turns that say nearly the same all but the newest come last. An empty query finds
    nothing.
    """
    if not request.query.strip():
        return []
    said = _rankings(library, probe, request)
    scores = _fused(said.values()) if request.mode == "hybrid" else dict(said[request.mode])
    best = sorted(scores, key=lambda turn_id: -scores[turn_id])[: _SPARE * request.top_k]
    turns = library.catalog.turns(best)
    ranks = {name: _ranked(ranking) for name, ranking in said.items()}
    found = [
        Found(
            turn=turns[turn_id],
            score=scores[turn_id],
            voices={name: voices[turn_id] for name, voices in ranks.items() if turn_id in voices},
        )
        for turn_id in best
        if turn_id in turns  # otherwise forgotten meanwhile
    ]
    found.sort(key=lambda one: (-one.score, -one.turn.created))
    return _without_repetition(found)[: request.top_k]


def _rankings(library: Library, probe: Probe, request: Request) -> dict[VoiceName, Ranking]:
    """What each voice of the request's mode finds, best first."""
    catalog, scope = library.catalog, request.scope
    depth = _SPARE * request.top_k
    if request.mode == "hybrid":
        depth = max(depth, _DEPTH)
    said: dict[VoiceName, Ranking] = {}
    if request.mode != "latent":
        hits = catalog.search_text(request.query, scope, library.fingerprint, depth, request.only)
        said["lexical"] = [(hit.turn_id, hit.score) for hit in hits]
    if request.mode == "lexical":
        return said
    only = None if request.only.admits_all else catalog.turn_ids(scope, request.only)
    by_words = [turn_id for turn_id, _ in said.get("lexical", ())]
    by_keys = library.index.search(probe(request.query), scope, depth, also=by_words, only=only)
    said["latent"] = [(hit.turn_id, hit.score) for hit in by_keys]
    if request.mode == "hybrid" and library.texts is not None:
        vector_V = library.texts.embed(request.query)
        by_texts = library.texts.index.search(vector_V, scope, depth, only=only)
        said["embedding"] = [(hit.turn_id, hit.score) for hit in by_texts]
    return said


def _fused(rankings: Iterable[Ranking]) -> dict[TurnId, float]:
    scores: dict[TurnId, float] = {}
    for ranking in rankings:
        for turn_id, voice in _ranked(ranking).items():
            scores[turn_id] = scores.get(turn_id, 0.0) + 1 / (_FUSION + voice.rank)
    return scores


def _ranked(ranking: Ranking) -> dict[TurnId, Voice]:
    return {turn_id: Voice(rank=rank, score=score) for rank, (turn_id, score) in enumerate(ranking, start=1)}


def _without_repetition(found: Sequence[Found]) -> list[Found]:
    """The newest of near-duplicates in the place of the best; the others behind everything else."""
    groups: list[tuple[frozenset[str], list[Found]]] = []
    for one in found:
        said = frozenset(words(one.turn.text))
        group = next((group for had, group in groups if _alike(said, had)), None)
        if group is None:
            groups.append((said, [one]))
        else:
            group.append(one)
    newest = [max(group, key=lambda one: one.turn.created) for _, group in groups]
    kept = {one.turn.turn_id for one in newest}
    return newest + [one for one in found if one.turn.turn_id not in kept]


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    fewer, more = sorted((len(one), len(other)))
    return (
        fewer > 0
        and fewer >= _NEAR_DUPLICATE * more
        and len(one & other) >= _NEAR_DUPLICATE * len(one | other)
    )
