"""Corpora hold what their sources say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.retrieval.corpora import locomo_corpora, world_corpus

LOCOMO = Path(__file__).resolve().parents[4] / "shared" / "data" / "locomo10.json"


def test_a_world_is_searched_by_questions_whose_evidence_is_in_it() -> None:
    corpus = world_corpus(200, num_queries=50)
    documents = {document.id: document for document in corpus.documents}
    assert len(documents) == len(corpus.documents) >= 200
    assert len(corpus.queries) == 50
    assert {document.session for document in corpus.documents} >= {"s00000", "s00001"}
    for query in corpus.queries:
        assert query.evidence
        assert query.evidence <= set(documents)
        assert len(query.evidence) == (2 if query.group == "two_hop" else 1)


def entry(**qa: object) -> dict[str, object]:
    turn = {"speaker": "Ann", "dia_id": "D1:1", "text": "Look.", "blip_caption": "a cat"}
    other = {"speaker": "Bob", "dia_id": "D2:1", "text": "Nice!"}
    conversation = {
        "speaker_a": "Ann",
        "session_1_date_time": "noon",
        "session_1": [turn],
        "session_2": [other],
    }
    question = {"question": "What?", "answer": "a cat", "category": 4, "evidence": ["D1:1"], **qa}
    return {"sample_id": "one", "conversation": conversation, "qa": [question]}


def write(folder: Path, *entries: object) -> Path:
    path = folder / "locomo.json"
    path.write_text(json.dumps(entries))
    return path


def test_locomo_turns_carry_speaker_and_caption(tmp_path: Path) -> None:
    (corpus,) = locomo_corpora(write(tmp_path, entry()))
    assert [document.text for document in corpus.documents] == ["Ann: Look. a cat", "Bob: Nice!"]
    assert [document.session for document in corpus.documents] == ["session_1", "session_2"]


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (["D1:1"], {"D1:1"}),
        (["D1:1; D2:01"], {"D1:1", "D2:1"}),
        (["D1:1 D2:1"], {"D1:1", "D2:1"}),
        (["D1:1", "D9:9"], {"D1:1"}),
    ],
)
def test_locomo_evidence_is_read_as_it_is_written(
    tmp_path: Path, evidence: list[str], expected: set[str]
) -> None:
    (corpus,) = locomo_corpora(write(tmp_path, entry(evidence=evidence)))
    assert [query.evidence for query in corpus.queries] == [expected]


@pytest.mark.parametrize("change", [{"category": 5}, {"evidence": []}, {"evidence": ["D"]}])
def test_locomo_questions_without_usable_evidence_are_left_out(
    tmp_path: Path, change: dict[str, object]
) -> None:
    (corpus,) = locomo_corpora(write(tmp_path, entry(**change)))
    assert corpus.queries == []


@pytest.mark.skipif(not LOCOMO.exists(), reason="LoCoMo is not at hand; its licence keeps it elsewhere")
def test_the_whole_of_locomo_is_there() -> None:
    corpora = locomo_corpora(LOCOMO)
    assert len(corpora) == 10
    assert sum(len(corpus.documents) for corpus in corpora) == 5882
    assert sum(len(corpus.queries) for corpus in corpora) > 1500
