"""Questions about drawn facts, their answers and the turns these follow from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.world.facts import RELATIONS, Draw, Fact, WorldConfig
from benchmarks.world.phrases import Relation
from benchmarks.world.records import UNKNOWN_ANSWER, Ask, Question, Split, TurnId
from benchmarks.world.slips import draw_template

_UNKNOWN_TRIES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The newest fact about a subject in a relation, and the turn that told it."""

    fact: Fact
    turn: TurnId


Knowledge = Mapping[tuple[str, str], Known]  # (subject, relation) -> newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Puts questions about one world into the words of a split."""

    config: WorldConfig
    wording: Split
    known: Knowledge
    draw: Draw
    rng: random.Random

    def questions(self) -> list[Question]:
        """Questions about every known fact, two-hop and unanswerable ones, shuffled."""
        repeats = range(self.config.questions_per_fact)
        drafts = [self._about_fact(known) for known in self.known.values() for _ in repeats]
        drafts += self._two_hop()
        drafts += self._unanswerable()
        self.rng.shuffle(drafts)
        return [replace(draft, id=f"q{number:05}") for number, draft in enumerate(drafts)]

    def _about_fact(self, known: Known) -> Question:
        relation = RELATIONS[known.fact.relation]
        text, is_paraphrase = self._put(relation, known.fact.subject)
        ask = Ask.PARAPHRASE if is_paraphrase else Ask.DIRECT
        if known.fact.is_update:
            ask = Ask.CORRECTED
        return _answered(text, ask, (relation,), (known,))

    def _two_hop(self) -> list[Question]:
        paths = list(self._paths())
        num_wanted = min(len(paths), self._count(self.config.two_hop_share))
        made = []
        for first, second in self.rng.sample(paths, num_wanted):
            hop, relation = RELATIONS[first.fact.relation], RELATIONS[second.fact.relation]
            middle = self._hop(hop, first.fact.subject)
            text, _ = self._put(relation, middle)
            made.append(_answered(text, Ask.TWO_HOP, (hop, relation), (first, second)))
        return made

    def _paths(self) -> Iterator[tuple[Known, Known]]:
        for first in self.known.values():
            if RELATIONS[first.fact.relation].is_hop:
                for name in RELATIONS:
                    second = self.known.get((first.fact.value, name))
                    if second is not None:
                        yield first, second

    def _unanswerable(self) -> list[Question]:
        made = []
        told = list(self.known)
        for _ in range(self._count(self.config.unknown_share)):
            subject, relation = self._unknown_pair(told)
            text, _ = self._put(relation, subject)
            made.append(_unanswered(text, relation))
        return made

    def _unknown_pair(self, told: Sequence[tuple[str, str]]) -> tuple[str, Relation]:
        """Half the time something untold about a known subject, else anything about a stranger."""
        allowed = [RELATIONS[name] for name in self.config.relations]
        if self.rng.random() < 0.5:
            for _ in range(_UNKNOWN_TRIES):
                subject, known_relation = self.rng.choice(told)
                relation = self.rng.choice(allowed)
                is_fitting = relation.about_project == RELATIONS[known_relation].about_project
                if is_fitting and (subject, relation.name) not in self.known:
                    return subject, relation
        pools = {True: self.draw.projects, False: self.draw.people}
        relation = self.rng.choice([one for one in allowed if pools[one.about_project].num_left > 0])
        pool = pools[relation.about_project]
        return pool.draw(self.rng, self.config.similar_share), relation

    def _put(self, relation: Relation, subject: str) -> tuple[str, bool]:
        phrases = relation.phrases(self.wording)
        is_paraphrase = self.rng.random() < self.config.paraphrase_share
        templates = phrases.paraphrases if is_paraphrase else phrases.questions
        template = draw_template(templates, self.config.slip_share, self.rng)
        return template.format(s=subject), is_paraphrase

    def _hop(self, hop: Relation, subject: str) -> str:
        template = draw_template(hop.phrases(self.wording).hops, self.config.slip_share, self.rng)
        return template.format(s=subject)

    def _count(self, share: float) -> int:
        """``share`` of the facts on average, also where that is less than one."""
        return int(share * self.config.num_facts + self.rng.random())


def _answered(text: str, ask: Ask, path: tuple[Relation, ...], steps: tuple[Known, ...]) -> Question:
    return Question(
        id="",
        text=text,
        answer=f"{': '.join(step.fact.value for step in steps)}.",
        ask=ask,
        relations=tuple(relation.name for relation in path),
        kind=path[-1].kind,
        evidence=tuple(step.turn for step in steps),
    )


def _unanswered(text: str, relation: Relation) -> Question:
    return Question(
        id="",
        text=text,
        answer=UNKNOWN_ANSWER,
        ask=Ask.UNKNOWN,
        relations=(relation.name,),
        kind=None,
        evidence=(),
    )
