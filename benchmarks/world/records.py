"""What a world is made of: turns, sessions, questions. Values only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import Enum, unique
from typing import NewType, TypedDict

TurnId = NewType("TurnId", str)

UNKNOWN_ANSWER = "I do not know."


class Message(TypedDict):
    """One entry of a chat, as chat templates take it."""

    role: str
    content: str


@unique
class Split(Enum):
    """Who may see it. The splits share neither people, projects nor phrasings."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"

    @property
    def residue(self) -> int:
        """The splits' place in 0, 1, 2: a name belongs to it by the sum of its parts' numbers modulo 3."""
        return list(Split).index(self)


@unique
class Ask(Enum):
    """What a question asks of its reader."""

    DIRECT = "direct"
    PARAPHRASE = "paraphrase"  # shares no content word with any statement of its relation
    CORRECTED = "corrected"  # an older, different value was stated before
    TWO_HOP = "two_hop"
    UNKNOWN = "unknown"  # nothing in the whole world answers it


@unique
class ValueKind(Enum):
    """The shape of an answer."""

    WORD = "word"
    NUMBER = "number"
    PHRASE = "phrase"
    NAME = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a user said and what the assistant replied."""

    id: TurnId
    user: str
    assistant: str

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.assistant}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Turns of one conversation, in order."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[Message]:
        return [message for turn in self.turns for message in turn.messages]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about everything said before, with its one right answer.

    ``relations`` is the path that leads to the answer, two names long for a two-hop question. ``evidence``
    names the turns the answer follows from, in the path's order; of a corrected fact only the newest turn.
    It is empty for a question that nothing answers, whose ``kind`` is None. The answer to a two-hop question
    says who is meant before it says what was asked: "Mara Lind: Oslo."
    """

    id: str
    text: str
    answer: str
    ask: Ask
    relations: tuple[str, ...]
    kind: ValueKind | None
    evidence: tuple[TurnId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Sessions in the order they took place, and questions asked after the last of them."""

    split: Split
    seed: int
    sessions: tuple[Session, ...]
    questions: tuple[Question, ...]

    @property
    def turns(self) -> dict[TurnId, Turn]:
        """Every turn by its id, oldest first."""
        return {turn.id: turn for session in self.sessions for turn in session.turns}

    @property
    def messages(self) -> list[Message]:
        return [message for session in self.sessions for message in session.messages]

    def digest(self) -> str:
        """SHA-256 of everything in it: equal digests mean equal worlds."""
        text = json.dumps(asdict(self), sort_keys=True, default=lambda member: member.value)
        return hashlib.sha256(text.encode()).hexdigest()
