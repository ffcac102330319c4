"""What is measured: one setting at a time, or the standard set.

The bundled recall model takes 4,096 positions and was trained on contexts of at most 2,048 tokens: settings
beyond that also show what computing loses there, which is why every way is compared with computing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LONGEST_CONTEXT = 4096

_MOST_WAYS = (
    "computed",
    "computed again",
    "no memory",
    "exact",
    "adapted",
    "adapted, 1 link tokens",
    "adapted, 2 link tokens",
    "adapted, another opening",
    "adapted, behind a neutral turn",
    "adapted, behind a neutral turn, 1 link tokens",
)
_FEW_WAYS = ("computed", "adapted", "adapted, 1 link tokens", "adapted, another opening")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Questions about memories. ``task`` is ``recall`` or, for any language model, ``stories``.

    ``cases`` questions; ``before_tokens`` stood before each memory when it was computed, ``filler_tokens``
    stand in front of the memories now. A memory has ``facts_per_memory``, one turn each (the last has what
    is left), or is the first ``story_tokens`` of a story. It is stored by ``codec``.
    """

    task: str = "recall"
    memories: int
    cases: int = 100
    system: str | None = None
    before_tokens: int = 0
    filler_tokens: int = 0
    shuffled: bool = False
    chunk_tokens: int = 256
    facts_per_memory: int = 1
    story_tokens: int = 48
    codec: str = "raw"


class Planned(NamedTuple):
    """A setting with the ways to measure in it (none: all), and for how many cases divergence is measured."""

    setting: Setting
    ways: tuple[str, ...] = ()
    kl_cases: int = 20


STANDARD = (
    *(Planned(Setting(memories=number), _MOST_WAYS) for number in (1, 2)),
    *(Planned(Setting(memories=number, cases=300), _MOST_WAYS) for number in (5, 20)),
    Planned(Setting(memories=20, shuffled=True), _FEW_WAYS, 0),
    *(
        Planned(Setting(memories=5, before_tokens=distance), _FEW_WAYS, 0)
        for distance in (10, 100, 500, 2000, 4000)
    ),
    *(
        Planned(Setting(memories=5, filler_tokens=distance), _FEW_WAYS, 0)
        for distance in (10, 100, 500, 1900, 3900)
    ),
    *(
        Planned(Setting(memories=2, facts_per_memory=30, chunk_tokens=chunk_tokens), _FEW_WAYS, 0)
        for chunk_tokens in (32, 64, 128, 256, 512)
    ),
)
