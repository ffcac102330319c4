"""How facts are stated and asked for: the shape of a relation's phrasings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.world.records import Split, ValueKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrases:
    """The templates of one split; ``{s}`` is the subject and ``{v}`` the value.

    ``paraphrases`` are questions, too. ``hops`` name the value without telling it ("the mentor of {s}").
    """

    statements: tuple[str, ...]
    updates: tuple[str, ...] = ()
    questions: tuple[str, ...]
    paraphrases: tuple[str, ...]
    hops: tuple[str, ...] = ()

    def with_more(self, more: Mapping[str, Sequence[str]]) -> Phrases:
        """These and ``more``, by the name of the field."""
        return replace(self, **{name: getattr(self, name) + tuple(added) for name, added in more.items()})

    def all(self) -> Iterator[str]:
        yield from self.statements + self.updates + self.questions + self.paraphrases + self.hops


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """What can be known about a person or a project.

    Held-out phrasings use only words that occur in the training phrasings of the same relation: a model
    trained from nothing cannot know any others.
    """

    name: str
    about_project: bool = False
    kind: ValueKind
    train: Phrases
    validation: Phrases
    test: Phrases

    def phrases(self, split: Split) -> Phrases:
        match split:
            case Split.TRAIN:
                return self.train
            case Split.VALIDATION:
                return self.validation
            case Split.TEST:
                return self.test

    @property
    def can_change(self) -> bool:
        return bool(self.train.updates)

    @property
    def is_hop(self) -> bool:
        return bool(self.train.hops)
