"""From a seed to a world: facts told in sessions, and questions about them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.world.facts import RELATIONS, Fact, WorldConfig, draw_facts
from benchmarks.world.questions import Asker, Known
from benchmarks.world.records import Session, Split, Turn, TurnId, World
from benchmarks.world.slips import draw_template
from benchmarks.world.small_talk import ACKNOWLEDGEMENTS, draw_small_talk


def generate_world(config: WorldConfig, *, split: Split, seed: int, wording: Split | None = None) -> World:
    """The same world for the same arguments, in every process.

    ``wording`` puts the people of ``split`` into the phrasings of another.
    """
    wording = wording or split
    # Seeded by text: unlike hash(), this does not differ between processes.
    rng = random.Random(f"{split.value}/{seed}")
    draw = draw_facts(config, split, rng)
    known: dict[tuple[str, str], Known] = {}
    sessions = []
    for number, start in enumerate(range(0, len(draw.facts), config.facts_per_session)):
        facts = draw.facts[start : start + config.facts_per_session]
        sessions.append(_tell(f"s{number:05}", facts, config, wording, known, rng))
    asker = Asker(config=config, wording=wording, known=known, draw=draw, rng=rng)
    return World(split=split, seed=seed, sessions=tuple(sessions), questions=tuple(asker.questions()))


def _tell(
    session_id: str,
    facts: tuple[Fact, ...],
    config: WorldConfig,
    wording: Split,
    known: dict[tuple[str, str], Known],
    rng: random.Random,
) -> Session:
    """A session that tells the facts in their order; ``known`` learns them."""
    turns: list[Turn] = []
    for group in _groups(facts, config.facts_per_turn, rng):
        if rng.random() < config.small_talk_share:
            remark, reply = draw_small_talk(wording, rng)
            turns.append(Turn(id=_turn_id(session_id, len(turns)), user=remark, assistant=reply))
        turn_id = _turn_id(session_id, len(turns))
        text = " ".join(_state(fact, config, wording, rng) for fact in group)
        turns.append(Turn(id=turn_id, user=text, assistant=rng.choice(ACKNOWLEDGEMENTS)))
        for fact in group:
            known[fact.subject, fact.relation] = Known(fact=fact, turn=turn_id)
    return Session(id=session_id, turns=tuple(turns))


def _groups(facts: tuple[Fact, ...], most: int, rng: random.Random) -> Iterator[tuple[Fact, ...]]:
    start = 0
    while start < len(facts):
        size = rng.randint(1, most)
        yield facts[start : start + size]
        start += size


def _state(fact: Fact, config: WorldConfig, wording: Split, rng: random.Random) -> str:
    phrases = RELATIONS[fact.relation].phrases(wording)
    templates = phrases.updates if fact.is_update else phrases.statements
    template = draw_template(templates, config.slip_share, rng)
    return template.format(s=fact.subject, v=fact.value)


def _turn_id(session_id: str, number: int) -> TurnId:
    return TurnId(f"{session_id}.t{number:03}")
