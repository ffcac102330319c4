"""What is searched and asked: the recall world at any size, and LoCoMo's long conversations."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.world import Ask, Message, Split, WorldConfig, generate_world

LOCOMO_CATEGORIES = {1: "multi_hop", 2: "temporal", 3: "open_domain", 4: "single_hop"}
_DIALOGUE_ID = re.compile(r"D(\d+):(\d+)")
_SESSION = re.compile(r"session_(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One turn that may be found; ``session`` is where it was said."""

    id: str
    session: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A question, the documents that hold its answer, and what kind of question it is."""

    text: str
    evidence: frozenset[str]
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents of one owner, in the order they were said, and questions about them."""

    name: str
    documents: Sequence[Document]
    queries: Sequence[Query]


def world_corpus(num_facts: int, *, num_queries: int, seed: int = 0, split: Split = Split.TEST) -> Corpus:
    """Facts in unseen phrasings over sessions of 20, and questions that have an answer."""
    config = WorldConfig(num_facts=num_facts, two_hop_share=0.1, unknown_share=0.0)
    world = generate_world(config, split=split, seed=seed)
    documents = [
        Document(id=turn.id, session=session.id, messages=tuple(turn.messages))
        for session in world.sessions
        for turn in session.turns
    ]
    answered = [question for question in world.questions if question.ask is not Ask.UNKNOWN]
    asked = random.Random(seed).sample(answered, min(num_queries, len(answered)))
    queries = [
        Query(text=question.text, evidence=frozenset(question.evidence), group=question.ask.value)
        for question in asked
    ]
    return Corpus(name=f"world-{num_facts}", documents=documents, queries=queries)


def locomo_corpora(path: Path) -> list[Corpus]:
    """One corpus a conversation: its turns, and the questions of categories 1 to 4 that name evidence."""
    return [_conversation(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def _conversation(entry: dict[str, Any]) -> Corpus:
    turns = [
        (name, turn)
        for name, said in entry["conversation"].items()
        if _SESSION.fullmatch(name)
        for turn in said
    ]
    documents = [
        Document(id=turn["dia_id"], session=session, messages=(Message(role="user", content=_said(turn)),))
        for session, turn in turns
    ]
    known = {document.id for document in documents}
    queries = []
    for question in entry["qa"]:
        evidence = frozenset(_named(question.get("evidence", ()))) & known
        if question["category"] in LOCOMO_CATEGORIES and evidence:
            group = LOCOMO_CATEGORIES[question["category"]]
            queries.append(Query(text=question["question"], evidence=evidence, group=group))
    return Corpus(name=f"locomo-{entry['sample_id']}", documents=documents, queries=queries)


def _said(turn: dict[str, Any]) -> str:
    caption = turn.get("blip_caption")
    return f"{turn['speaker']}: {turn['text']}" + (f" {caption}" if caption else "")


def _named(evidence: Iterable[str]) -> Iterable[str]:
    """Some entries hold several ids, or one with a stray zero."""
    for text in evidence:
        for session, number in _DIALOGUE_ID.findall(text):
            yield f"D{int(session)}:{int(number)}"
