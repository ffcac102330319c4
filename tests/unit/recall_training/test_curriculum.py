"""Levels are passed by their rule alone, and the batches of a step depend on nothing but its settings."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from benchmarks.world import Split, World, WorldConfig, generate_world
from examples.models.recall_training import curriculum
from examples.models.recall_training.batches import Batch, Encoder
from examples.models.recall_training.curriculum import (
    LEVELS,
    PASS_SHARE,
    WINDOW,
    Batches,
    Progress,
    Source,
)

# Numbers of right answers out of 8: their means are exact in floating point.
STEPS = st.lists(st.integers(min_value=4, max_value=8), max_size=40 * len(LEVELS))
SOURCE = Source(seed=3, level=1, tokens_per_step=600)


def answers(num_right: int) -> list[bool]:
    return [True] * num_right + [False] * (8 - num_right)


def levels_by_rule(steps: list[int]) -> list[int]:
    """The level after each step: passed when the latest WINDOW steps at it have PASS_SHARE right."""
    level, since = 0, 0
    levels = []
    for number in range(len(steps)):
        at_level = steps[since : number + 1]
        is_right = len(at_level) >= WINDOW and sum(at_level[-WINDOW:]) >= PASS_SHARE * 8 * WINDOW
        if is_right and level < len(LEVELS) - 1:
            level, since = level + 1, number + 1
        levels.append(level)
    return levels


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for name in ("ids_BT", "positions_BT", "segments_BT", "predicted_W", "answer_ids_W", "echoes_E"):
        yield getattr(batch, name)


def are_equal(one: Batch, other: Batch) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and one.questions == other.questions


@settings(max_examples=100, deadline=None)
@given(steps=STEPS)
def test_level_follows_the_rule_and_never_falls(steps: list[int]) -> None:
    progress = Progress()
    levels, passes = [], []
    for num_right in steps:
        before = progress.level
        passes.append(progress.record(answers(num_right)))
        levels.append(progress.level)
        assert passes[-1] == (progress.level > before)
    assert levels == levels_by_rule(steps)
    assert levels == sorted(levels)


def test_level_is_passed_at_the_share_and_not_just_below_it() -> None:
    for short in (0, 1):
        progress = Progress()
        passed = [progress.record(answers(6)) for _ in range(WINDOW - 1)]
        passed.append(progress.record(answers(6 - short)))
        assert passed == [False] * (WINDOW - 1) + [short == 0]


def test_last_level_is_never_passed() -> None:
    progress = Progress(level=len(LEVELS) - 1)
    assert not any(progress.record([True]) for _ in range(3 * WINDOW))
    assert progress.level == len(LEVELS) - 1


def test_right_answers_at_one_level_do_not_count_at_the_next() -> None:
    progress = Progress()
    assert [progress.record([True]) for _ in range(2 * WINDOW)].count(True) == 2
    assert progress.level == 2
    assert progress.right == 0.0


def test_levels_rise() -> None:
    assert list(LEVELS) == sorted(set(LEVELS))


def test_batches_of_the_same_settings_are_the_same(encoder: Encoder) -> None:
    one, other = (list(Batches(encoder, SOURCE, range(4, 7))) for _ in range(2))
    assert all(are_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not are_equal(one[0], one[1])


def test_batches_that_go_on_in_the_middle_are_those_of_an_unbroken_run(encoder: Encoder) -> None:
    whole = list(Batches(encoder, SOURCE, range(6)))
    rest = list(Batches(encoder, SOURCE, range(4, 6)))
    assert all(are_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_together_make_the_batches_of_one_process(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    alone = list(DataLoader(Batches(encoder, SOURCE, range(5)), batch_size=None))
    shares = []
    for number in range(num_workers):
        info = SimpleNamespace(id=number, num_workers=num_workers)
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.data, "get_worker_info", lambda info=info: info)
            shares.append(list(Batches(encoder, SOURCE, range(5))))
    # A loader takes from its workers in turn.
    in_turn = [shares[step % num_workers][step // num_workers] for step in range(5)]
    assert sum(map(len, shares)) == 5
    assert all(are_equal(a, b) for a, b in zip(alone, in_turn, strict=True))


def test_loader_processes_give_the_batches_in_order(encoder: Encoder) -> None:
    alone = list(Batches(encoder, SOURCE, range(3)))
    loader = DataLoader(Batches(encoder, SOURCE, range(3)), batch_size=None, num_workers=2)
    assert all(are_equal(a, b) for a, b in zip(alone, loader, strict=True))


@pytest.mark.parametrize("level", [0, 4, len(LEVELS) - 1])
def test_batches_tell_at_most_the_facts_of_their_level_from_the_training_split(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    worlds: list[tuple[int, World]] = []

    def record(config: WorldConfig, *, split: Split, seed: int) -> World:
        worlds.append((config.num_facts, generate_world(config, split=split, seed=seed)))
        return worlds[-1][1]

    monkeypatch.setattr(curriculum, "generate_world", record)
    for _ in Batches(encoder, Source(seed=0, level=level, tokens_per_step=4096), range(4)):
        pass
    assert max(count for count, _ in worlds) == LEVELS[level]
    assert {world.split for _, world in worlds} == {Split.TRAIN}
    assert len({world.seed for _, world in worlds}) == len(worlds)


def test_positions_and_lengths_of_the_last_level_keep_their_limits(encoder: Encoder) -> None:
    source = Source(seed=1, level=len(LEVELS) - 1, tokens_per_step=4096)
    for batch in Batches(encoder, source, range(4)):
        assert int(batch.positions_BT.max()) < curriculum._MAX_CONTEXT
        for row_T in batch.segments_BT // (1 << 16):
            numbers, counts = row_T[row_T >= 0].unique(return_counts=True)
            assert numbers.numel()
            assert int(counts.max()) <= curriculum._MAX_ROW


def test_some_dialogues_are_chained_and_most_are_not(encoder: Encoder) -> None:
    # In a chain no question's tokens are hidden from the next: its segment is the facts' own.
    is_chain = []
    for batch in Batches(encoder, Source(seed=2, level=0, tokens_per_step=3000), range(6)):
        segments = batch.segments_BT.flatten()[batch.predicted_W]
        dialogues = segments // (1 << 16)
        is_chain += [bool((segments[dialogues == n] % (1 << 16) == 0).all()) for n in dialogues.unique()]
    assert len(is_chain) > 100
    assert 0.05 < sum(is_chain) / len(is_chain) < 0.3
