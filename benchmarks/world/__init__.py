"""A small world whose questions have one right answer: seeded dialogues to measure memory on."""

from benchmarks.world.facts import RELATIONS, WorldConfig
from benchmarks.world.generator import generate_world
from benchmarks.world.records import (
    UNKNOWN_ANSWER,
    Ask,
    Message,
    Question,
    Session,
    Split,
    Turn,
    TurnId,
    ValueKind,
    World,
)

__all__ = [
    "RELATIONS",
    "UNKNOWN_ANSWER",
    "Ask",
    "Message",
    "Question",
    "Session",
    "Split",
    "Turn",
    "TurnId",
    "ValueKind",
    "World",
    "WorldConfig",
    "generate_world",
]
