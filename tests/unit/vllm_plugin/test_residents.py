"""What the scheduler was told is in memory is there until it has heard otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.chunks import ChunkKey
from kv_agent.vllm_plugin.jobs import ChunkLoad
from kv_agent.vllm_plugin.residents import Residents

ONE, OTHER = ChunkKey("a" * 64), ChunkKey("b" * 64)


def told(residents: Residents) -> Mapping[ChunkKey, str | None]:
    changes = residents.take_changes()
    assert changes is not None
    return changes.checksums


def found(residents: Residents, key: ChunkKey, checksum: str) -> Tensor:
    chunk = ChunkLoad(key=key, checksum=checksum, num_tokens=1, skip=0, start=0, delta=0)
    first, second = residents.get([chunk, chunk])
    assert first is second
    return first


def test_what_comes_is_told_once() -> None:
    residents = Residents()
    residents.entered(ONE, "sum", torch.ones(1))
    assert told(residents) == {ONE: "sum"}
    assert residents.take_changes() is None
    assert found(residents, ONE, "sum") == 1


def test_what_goes_is_held_until_that_was_heard() -> None:
    residents = Residents()
    residents.entered(ONE, "sum", torch.ones(1))
    residents.take_changes()
    residents.left(ONE)
    residents.heard(1)
    assert found(residents, ONE, "sum") == 1

    gone = residents.take_changes()
    assert gone is not None
    assert gone.checksums == {ONE: None}
    residents.heard(gone.number - 1)
    assert found(residents, ONE, "sum") == 1
    residents.heard(gone.number)
    with pytest.raises(LookupError, match="not in memory"):
        found(residents, ONE, "sum")


def test_what_goes_untold_is_never_told() -> None:
    residents = Residents()
    residents.entered(ONE, "sum", torch.ones(1))
    residents.left(ONE)
    residents.left(OTHER)
    assert residents.take_changes() is None
    with pytest.raises(LookupError):
        found(residents, ONE, "sum")


def test_other_bytes_of_a_key_are_another_chunk() -> None:
    residents = Residents()
    residents.entered(ONE, "old", torch.zeros(1))
    residents.take_changes()
    residents.left(ONE)
    residents.entered(ONE, "new", torch.ones(1))
    assert told(residents) == {ONE: "new"}
    assert found(residents, ONE, "old") == 0
    assert found(residents, ONE, "new") == 1
    residents.heard(2)
    with pytest.raises(LookupError):
        found(residents, ONE, "old")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "report", "hear"]), st.integers(0, 3)), max_size=60)
)
def test_whatever_happens_a_listener_finds_all_that_it_knows_of(steps: list[tuple[str, int]]) -> None:
    """Reports arrive late, as in an engine that schedules ahead; ``heard`` is told later still."""
    residents = Residents()
    there: dict[ChunkKey, str] = {}
    known: dict[ChunkKey, str] = {}
    under_way = []
    for number, (what, which) in enumerate(steps):
        key = ChunkKey(str(which) * 64)
        if what == "enter":
            if key in there:
                residents.left(key)
            there[key] = f"sum {number}"
            residents.entered(key, there[key], torch.tensor(number))
        elif what == "leave" and key in there:
            del there[key]
            residents.left(key)
        elif what == "report" and (changes := residents.take_changes()) is not None:
            under_way.append(changes)
        elif what == "hear" and under_way:
            changes = under_way.pop(0)
            for one, checksum in changes.checksums.items():
                known.pop(one, None)
                if checksum is not None:
                    known[one] = checksum
            residents.heard(changes.number)
        for one, checksum in known.items():
            assert f"sum {int(found(residents, one, checksum))}" == checksum

    while under_way or (changes := residents.take_changes()) is not None:
        changes = under_way.pop(0) if under_way else changes
        for one, checksum in changes.checksums.items():
            known.pop(one, None)
            if checksum is not None:
                known[one] = checksum
    assert known == there
