"""The batches of a step depend on nothing but its settings and hold what their level allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from benchmarks.world import Question, Split, World, WorldConfig, generate_world
from examples.models.recall_training import curriculum
from examples.models.recall_training.batches import Batch, Encoder, Row
from examples.models.recall_training.curriculum import LEVELS, Batches, Source
from examples.models.recall_training.tokens import SYSTEM_PROMPTS

SOURCE = Source(seed=3, level=1, tokens_per_step=600)


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for name in ("ids_BT", "positions_BT", "predicted_W", "answer_ids_W", "echoes_E"):
        yield getattr(batch, name)
    yield from (batch.layout.lengths_B, batch.layout.owners_BNL)


def are_equal(one: Batch, other: Batch) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    rest = [(each.questions, each.layout.num_shared) for each in (one, other)]
    return all(torch.equal(a, b) for a, b in pairs) and rest[0] == rest[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the curriculum asked the encoder for, and what it got."""

    world: World
    questions: Sequence[Question]
    earlier: Sequence[Question]
    system: str | None
    row: Row


class Recorder(Encoder):
    """Keeps what it encodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.told: list[Told] = []

    def row(
        self,
        world: World,
        questions: Sequence[Question],
        *,
        earlier: Sequence[Question] = (),
        system: str | None = None,
    ) -> Row:
        row = super().row(world, questions, earlier=earlier, system=system)
        told = Told(world=world, questions=questions, earlier=earlier, system=system, row=row)
        self.told.append(told)
        return row


@pytest.fixture
def recorder(tokenizer: PreTrainedTokenizerFast) -> Recorder:
    return Recorder(tokenizer)


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
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
    # Step 14 has as many facts as its level allows, at every level.
    for _ in Batches(encoder, Source(seed=0, level=level, tokens_per_step=4096), range(12, 16)):
        pass
    assert max(count for count, _ in worlds) == LEVELS[level]
    assert {world.split for _, world in worlds} == {Split.TRAIN}
    assert len({world.seed for _, world in worlds}) == len(worlds)


def test_no_question_of_the_last_level_sees_more_than_the_longest_context(encoder: Encoder) -> None:
    source = Source(seed=1, level=len(LEVELS) - 1, tokens_per_step=4096)
    for batch in Batches(encoder, source, range(6)):
        assert int(batch.positions_BT.max()) < 2048


def test_longest_context_is_kept_with_more_facts_than_fit(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curriculum, "LEVELS", (160,))
    batches = list(Batches(recorder, Source(seed=1, level=0, tokens_per_step=1), range(6)))
    assert max(told.row.longest for told in recorder.told) > 2048
    assert 1024 < max(int(batch.positions_BT.max()) for batch in batches) < 2048


def test_dialogues_that_are_too_long_are_drawn_again_with_fewer_facts(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 300
    monkeypatch.setattr(curriculum, "_MAX_CONTEXT", longest)
    monkeypatch.setattr(curriculum, "_RECITED_SHARE", 0.0)
    source = Source(seed=1, level=5, tokens_per_step=1500)
    batches = list(Batches(recorder, source, range(8)))
    lengths = [max(len(told.row.shared) + len(one.ids) for one in told.row.asked) for told in recorder.told]
    assert any(length > longest for length in lengths)
    kept = [told.row for told, length in zip(recorder.told, lengths, strict=True) if length <= longest]
    assert kept
    questions = [one.question for row in kept for one in row.asked]
    assert questions == [question for batch in batches for question in batch.questions]


def test_some_dialogues_are_recited_instead_but_never_all(encoder: Encoder) -> None:
    num_rows = num_recited = 0
    for batch in Batches(encoder, Source(seed=7, level=1, tokens_per_step=2048), range(60)):
        told = {int(b) for b in (batch.predicted_W // batch.ids_BT.shape[1]).unique()}
        assert 0 in told
        num_rows += len(batch.ids_BT)
        num_recited += len(batch.ids_BT) - len(told)
    assert num_recited / (num_rows - 60) == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("level", [0, 4, len(LEVELS) - 1])
def test_steps_hold_the_tokens_asked_for_and_twice_as_many_at_high_levels(
    encoder: Encoder, level: int
) -> None:
    wanted = 4096 if LEVELS[level] < 14 else 8192
    for batch in Batches(encoder, Source(seed=4, level=level, tokens_per_step=4096), range(6)):
        num_tokens = int((batch.ids_BT != encoder.pad_id).sum())
        # Full to the last dialogue, which is as long as the others or nearly so.
        average = num_tokens / batch.ids_BT.shape[0]
        assert wanted - average < num_tokens < wanted + average


def test_dialogues_of_a_batch_have_one_system_message_and_number_of_earlier_questions(
    recorder: Recorder,
) -> None:
    shapes = []
    for _ in Batches(recorder, Source(seed=5, level=1, tokens_per_step=1500), range(40)):
        assert len(recorder.told) > 3
        (shape,) = {(told.system, len(told.earlier), told.world.split) for told in recorder.told}
        assert len({told.world.seed for told in recorder.told}) == len(recorder.told)
        shapes.append(shape)
        recorder.told.clear()
    assert len(set(shapes)) > 3


def test_some_dialogues_have_a_system_message_and_some_earlier_questions(recorder: Recorder) -> None:
    # One dialogue a step is enough here.
    for _ in Batches(recorder, Source(seed=2, level=3, tokens_per_step=1), range(300)):
        pass
    told = recorder.told
    assert len(told) == 300
    with_system = [each.system for each in told if each.system is not None]
    assert 0.08 < len(with_system) / len(told) < 0.25
    assert set(with_system) == set(SYSTEM_PROMPTS)
    with_earlier = [len(each.earlier) for each in told if each.earlier]
    assert 0.08 < len(with_earlier) / len(told) < 0.25
    assert min(with_earlier) == 1
    assert 3 < max(with_earlier) <= 6


def test_questions_are_of_their_world_asked_once_and_at_most_48(recorder: Recorder) -> None:
    for level, num_steps in ((0, 100), (3, 60), (len(LEVELS) - 1, 4)):
        for _ in Batches(recorder, Source(seed=6, level=level, tokens_per_step=1), range(num_steps)):
            pass
    for told in recorder.told:
        ids = [question.id for question in (*told.earlier, *told.questions)]
        assert len(set(ids)) == len(ids)
        assert {*told.earlier, *told.questions} <= set(told.world.questions)
        assert 1 <= len(told.questions) <= 48
    assert max(len(told.questions) for told in recorder.told) == 48
    assert any(told.earlier for told in recorder.told)


def test_numbers_of_facts_go_from_one_to_the_level_s_and_often_are_it(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def record(config: WorldConfig, *, split: Split, seed: int) -> World:
        counts.append(config.num_facts)
        return generate_world(config, split=split, seed=seed)

    monkeypatch.setattr(curriculum, "generate_world", record)
    for _ in Batches(encoder, Source(seed=7, level=3, tokens_per_step=1), range(300)):
        pass
    assert LEVELS[3] == 9
    assert set(counts) == set(range(1, 10))
    assert 0.35 < counts.count(9) / len(counts) < 0.55
    # The logarithm of the others is uniform: below the root of 9 as often as above.
    assert 0.35 < sum(count <= 3 for count in counts) / sum(count < 9 for count in counts) < 0.75
