"""Best cosines from rounded numbers against sums written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.retrieval.maxsim_kernel import best_cosines
from kv_agent.retrieval.sketches import LARGEST_LEVEL, rounded
from kv_agent.retrieval.token_space import Query, Tokens, TokenSpace


def by_definition(query: Query, documents: list[Tokens]) -> np.ndarray:
    directions_tV = query.values_tV * query.scales_t[:, None].astype(np.float64)
    rows = []
    for document in documents:
        keys_TV = document.levels_TV.astype(np.float64) * document.scales_T[:, None]
        products_Tt = keys_TV @ directions_tV.T - query.offsets_t
        rows.append((products_Tt * document.inverse_T[:, None]).max(axis=0))
    return np.array(rows)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    num_asked=st.integers(1, 9),
    num_values=st.sampled_from([1, 7, 16, 33, 64, 128, 1000]),
    spread=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_they_are_the_largest_of_the_products_over_the_length(
    sizes: list[int], num_asked: int, num_values: int, spread: float, seed: int
) -> None:
    """Also where a few directions have nearly everything."""
    rng = np.random.default_rng(seed)
    by_value = 10.0 ** (spread * rng.normal(size=num_values))

    def keys(num_tokens: int) -> np.ndarray:
        return (rng.normal(size=(num_tokens, num_values)) * by_value).astype(np.float32)

    space = TokenSpace(mean_V=keys(1)[0])
    documents = space.place([rounded(keys(size)) for size in sizes])
    query = space.query(keys(num_asked))
    found = best_cosines(query, documents)
    np.testing.assert_allclose(found, by_definition(query, documents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_values", [1, 128, 1024, 4096])
@pytest.mark.parametrize("value", [1.0, -1.0, 3e15, 1e-15])
def test_the_largest_sums_there_can_be_fit(num_values: int, value: float) -> None:
    """Every value and every level the largest, of the same sign and of the other."""
    levels_TV = np.full((2, num_values), LARGEST_LEVEL, np.int8)
    levels_TV[1] = -LARGEST_LEVEL
    ones_T = np.ones(2, np.float32)
    query = TokenSpace().query(np.full((1, num_values), value, np.float32))
    found = best_cosines(query, [Tokens(levels_TV, ones_T, ones_T)])
    np.testing.assert_allclose(found, [[LARGEST_LEVEL * num_values**0.5]], rtol=1e-3)


def test_columns_and_other_views_are_read_as_what_they_show() -> None:
    """Rows that do not lie one behind the other."""
    rng = np.random.default_rng(1)
    wide_TV = rng.integers(-LARGEST_LEVEL, LARGEST_LEVEL + 1, (12, 40)).astype(np.int8)
    ones_T = np.ones(6, np.float32)
    query = TokenSpace().query(rng.normal(size=(3, 20)).astype(np.float32))
    view = Tokens(wide_TV[::2, 5:25], ones_T, ones_T)
    assert not view.levels_TV.flags.c_contiguous
    np.testing.assert_allclose(best_cosines(query, [view]), by_definition(query, [view]), rtol=1e-4)


@pytest.mark.parametrize(
    "shapes", [((3, 7), 3, 3), ((3, 9), 3, 3), ((3, 8), 4, 4), ((3, 8), 3, 2), ((3, 8), 2, 3)], ids=str
)
def test_tokens_that_do_not_fit_are_no_bytes_to_read(shapes: tuple[tuple[int, int], int, int]) -> None:
    levels, num_scales, num_lengths = shapes
    tokens = Tokens(
        np.ones(levels, np.int8), np.ones(num_scales, np.float32), np.ones(num_lengths, np.float32)
    )
    query = TokenSpace().query(np.ones((2, 8), np.float32))
    with pytest.raises(ValueError, match=r"are not \["):
        best_cosines(query, [tokens])
