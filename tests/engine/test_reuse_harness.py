"""The harness of reuse quality on a real engine: what must be equal is equal, what is repaired is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AutoConfig

from benchmarks.reuse.cases import recall_cases
from benchmarks.reuse.lab import Lab
from benchmarks.reuse.measures import divergence
from benchmarks.reuse.ways import adapted, computed, exact, ways
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
    )
    yield lab
    lab.close()


def test_exact_is_what_computing_is_and_links_come_nearer_to_it(lab: Lab) -> None:
    prompts = ChatPrompts(lab.engine.tokenizer)
    (case,) = recall_cases(prompts, 4, 1)
    following = {
        name: lab.next_tokens(case, way(lab, case)) for name, way in (("full", computed), ("exact", exact))
    }
    for one, other in zip(following["full"], following["exact"], strict=True):
        assert one == other

    apart = []
    for link_tokens in (0, 8):
        plan = adapted(lab, case, link_tokens=link_tokens)
        moved = case.memories[1:]
        assert plan.repaired == sum(min(link_tokens, len(memory)) for memory in moved)
        done = lab.answer(case, plan, 8)
        assert done.reuse.refused == ()
        assert done.reuse.adapted == sum(len(memory) for memory in moved) - plan.repaired
        assert done.reuse.exact == len(case.memories[0]) + plan.repaired
        found = lab.next_tokens(case, plan)
        apart.append(sum(divergence(a, b) for a, b in zip(following["full"], found, strict=True)))
    assert 0 < apart[1] < apart[0]


def test_every_way_that_puts_back_puts_back_all_of_the_memories(lab: Lab) -> None:
    prompts = ChatPrompts(lab.engine.tokenizer)
    (case,) = recall_cases(prompts, 3, 1, system_prompt="Be brief.")
    length = len(case.prompt) - len(case.fresh)
    for name, way in ways(prompts.neutral).items():
        plan = way(lab, case)
        reuse = lab.answer(case, plan, 1).reuse
        assert not reuse.refused, name
        if plan.placed:
            assert reuse.exact + reuse.adapted == length, name
