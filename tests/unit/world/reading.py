"""A reader of worlds that knows only their text: it parses sentences, keeps the newest fact and follows hops.

It shares the templates with the generator but none of its bookkeeping, so agreement means that the text of
the evidence turns really tells the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from benchmarks.world import RELATIONS, Split

_NAME = r"[A-Z][a-z]+ [A-Z][a-z]+"
_LOWER = r"[a-z]+"
_CAPITAL = r"[A-Z][a-z]+"
VALUE_PATTERNS = {
    "home": _CAPITAL,
    "job": _LOWER,
    "pet": _LOWER,
    "food": _LOWER,
    "color": _LOWER,
    "instrument": _LOWER,
    "code": _LOWER,
    "badge": r"\d{4}",
    "room": r"\d{3}",
    "budget": r"\d{5}",
    "birthday": r"[A-Z][a-z]+ \d{1,2}",
    "address": r"\d{1,2} [A-Z][a-z]+ [A-Z][a-z]+",
    "site": _NAME,
    "mentor": _NAME,
    "lead": _NAME,
}
UNKNOWN = "I do not know."

Told = tuple[str, str, str]  # subject, relation, value


@cache
def _statement_patterns(split: Split) -> list[tuple[str, re.Pattern[str]]]:
    return [
        (name, _compiled(template, VALUE_PATTERNS[name]))
        for name, relation in RELATIONS.items()
        for template in relation.phrases(split).statements + relation.phrases(split).updates
    ]


@cache
def _question_patterns(split: Split) -> list[tuple[str, re.Pattern[str]]]:
    return [
        (name, re.compile(re.escape(template).replace(r"\{s\}", "(?P<s>.+)")))
        for name, relation in RELATIONS.items()
        for template in relation.phrases(split).questions + relation.phrases(split).paraphrases
    ]


@cache
def _hop_patterns(split: Split) -> list[tuple[str, re.Pattern[str]]]:
    return [
        (name, re.compile(re.escape(template).replace(r"\{s\}", f"(?P<s>{_NAME})")))
        for name, relation in RELATIONS.items()
        for template in relation.phrases(split).hops
    ]


def _compiled(template: str, value: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{s\}", f"(?P<s>{_NAME})").replace(r"\{v\}", f"(?P<v>{value})")
    return re.compile(pattern)


def told_by(text: str, split: Split) -> Iterator[set[Told]]:
    """For every sentence all readings of it: one for a statement, none for small talk."""
    for sentence in re.findall(r"[^.?!]+[.?!]", text):
        yield {
            (match["s"], name, match["v"])
            for name, pattern in _statement_patterns(split)
            if (match := pattern.fullmatch(sentence.strip()))
        }


def asked_by(text: str, split: Split) -> set[tuple[str, tuple[str, ...]]]:
    """All readings of a question: whom it starts from and the relations to follow."""
    readings: set[tuple[str, tuple[str, ...]]] = set()
    for name, pattern in _question_patterns(split):
        if not (match := pattern.fullmatch(text)):
            continue
        if re.fullmatch(_NAME, match["s"]):
            readings.add((match["s"], (name,)))
        for hop, hop_pattern in _hop_patterns(split):
            if hop_match := hop_pattern.fullmatch(match["s"]):
                readings.add((hop_match["s"], (hop, name)))
    return readings


@dataclass(slots=True)
class Reader:
    """What is known after reading some turns in order."""

    split: Split
    known: dict[tuple[str, str], str] = field(default_factory=dict)

    def read(self, texts: Iterable[str]) -> Reader:
        for text in texts:
            for readings in told_by(text, self.split):
                assert len(readings) <= 1, f"ambiguous: {text!r} may mean {readings}"
                for subject, relation, value in readings:
                    self.known[subject, relation] = value
        return self

    def answer(self, question: str) -> str:
        readings = asked_by(question, self.split)
        assert len(readings) == 1, f"{question!r} may mean {readings}"
        ((subject, path),) = readings
        values = []
        for relation in path:
            if (subject, relation) not in self.known:
                return UNKNOWN
            subject = self.known[subject, relation]
            values.append(subject)
        return f"{': '.join(values)}."
