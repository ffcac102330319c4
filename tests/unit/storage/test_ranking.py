"""What the bookkeeping of tiers says, against a list and a sort."""

from __future__ import annotations

import random

import pytest

from kv_agent.chunks import ChunkKey
from kv_agent.errors import ConfigError
from kv_agent.storage.ranking import AccessWindow, Ranking


@pytest.mark.parametrize("seed", range(5))
def test_the_window_counts_as_a_list_does(seed: int) -> None:
    rng = random.Random(seed)
    promote_after, size = rng.randrange(1, 4), rng.randrange(4, 12)
    window = AccessWindow(promote_after, size)
    asked: list[ChunkKey] = []
    for _ in range(2000):
        asked.append(ChunkKey(str(min(rng.randrange(9), rng.randrange(9)))))
        expected = asked[-size:].count(asked[-1]) >= promote_after
        assert window.note(asked[-1]) == expected
    assert window._counts.total() == size
    assert all(window._counts.values())  # what nobody asks for any more is not remembered


@pytest.mark.parametrize("promote_after", [0, -1, 1025])
def test_a_promotion_that_could_never_be_is_refused(promote_after: int) -> None:
    with pytest.raises(ConfigError, match="promote_after"):
        AccessWindow(promote_after)


@pytest.mark.parametrize("seed", range(5))
def test_the_ranking_finds_what_a_sort_finds(seed: int) -> None:
    rng = random.Random(seed)
    ranking = Ranking()
    model: dict[ChunkKey, tuple[float, int]] = {}
    for step in range(3000):
        key = ChunkKey(str(rng.randrange(12)))
        if key in model and rng.random() < 0.3:
            ranking.remove(key)
            del model[key]
        else:
            rank = float(rng.randrange(5))
            ranking.put(key, rank)
            model[key] = (rank, step)
        if model:
            assert ranking.lowest() == min(model, key=lambda one: model[one])
        assert len(ranking._heap) <= 2 * 12 + 64  # out-of-date entries do not pile up
