"""Facts and their corrections, drawn before anything is put into words."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.world import person_basics, person_details, person_tastes, project_relations
from benchmarks.world.names import NamePool
from benchmarks.world.phrases import Relation
from benchmarks.world.records import Split, ValueKind
from benchmarks.world.values import draw_value

# What a model learns from beside the phrasings in the modules: written without looking at the held-out ones.
_MORE_TO_LEARN = json.loads((Path(__file__).parent / "training_phrasings.json").read_text(encoding="utf-8"))

RELATIONS: dict[str, Relation] = {
    relation.name: replace(relation, train=relation.train.with_more(_MORE_TO_LEARN[relation.name]))
    for module in (person_basics, person_tastes, person_details, project_relations)
    for relation in module.RELATIONS
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldConfig:
    """How large a world is and what its facts are like.

    ``facts_per_subject`` is the most that is known about one subject (1: all subjects are distinct); the
    shares are of facts, ``two_hop_share`` and ``unknown_share`` count questions per fact. ``relations``
    limits what can be known.
    """

    num_facts: int
    facts_per_subject: int = 1
    facts_per_turn: int = 1
    facts_per_session: int = 20
    project_share: float = 0.25
    hop_share: float = 0.15  # mentors and leads
    similar_share: float = 0.1  # subjects with a first or last name of another
    correction_share: float = 0.1
    small_talk_share: float = 0.1
    questions_per_fact: int = 1
    paraphrase_share: float = 0.25
    two_hop_share: float = 0.1
    unknown_share: float = 0.1
    slip_share: float = 0.0  # phrasings with a word too few, too many or misplaced
    relations: tuple[str, ...] = tuple(RELATIONS)

    def __post_init__(self) -> None:
        counts = (
            "num_facts",
            "facts_per_subject",
            "facts_per_turn",
            "facts_per_session",
            "questions_per_fact",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        unknown = set(self.relations) - set(RELATIONS)
        if unknown or not self.relations:
            raise ValueError(f"relations must name some of {sorted(RELATIONS)}, got {self.relations}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """That ``subject`` stands in ``relation`` to ``value``; ``is_update`` when it replaces an older one."""

    subject: str
    relation: str
    value: str
    is_update: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The facts of a world in the order they are told, and the pools that hold the names left over."""

    facts: tuple[Fact, ...]
    people: NamePool
    projects: NamePool


def draw_facts(config: WorldConfig, split: Split, rng: random.Random) -> Draw:
    """``num_facts`` facts in random order, each correction somewhere after the fact it corrects."""
    people, projects = NamePool.of_people(split), NamePool.of_projects(split)
    pairs = _draw_subjects(config, people, projects, rng)
    known_people = list(dict.fromkeys(s for s, relation in pairs if not relation.about_project))
    timed: list[tuple[float, Fact]] = []
    for subject, relation in pairs:
        value = _draw_value(relation, subject, known_people, people, rng)
        told_at = rng.random()
        timed.append((told_at, Fact(subject=subject, relation=relation.name, value=value)))
        if relation.can_change and rng.random() < config.correction_share:
            newer = value
            while newer == value:
                newer = _draw_value(relation, subject, known_people, people, rng)
            update = Fact(subject=subject, relation=relation.name, value=newer, is_update=True)
            timed.append((rng.uniform(told_at, 1.0), update))
    timed.sort(key=lambda pair: pair[0])
    return Draw(facts=tuple(fact for _, fact in timed), people=people, projects=projects)


def _draw_subjects(
    config: WorldConfig, people: NamePool, projects: NamePool, rng: random.Random
) -> list[tuple[str, Relation]]:
    allowed = [RELATIONS[name] for name in config.relations]
    of_people = [relation for relation in allowed if not relation.about_project]
    of_projects = [relation for relation in allowed if relation.about_project]
    pairs: list[tuple[str, Relation]] = []
    while len(pairs) < config.num_facts:
        wants_project = not of_people or rng.random() < config.project_share
        on_project = bool(of_projects) and wants_project and (projects.num_left > 0 or not of_people)
        pool, choices = (projects, of_projects) if on_project else (people, of_people)
        subject = pool.draw(rng, config.similar_share)
        num_wanted = min(rng.randint(1, config.facts_per_subject), config.num_facts - len(pairs))
        pairs.extend((subject, relation) for relation in _draw_relations(choices, num_wanted, config, rng))
    return pairs


def _draw_relations(
    choices: Sequence[Relation], num_wanted: int, config: WorldConfig, rng: random.Random
) -> list[Relation]:
    left = list(choices)
    drawn: list[Relation] = []
    while left and len(drawn) < num_wanted:
        wants_hop = rng.random() < config.hop_share
        matching = [relation for relation in left if relation.is_hop == wants_hop] or left
        drawn.append(rng.choice(matching))
        left.remove(drawn[-1])
    return drawn


def _draw_value(
    relation: Relation, subject: str, known_people: Sequence[str], people: NamePool, rng: random.Random
) -> str:
    if relation.kind is not ValueKind.NAME:
        return draw_value(relation.name, rng)
    # Someone of whom something else is known makes a two-hop question possible.
    if len(known_people) > 2:
        while (name := rng.choice(known_people)) == subject:
            pass
        return name
    others = [name for name in known_people if name != subject]
    if others and rng.random() < 0.5:
        return others[0]
    return people.draw(rng)
