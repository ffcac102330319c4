"""The generator as a function of its arguments: sizes, distinct subjects, the same world everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.world import Ask, Split, World, WorldConfig, generate_world
from tests.unit.world.reading import asked_by, told_by

ROOT = Path(__file__).resolve().parents[3]
SMALL = WorldConfig(num_facts=50, facts_per_subject=2, correction_share=0.3)
SMALL_DIGEST = "ce26fa872b0b647942c5fa97d20f4f8515d2e1fe616565619ad53a3582700f68"


def digest_in_new_process(hash_seed: str) -> str:
    code = (
        "from benchmarks.world import Split, WorldConfig, generate_world\n"
        "config = WorldConfig(num_facts=50, facts_per_subject=2, correction_share=0.3)\n"
        "print(generate_world(config, split=Split.TEST, seed=7).digest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    return done.stdout.strip()


def test_world_of_a_seed_never_changes() -> None:
    assert generate_world(SMALL, split=Split.TEST, seed=7).digest() == SMALL_DIGEST


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_world_is_the_same_in_a_process_with_other_hashes(hash_seed: str) -> None:
    assert digest_in_new_process(hash_seed) == SMALL_DIGEST


def test_other_seed_or_split_makes_another_world() -> None:
    digests = {generate_world(SMALL, split=split, seed=seed).digest() for split in Split for seed in (7, 8)}
    assert len(digests) == 6


def test_20_000_facts_have_distinct_subjects() -> None:
    world = generate_world(WorldConfig(num_facts=20_000, correction_share=0.0), split=Split.TEST, seed=0)
    facts = [
        reading
        for turn in world.turns.values()
        for told in told_by(turn.user, Split.TEST)
        for reading in told
    ]
    assert len(facts) == 20_000
    assert len({subject for subject, _, _ in facts}) == 20_000


def test_only_named_relations_are_told_and_asked() -> None:
    config = WorldConfig(num_facts=200, relations=("room", "lead"), facts_per_subject=2)
    world = generate_world(config, split=Split.TRAIN, seed=3)
    told = {
        relation
        for turn in world.turns.values()
        for readings in told_by(turn.user, Split.TRAIN)
        for _, relation, _ in readings
    }
    asked = {relation for question in world.questions for relation in question.relations}
    assert told == asked == {"room", "lead"}


def test_one_fact_makes_one_question() -> None:
    config = WorldConfig(num_facts=1, two_hop_share=0.0, unknown_share=0.0, correction_share=0.0)
    world = generate_world(config, split=Split.TRAIN, seed=5)
    assert [question.ask in (Ask.DIRECT, Ask.PARAPHRASE) for question in world.questions] == [True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_facts": 0},
        {"num_facts": 1, "facts_per_turn": 0},
        {"num_facts": 1, "relations": ("height",)},
        {"num_facts": 1, "relations": ()},
    ],
)
def test_impossible_configuration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        WorldConfig(**wrong)  # type: ignore[arg-type]


def test_the_people_of_one_split_can_speak_in_the_phrasings_of_another() -> None:
    config = WorldConfig(num_facts=200, facts_per_subject=2)
    borrowed = generate_world(config, split=Split.TEST, seed=4, wording=Split.TRAIN)
    own = generate_world(config, split=Split.TEST, seed=4)
    learnt = generate_world(config, split=Split.TRAIN, seed=4)

    def subjects(world: World, wording: Split) -> set[str]:
        told = [readings for turn in world.turns.values() for readings in told_by(turn.user, wording)]
        return {subject for readings in told for subject, _, _ in readings}

    assert len(subjects(own, Split.TEST)) > 100
    assert not subjects(own, Split.TRAIN)
    # The generator draws facts before it words them.
    assert subjects(borrowed, Split.TRAIN) == subjects(own, Split.TEST)
    assert not subjects(borrowed, Split.TRAIN) & subjects(learnt, Split.TRAIN)
    for question in borrowed.questions:
        assert asked_by(question.text, Split.TRAIN)


def test_more_subjects_than_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no names left"):
        generate_world(WorldConfig(num_facts=30_000), split=Split.TRAIN, seed=0)
