"""Phrasings with a slip: one word less, one more or misplaced, and still the same fact."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.world import Split, WorldConfig, generate_world
from benchmarks.world.facts import RELATIONS
from benchmarks.world.slips import draw_template, with_slip


def order(template: str) -> list[str]:
    return sorted((field for field in ("{s}", "{v}") if field in template), key=template.index)


@pytest.mark.parametrize("seed", range(3))
def test_subject_and_value_stay_in_their_order(seed: int) -> None:
    rng = random.Random(seed)
    for relation in RELATIONS.values():
        templates = tuple(relation.train.all())
        for template in templates:
            slipped = with_slip(template, templates, rng)
            assert order(slipped) == order(template)
            assert slipped.endswith((".", "?")) == template.endswith((".", "?"))


def test_one_word_at_most_comes_goes_or_moves() -> None:
    rng = random.Random(0)
    template, other = "{s} learns from {v} as a mentor.", "{v} teaches {s}."
    changes = Counter()
    for _ in range(300):
        words = with_slip(template, (other,), rng).rstrip(".").split(" ")
        before, now = Counter(template.rstrip(".").split(" ")), Counter(words)
        lost, added = before - now, now - before
        assert lost.total() + added.total() <= 1
        assert set(added) <= {"teaches"}
        changes["lost" if lost else "added" if added else "moved"] += 1
    assert min(changes["lost"], changes["added"], changes["moved"]) > 50


def test_a_template_without_plain_words_stays() -> None:
    rng = random.Random(0)
    assert {with_slip("{s} {v}.", ("{v} {s}.",), rng) for _ in range(20)} == {"{s} {v}."}


def test_without_slips_worlds_are_what_they_were() -> None:
    rng, same = random.Random(1), random.Random(1)
    assert draw_template(("a", "b", "c"), 0.0, rng) == same.choice(("a", "b", "c"))
    assert rng.getstate() == same.getstate()


def test_a_world_with_slips_tells_the_same_kind_of_facts_in_other_words() -> None:
    config = WorldConfig(num_facts=40, small_talk_share=0.0, slip_share=1.0)
    told = generate_world(config, split=Split.TRAIN, seed=3)
    plain = generate_world(replace(config, slip_share=0.0), split=Split.TRAIN, seed=3)
    for world in (told, plain):
        by_id = {turn.id: turn.user for session in world.sessions for turn in session.turns}
        for question in world.questions:
            if question.evidence:
                for value, turn in zip(question.answer[:-1].split(": "), question.evidence, strict=True):
                    assert value in by_id[turn]
    said = {turn.user for session in told.sessions for turn in session.turns}
    assert said.isdisjoint(turn.user for session in plain.sessions for turn in session.turns)
