"""The harness of reuse quality on a real engine: what must be equal is equal, what is repaired is counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.reuse.cases import recall_cases
from benchmarks.reuse.lab import Lab
from benchmarks.reuse.measures import divergence
from benchmarks.reuse.ways import adapted, computed, exact, forgotten, ways
from benchmarks.reuse_documents import measure as measure_documents
from benchmarks.reuse_product import Bench
from benchmarks.reuse_product import measure as measure_product
from kv_agent.engines.base import Call
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.prompting import ChatPrompts
from tests.engine import support

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab.open(
        support.RECALL_MODEL,
        tmp_path_factory.mktemp("lab"),
        max_model_len=512,
        chunk_tokens=256,
        vocabulary=AutoConfig.from_pretrained(support.RECALL_MODEL).vocab_size,
        codec="raw",
    )
    yield lab
    lab.close()


def test_exact_is_what_computing_is_and_links_come_nearer_to_it(lab: Lab) -> None:
    prompts = ChatPrompts(lab.engine.tokenizer)
    (case,) = recall_cases(prompts, 4, 1)
    full, same = (lab.next_tokens(case, plan) for plan in lab.plans([computed(case), exact(case)]))
    for one, other in zip(full, same, strict=True):
        assert one == other

    apart = []
    for link_tokens in (0, 8):
        (plan,) = lab.plans([adapted(case, link_tokens=link_tokens)])
        moved = case.memories[1:]
        assert plan.repaired == sum(min(link_tokens, len(memory)) for memory in moved)
        (done,) = lab.answers([(case, plan)], 8)
        assert done.reuse.refused == ()
        assert done.reuse.adapted == sum(len(memory) for memory in moved) - plan.repaired
        assert done.reuse.exact == len(case.memories[0]) + plan.repaired
        found = lab.next_tokens(case, plan)
        apart.append(sum(divergence(a, b) for a, b in zip(full, found, strict=True)))
    assert 0 < apart[1] < apart[0]


def test_every_way_that_puts_back_puts_back_all_of_the_memories(lab: Lab) -> None:
    prompts = ChatPrompts(lab.engine.tokenizer)
    (case,) = recall_cases(prompts, 3, 1, system_prompt="Be brief.", before_tokens=50, filler_tokens=40)
    length = len(case.prompt) - len(case.fresh)
    for name, way in ways(prompts.neutral).items():
        (plan,) = lab.plans([way(case)])
        (done,) = lab.answers([(case, plan)], 1)
        assert not done.reuse.refused, name
        assert len(lab.next_tokens(case, plan)) == len(case.fresh), name
        if plan.placed:
            assert done.reuse.exact + done.reuse.adapted == length, name


def test_cases_side_by_side_are_answered_as_one_by_one(lab: Lab) -> None:
    prompts = ChatPrompts(lab.engine.tokenizer)
    cases = list(recall_cases(prompts, 3, 5))
    together = lab.plans(adapted(case, link_tokens=2) for case in cases)
    answers = lab.answers(list(zip(cases, together, strict=True)), 4)
    for case, plan, done in zip(cases, together, answers, strict=True):
        (alone,) = lab.answers([(case, plan)], 4)
        assert done.token_ids == alone.token_ids
        assert not done.reuse.refused
        assert done.reuse.exact + done.reuse.adapted == case.memory_tokens
        assert plan.repaired == 2 * (len(case.memories) - 1)


def test_the_product_is_measured_through_its_own_interface(tmp_path: Path) -> None:
    engine = VllmEngine(
        support.RECALL_MODEL, {"store": str(tmp_path)}, dtype="float32", max_model_len=512, seed=0
    )
    bench = Bench(engine, tmp_path)
    with bench.manager:
        rows = {
            str(row["quality"]): row for row in measure_product(bench, ("fast", "balanced", "exact"), 4, 3, 2)
        }
        told = {str(row["quality"]): row for row in measure_documents(bench, 15, 2)}
    assert list(rows) == ["computed", "fast", "balanced", "exact"]
    for name, row in rows.items():
        shares = [float(str(row[part])) for part in ("exact", "adapted", "local", "computed")]
        assert math.isclose(sum(shares), 1.0, abs_tol=1e-4), name
        assert row["refused"] == 0.0
        assert row["requests_repeated"] == (1.0 if name == "computed" else 2.0), "a probe and the answer"
    assert rows["exact"]["same_answer"] == rows["computed"]["same_answer"] == 1.0
    assert rows["computed"]["computed"] == 1.0
    assert rows["fast"]["adapted"] > rows["fast"]["computed"]
    assert rows["fast"]["repaired_tokens"] == 0.0 < rows["balanced"]["repaired_tokens"]
    assert rows["fast"]["requests"] == 4.0, "a probe, a neutral turn and the opening behind it, the answer"
    assert rows["balanced"]["requests"] > 2.0
    assert list(told) == ["computed", "fast", "balanced"]
    assert told["computed"]["reused"] == 0.0
    assert told["fast"]["adapted"] > 0.2
    assert told["fast"]["reused_again"] >= told["fast"]["reused"] > told["fast"]["adapted"]
    assert told["fast"]["requests_again"] == 1.0 < told["fast"]["requests"] < told["balanced"]["requests"]


def test_without_memories_the_question_stands_alone(lab: Lab) -> None:
    prompts = ChatPrompts(lab.engine.tokenizer)
    (case,) = recall_cases(prompts, 3, 1, system_prompt="Be brief.")
    (plan,) = lab.plans([forgotten(case)])
    (done,) = lab.answers([(case, plan)], 8)
    bare = case.prompt[: len(case.prefix)] + case.fresh
    (expected,) = lab.engine.run([Call(token_ids=bare, max_tokens=8)])
    assert done.reuse.computed + done.reuse.local == len(bare)
    assert done.token_ids == expected.token_ids
