"""What the splits share (words) and what they must not share (people, projects, phrasings)."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from benchmarks.world import RELATIONS, Split, WorldConfig, generate_world
from benchmarks.world.names import FIRST_NAMES, LAST_NAMES, PROJECT_MODIFIERS, PROJECT_NOUNS
from benchmarks.world.phrases import Relation
from benchmarks.world.small_talk import SMALL_TALK
from benchmarks.world.values import words
from tests.unit.world.reading import told_by

# Words without content of their own. "project" is part of how a subject is called.
FUNCTION_WORDS = frozenset(
    words(
        """
    a an and any are as at be by can did do does for from had has have how i in is it its many may me much
    must no now of on one or project should than that the this to under was what when where which who whom
    whose will with would you s v
    """
    )
)
PREFIX = 4  # "lives" and "live" are the same word


def stems(templates: tuple[str, ...]) -> set[str]:
    return {word[:PREFIX] for template in templates for word in words_in(template) - FUNCTION_WORDS}


def words_in(template: str) -> set[str]:
    return set(re.findall(r"[a-z]+", template.lower()))


def names_in(split: Split) -> set[str]:
    people_and_projects: set[str] = set()
    for seed in range(3):
        world = generate_world(WorldConfig(num_facts=3_000), split=split, seed=seed)
        for turn in world.turns.values():
            for readings in told_by(turn.user, split):
                for subject, relation, value in readings:
                    people_and_projects |= {subject, value} if RELATIONS[relation].is_hop else {subject}
    return people_and_projects


def test_name_lists_are_large_and_without_repeats() -> None:
    for parts in (FIRST_NAMES, LAST_NAMES):
        assert len(set(parts)) == len(parts) >= 60
    assert not set(FIRST_NAMES) & set(LAST_NAMES)
    assert not set(PROJECT_MODIFIERS) & set(PROJECT_NOUNS)


def test_no_person_or_project_occurs_in_two_splits() -> None:
    seen = Counter(name for split in Split for name in names_in(split))
    assert len(seen) > 15_000
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_no_phrasing_occurs_in_two_splits(relation: Relation) -> None:
    for one, other in combinations(Split, 2):
        assert not set(relation.phrases(one).all()) & set(relation.phrases(other).all())


def test_no_remark_of_small_talk_occurs_in_two_splits() -> None:
    seen = Counter(remark for split in Split for remark, _ in SMALL_TALK[split])
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_paraphrases_share_no_content_word_with_any_statement(relation: Relation) -> None:
    told = stems(sum(((relation.phrases(s).statements + relation.phrases(s).updates) for s in Split), ()))
    asked = stems(sum((relation.phrases(s).paraphrases for s in Split), ()))
    assert told
    assert asked
    assert not told & asked


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_held_out_phrasings_use_words_seen_in_training(relation: Relation) -> None:
    every_training_word = {
        word for one in RELATIONS.values() for template in one.train.all() for word in words_in(template)
    }
    seen = {word for template in relation.train.all() for word in words_in(template)}
    for split in (Split.VALIDATION, Split.TEST):
        held_out = {word for template in relation.phrases(split).all() for word in words_in(template)}
        assert held_out - FUNCTION_WORDS <= seen
        assert held_out <= every_training_word


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_every_relation_has_several_phrasings_in_training(relation: Relation) -> None:
    train = relation.train
    assert min(len(train.statements), len(train.questions), len(train.paraphrases)) >= 4
    for split in (Split.VALIDATION, Split.TEST):
        held_out = relation.phrases(split)
        assert min(len(held_out.statements), len(held_out.questions)) >= 2
        assert bool(held_out.updates) == bool(train.updates)
        assert bool(held_out.hops) == bool(train.hops)
